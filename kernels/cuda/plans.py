"""Which instantiation of a CUDA kernel runs for what it is given, and on which grid: found once, then looked up."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from normpass.kernels.contract import Layout, Norm
from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.driver import Launch
from normpass.kernels.cuda.geometry import THREADS, Geometry, geometry, vector_of
from normpass.kernels.cuda.variant import Variant
from normpass.kernels.masks import BITS

STORAGE = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "normpass::Half",
    torch.bfloat16: "normpass::BFloat16",
}


class Device(Protocol):
    """What compiles kernels and launches them on the current stream. Each may raise a `CudaError`."""

    def multiprocessors(self, index: int) -> int: ...
    def kernel(self, variant: Variant, entry: str, grid: tuple[int, int], threads: int, index: int) -> Launch: ...
    def arrivals(self, index: int, count: int) -> int: ...


class Join(NamedTuple):
    """What a norm's result is added to."""

    residual: bool = False
    """a residual is read"""
    masked: bool = False
    """a mask is written or read"""
    normed: bool = False
    """the residual is the input of a norm"""


ALONE = Join()


class Plan(NamedTuple):
    """One kernel ready for one layout."""

    launch: Launch
    grid: tuple[int, ...]
    """what ends its arguments"""
    channels: int
    tiles: int
    slabs: int


class Plans:
    """Every kernel of every GPU that was asked for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._found: dict[tuple[object, ...], Plan] = {}

    def find(
        self,
        op: str,
        entry: str,
        x: Tensor,
        layout: Layout,
        addresses: int,
        activation: str = "",
        join: Join = ALONE,
        pieces: int = 0,
        parts: int = 1,
    ) -> Plan:
        """The kernel `entry` of `op`. `addresses`: those of all tensors of activations, by bitwise or."""
        alignment = addresses & 15
        key = entry, x.dtype, x.get_device(), layout, alignment, activation, join, pieces, parts, op
        plan = self._found.get(key)
        if plan is None:
            plan = self._found[key] = self._made(
                op, entry, x, layout, (alignment | 16) & -(alignment | 16), activation, join, pieces, parts
            )
        return plan

    def _made(
        self,
        op: str,
        entry: str,
        x: Tensor,
        layout: Layout,
        alignment: int,
        activation: str,
        join: Join,
        pieces: int,
        parts: int,
    ) -> Plan:
        index, size, vector = x.device.index, x.element_size(), vector_of(layout, x.element_size(), alignment)
        if join.masked and vector != vector_of(layout, size):
            raise CudaError(f"{op}: a mask is of vectors of 16 bytes, and a tensor lies at a multiple of {alignment}")
        group = BITS // vector if join.masked and op == "norm_act" else 1
        shape = geometry(layout, size, alignment, self.device.multiprocessors(index), group)
        variant = variant_of(op, x.dtype, shape, activation, join, pieces, parts)
        launch = self.device.kernel(variant, entry, (shape.tiles, shape.slabs), THREADS, index)
        return Plan(launch, shape.parameters, shape.parameters[0], shape.tiles, shape.slabs)

    def of_vectors(self, op: str, like: Tensor) -> Plan:
        """A kernel for the numbers of each channel alone."""
        channels, index = like.numel(), like.device.index
        key = op, like.dtype, index, channels
        plan = self._found.get(key)
        if plan is None:
            variant, tiles = Variant(op, (("NORMPASS_STORAGE", STORAGE[like.dtype]),)), -(-channels // THREADS)
            launch = self.device.kernel(variant, op, (tiles, 1), THREADS, index)
            plan = self._found[key] = Plan(launch, (channels,), channels, tiles, 1)
        return plan

    def scratch(self, plan: Plan, like: Tensor, fields: int, more: int = 0) -> tuple[Tensor, int]:
        """`more` numbers a channel, then the accumulators of every slab; and the counters, 0 for a single slab."""
        slabs = plan.slabs if plan.slabs > 1 else 0
        scratch = like.new_empty((more + fields * slabs) * plan.channels)
        return scratch, self.device.arrivals(like.get_device(), plan.tiles) if slabs else 0


def variant_of(
    op: str,
    dtype: torch.dtype,
    shape: Geometry,
    activation: str = "",
    join: Join = ALONE,
    pieces: int = 0,
    parts: int = 1,
) -> Variant:
    """The instantiation of `cuda/<op>.cu` for one dtype, shape and activation.

    With `pieces` of a concatenation, or a gradient that comes in so many `parts`.
    """
    macros = {"STORAGE": STORAGE[dtype], "VECTOR": str(shape.vector), "ROWS": str(shape.rows).lower()}
    if dtype.itemsize == 2:
        macros["NARROW"] = "1"
    if activation:
        macros["ACTIVATION"] = "".join(part.title() for part in activation.split("_"))
    if pieces:
        macros["PIECES"] = str(pieces)
    elif activation:
        macros["RESIDUAL"] = str(join.residual).lower()
    if parts > 1:
        macros["PARTS"] = str(parts)
    if join.masked:
        macros["MASKED"] = "1"
    if join.normed:
        macros["NORMED"] = "1"
    return Variant(op, tuple((f"NORMPASS_{name}", value) for name, value in macros.items()))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def site_arguments(norm: Norm) -> tuple[float, ...]:
    """Ends the kernels' pointers and begins their numbers."""
    weight, bias, mean, var, eps, _, args, _ = norm
    scale, shift = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    first, second, *_ = *args, 0.0, 0.0
    return scale, shift, 0 if mean is None else mean.data_ptr(), var.data_ptr(), eps, float(first), float(second)
