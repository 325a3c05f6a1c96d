"""A `Device` without a GPU that runs nothing and counts the bytes that each launch would read and write.

The host's code decides which kernels run on which tensors; here their arguments are taken apart again. What is counted
are tensors of activations: vectors of a number per channel, a thousandth of them, are not.
"""

from __future__ import annotations

from typing import NamedTuple

from normpass.kernels.cuda.driver import Launch
from normpass.kernels.cuda.variant import GRID, RUNS, Variant

MULTIPROCESSORS = 132
_ITEMSIZE = {"float": 4, "double": 8, "normpass::Half": 2, "normpass::BFloat16": 2}
_OF_RUNS = {"sample_norm_act": (0, 1, 2), "plane_sums": (3, 4, 5), "gradients": (0, 1, 3, 4, 5)}
"""Which arguments are arrays of the size of x. What a run needs twice is in registers or a cache."""


class Moved(NamedTuple):
    """What one launch moves."""

    source: str
    """the file of its kernel"""
    entry: str
    bytes: int


class CountingDevice:
    """The `Device` for `CudaKernels`; what tensors hold after a launch is undefined."""

    def __init__(self) -> None:
        self.launches: list[Moved] = []

    def multiprocessors(self, index: int) -> int:
        return MULTIPROCESSORS

    def arrivals(self, index: int, count: int) -> int:
        return 1

    def kernel(self, variant: Variant, entry: str, grid: tuple[int, int], threads: int, index: int) -> Launch:
        def launch(*args: float) -> None:
            self.launches.append(Moved(variant.source, entry, _bytes(variant, entry, args)))

        return launch

    def total(self) -> int:
        return sum(moved.bytes for moved in self.launches)


def _bytes(variant: Variant, entry: str, args: tuple[float, ...]) -> int:
    if entry in ("running_stats", "over_samples"):
        return 0
    macros = dict(variant.macros)
    if entry in _OF_RUNS:
        runs, _, _, vectors, *_ = args[-len(RUNS) :]
        arrays = _given(args, _OF_RUNS[entry])
        return int(runs * vectors * int(macros["NORMPASS_VECTOR"]) * _ITEMSIZE[macros["NORMPASS_STORAGE"]] * arrays)
    channels, _, positions = args[-len(GRID) : 3 - len(GRID)]
    values = channels * positions * (1 if macros["NORMPASS_ROWS"] == "true" else int(macros["NORMPASS_VECTOR"]))
    return int(values * _ITEMSIZE[macros["NORMPASS_STORAGE"]] * _arrays(macros, entry, args, channels))


def _arrays(macros: dict[str, str], entry: str, args: tuple[float, ...], channels: float) -> float:
    """How many arrays of the size of x or z a launch moves."""
    if entry in ("moments", "cat_norm_act", "add_statistics_gradient"):
        return {"moments": 1, "cat_norm_act": 2, "add_statistics_gradient": 3}[entry]
    if entry == "over_rows":
        return _given(args, (2, 3, 4))  # grad, x, residual
    bit = 1 / (8 * _ITEMSIZE[macros["NORMPASS_STORAGE"]])
    if entry == "norm_act":
        return _given(args, (0, 1, 2)) + bit * (args[3] != 0)  # z, x, residual; mask
    if entry == "cat_norm_act_backward":
        return _of_pieces(int(macros["NORMPASS_PIECES"]), args, channels)
    moved = _given(args, (0, 1, 5, 6, 8))  # dx, dresidual; grad, its other part, residual
    reads_y = macros["NORMPASS_ACTIVATION"] != "Identity" and not args[9]
    return moved + (entry == "reduce" or args[4] != 0 or reads_y) + bit * (args[9] != 0)


def _given(args: tuple[float, ...], positions: tuple[int, ...]) -> int:
    return sum(args[i] != 0 for i in positions)


def _of_pieces(count: int, args: tuple[float, ...], channels: float) -> float:
    """grad and each piece are read; its gradient is written, and read where it is added to."""
    bits, ends, dxs = int(args[10]), args[11 : 11 + count], args[11 + 2 * count : 11 + 3 * count]
    moved, first = 2 * channels, 0.0
    for index, (end, dx) in enumerate(zip(ends, dxs, strict=True)):
        size, first = max(0.0, min(end, channels) - first), min(end, channels)
        moved += size * ((dx != 0) + (bits >> index & 1))
    return moved / channels
