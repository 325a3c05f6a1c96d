"""What is compiled, a CUDA source file and the values of its macros; and the arguments that its kernels take.

Each argument is 64 bits wide: `q` a pointer or a size, `d` a double. An int that is given for a double becomes one:
the same bits read as another type would be a wrong number without an error.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Variant(NamedTuple):
    """One instantiation: `cuda/<source>.cu` compiled with `macros`, (name, value) each."""

    source: str
    macros: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        values = [value.rpartition("::")[2] for name, value in self.macros if name != "NORMPASS_NARROW"]
        return f"{self.source}({', '.join(values)})"


GRID = "q" * 7
"""`geometry.Geometry.parameters`, which end the arguments"""
RUNS = "q" * 6
"""`runs.Teams.parameters`, which end those of other kernels"""
_SITE = "q" * 4 + "d" * 3
"""weight, bias, mean, var; eps and the activation's arguments"""
_STATISTICS = "q" * 4 + "d"
"""the same of a residual's norm"""
_BACKWARD = "q" * 10 + _SITE
_SAMPLE_BACKWARD = "q" * 6 + _SITE + "q" + RUNS


def signature(variant: Variant, entry: str) -> str:
    """One letter for each argument of the kernel `entry` of `variant`."""
    pieces = "q" * int(dict(variant.macros).get("NORMPASS_PIECES", "0"))
    return {
        "probe": "qdq",
        "moments": "q" * 5 + "dd" + "qq" + GRID,
        "norm_act": "q" * 4 + _SITE + _STATISTICS + GRID,
        "reduce": _BACKWARD + "d" + "qq" + GRID,
        "apply": _BACKWARD + GRID,
        "cat_norm_act": "q" + _SITE + pieces * 2 + GRID,
        "cat_norm_act_backward": "q" * 3 + _SITE + "q" + pieces * 4 + "d" + "qq" + GRID,
        "add_statistics_gradient": "q" * 4 + GRID,
        "running_stats": "q" * 4 + "dd" + "q",
        "sample_norm_act": "q" * 3 + _SITE + "qq" + RUNS,
        "plane_sums": _SAMPLE_BACKWARD,
        "gradients": _SAMPLE_BACKWARD,
        "over_rows": "q" * 5 + _SITE + "qq" + "qq" + GRID,
        "over_samples": "q" * 5 + GRID,
    }[entry]


def packer(variant: Variant, entry: str) -> struct.Struct:
    """What writes the arguments one behind the other, each as its declared type."""
    return struct.Struct("=" + signature(variant, entry))
