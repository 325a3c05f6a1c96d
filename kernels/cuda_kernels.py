"""The GPU's kernels: CUDA C++ from `cuda/*.cu`, compiled by NVRTC when they are first needed.

Here is what happens on the host: which instantiation, which grid, which scratch memory, which arguments. The GPU
itself is a `Device`, so that the tests run this same code with one that executes the sources on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from normpass.kernels import InputNorm, Layout, Running
from normpass.kernels.activations import RULES
from normpass.kernels.cuda_driver import Launch
from normpass.kernels.cuda_geometry import THREADS, Geometry, geometry, vector_of
from normpass.kernels.cuda_variant import Variant
from normpass.kernels.masks import BITS

PIECES = (16, 64)
"""How many pieces of a concatenation the kernels are compiled for."""

MOMENTS_FIELDS, SUMS_FIELDS = 3, 2
"""Numbers in one accumulator of `cuda/moments.cu` and of `cuda/backward.cuh`."""

_STORAGE = {
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


class _Plan(NamedTuple):
    """One kernel ready for one layout."""

    launch: Launch
    geometry: Geometry


class CudaKernels:
    """The `Kernels` of CUDA devices that norms need; a kernel that cannot run is a `CudaError`, nothing written."""

    most_pieces = PIECES[-1]
    adds_gradients = normalises_residuals = True
    masks = frozenset(name for name, rule in RULES.items() if rule.two_slopes is not None)

    def __init__(self, device: Device):
        self._device = device
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in _STORAGE

    def moments(self, mean: Tensor, var: Tensor, x: Tensor, layout: Layout, running: Running | None = None) -> None:
        plan = self._plan("moments", "moments", x, layout, _alignment(x))
        scratch, arrivals = self._scratch(plan.geometry, var, MOMENTS_FIELDS)
        plan.launch(
            x.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            *_running(running, layout.outer * layout.inner),
            scratch.data_ptr(),
            arrivals,
            *plan.geometry.parameters,
        )

    def norm_act(
        self,
        z: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str,
        activation_args: Sequence[float],
        layout: Layout,
        mask: Tensor | None = None,
        of_residual: InputNorm | None = None,
    ) -> None:
        join = Join(residual is not None, mask is not None, of_residual is not None)
        plan = self._plan("norm_act", "norm_act", x, layout, _alignment(z, x, residual), activation, join)
        plan.launch(
            z.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(mask),
            _pointer(weight),
            _pointer(bias),
            mean.data_ptr(),
            var.data_ptr(),
            eps,
            *_two(activation_args),
            *_parameters(of_residual),
            *plan.geometry.parameters,
        )

    def norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        batch_statistics: bool,
        activation: str,
        activation_args: Sequence[float],
        layout: Layout,
        other: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if activation == "identity":
            residual = None  # it has no part in act'
        if mask is not None:  # is read by the vectors that it was written by
            grad, x, other = _aligned(grad), _aligned(x), other if other is None else _aligned(other)
        site = [_pointer(weight), _pointer(bias), mean.data_ptr(), var.data_ptr(), eps, *_two(activation_args)]
        call = _Backward(grad, other, x, residual, mask, var, site, batch_statistics, activation, layout)
        self._backward("norm_act_backward", call, dx, dresidual, dweight, dbias)

    def cat_norm_act(
        self,
        z: Tensor,
        xs: Sequence[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str,
        activation_args: Sequence[float],
        layout: Layout,
    ) -> None:
        pieces, alignment = _pieces(xs), _alignment_of_pieces(xs, layout, z)
        plan = self._plan("cat_norm_act", "cat_norm_act", z, layout, alignment, activation, pieces=pieces)
        plan.launch(
            z.data_ptr(),
            _pointer(weight),
            _pointer(bias),
            mean.data_ptr(),
            var.data_ptr(),
            eps,
            *_two(activation_args),
            *_ends(xs, pieces),
            *_pointers(xs, pieces),
            *plan.geometry.parameters,
        )

    def cat_norm_act_backward(
        self,
        dxs: Sequence[Tensor | None],
        adds: Sequence[bool],
        totals: Sequence[Tensor | None],
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        xs: Sequence[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str,
        activation_args: Sequence[float],
        layout: Layout,
    ) -> None:
        op, pieces, alignment = "cat_norm_act_backward", _pieces(xs), _alignment_of_pieces(xs, layout, grad, *dxs)
        plan = self._plan(op, op, grad, layout, alignment, activation, pieces=pieces)
        scratch, arrivals = self._scratch(plan.geometry, var, SUMS_FIELDS)
        bits = sum([1 << p for p, add in enumerate(adds) if add])
        plan.launch(
            grad.data_ptr(),
            _pointer(dweight),
            _pointer(dbias),
            _pointer(weight),
            _pointer(bias),
            mean.data_ptr(),
            var.data_ptr(),
            eps,
            *_two(activation_args),
            bits - (1 << 64) if bits >> 63 else bits,  # as a signed number
            *_ends(xs, pieces),
            *_pointers(xs, pieces),
            *_pointers(dxs, pieces),
            *_pointers(totals, pieces),
            float(layout.outer * layout.inner),
            scratch.data_ptr(),
            arrivals,
            *plan.geometry.parameters,
        )

    def add_statistics_gradient(self, dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, layout: Layout) -> None:
        op = "add_statistics_gradient"
        plan = self._plan(op, op, x, layout, _alignment(dx, x))
        plan.launch(dx.data_ptr(), x.data_ptr(), mean.data_ptr(), total.data_ptr(), *plan.geometry.parameters)

    def inplace_abn_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        var: Tensor,
        eps: float,
        batch_statistics: bool,
        activation: str,
        activation_args: Sequence[float],
        layout: Layout,
    ) -> None:
        site = [_pointer(weight), _pointer(bias), 0, var.data_ptr(), eps, *_two(activation_args)]
        call = _Backward(grad, None, z, None, None, var, site, batch_statistics, activation, layout)
        self._backward("inplace_abn_backward", call, dx, None, dweight, dbias)

    def running_stats(self, running: Running, mean: Tensor, var: Tensor, count: int) -> None:
        channels = mean.numel()
        key = "running_stats", mean.dtype, mean.device.index, channels
        plan = self._plans.get(key)
        if plan is None:
            variant = Variant("running_stats", (("NORMPASS_STORAGE", _STORAGE[mean.dtype]),))
            grid = -(-channels // THREADS), 1
            launch = self._device.kernel(variant, "running_stats", grid, THREADS, mean.device.index)
            plan = self._plans[key] = _Plan(launch, Geometry(True, 1, grid[0], 1, ()))
        running_mean, running_var, *shares = _running(running, count)
        plan.launch(running_mean, running_var, mean.data_ptr(), var.data_ptr(), *shares, channels)

    def _backward(
        self,
        op: str,
        call: _Backward,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """One pass where dx needs no sums over the batch or no sums are needed at all, otherwise two."""
        through_sums = call.batch_statistics and dx is not None
        reduces = through_sums or dweight is not None or dbias is not None
        alignment = _alignment(dx, dresidual, call.grad, call.other, call.kept, call.residual)
        coefficients = 0
        if reduces:
            plan = self._backward_plan(op, "reduce", call, alignment)
            scratch, arrivals = self._scratch(plan.geometry, call.var, SUMS_FIELDS, 2 if through_sums else 0)
            coefficients = scratch.data_ptr() if through_sums else 0
            partials = scratch.data_ptr() + (2 * call.layout.channels * scratch.element_size() if through_sums else 0)
            plan.launch(
                *(0 if through_sums else _pointer(dx), _pointer(dresidual), _pointer(dweight), _pointer(dbias)),
                coefficients,
                *call.pointers(),
                float(call.layout.outer * call.layout.inner),
                partials,
                arrivals,
                *plan.geometry.parameters,
            )
            if not through_sums:
                return
            if dresidual is not None:  # the first pass left dy there
                call = call._replace(grad=dresidual, other=None, residual=None, mask=None, activation="identity")
                dresidual = None
        plan = self._backward_plan(op, "apply", call, alignment)
        outputs = _pointer(dx), _pointer(dresidual), 0, 0, coefficients
        plan.launch(*outputs, *call.pointers(), *plan.geometry.parameters)

    def _backward_plan(self, op: str, entry: str, call: _Backward, alignment: int) -> _Plan:
        join, parts = Join(call.residual is not None, call.mask is not None), 1 if call.other is None else 2
        return self._plan(op, entry, call.kept, call.layout, alignment, call.activation, join, parts=parts)

    def _plan(
        self,
        op: str,
        entry: str,
        x: Tensor,
        layout: Layout,
        alignment: int,
        activation: str = "",
        join: Join = ALONE,
        pieces: int = 0,
        parts: int = 1,
    ) -> _Plan:
        key = op, entry, x.dtype, x.device.index, layout, alignment, activation, join, pieces, parts
        plan = self._plans.get(key)
        if plan is None:
            size, multiprocessors = x.element_size(), self._device.multiprocessors(x.device.index)
            group = BITS // vector_of(layout, size, alignment) if join.masked and op == "norm_act" else 1
            shape = geometry(layout, size, alignment, multiprocessors, group)
            variant = variant_of(op, x.dtype, shape, activation, join, pieces, parts)
            grid = shape.tiles, shape.slabs
            launch = self._device.kernel(variant, entry, grid, THREADS, x.device.index)
            plan = self._plans[key] = _Plan(launch, shape)
        return plan

    def _scratch(self, shape: Geometry, like: Tensor, fields: int, more: int = 0) -> tuple[Tensor, int]:
        """`more` numbers a channel, then the accumulators of every slab; and the counters, 0 for a single slab."""
        several = shape.slabs > 1
        channels = shape.parameters[0]
        scratch = like.new_empty((more + (fields * shape.slabs if several else 0)) * channels)
        return scratch, self._device.arrivals(like.get_device(), shape.tiles) if several else 0


class _Backward(NamedTuple):
    """What a gradient is computed from. `site` ends the kernels' pointers and begins their numbers."""

    grad: Tensor
    other: Tensor | None
    kept: Tensor
    residual: Tensor | None
    mask: Tensor | None
    var: Tensor
    site: list[float]
    batch_statistics: bool
    activation: str
    layout: Layout

    def pointers(self) -> tuple[float, ...]:
        kept = self.kept.data_ptr(), _pointer(self.residual), _pointer(self.mask)
        return self.grad.data_ptr(), _pointer(self.other), *kept, *self.site


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
    macros = {"STORAGE": _STORAGE[dtype], "VECTOR": str(shape.vector), "ROWS": str(shape.rows).lower()}
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


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameters(norm: InputNorm | None) -> tuple[float, ...]:
    if norm is None:
        return 0, 0, 0, 0, 0.0
    return _pointer(norm.weight), _pointer(norm.bias), norm.mean.data_ptr(), norm.var.data_ptr(), norm.eps


def _aligned(t: Tensor) -> Tensor:
    """A tensor that 16 divides the address of."""
    return t.clone() if t.data_ptr() % 16 else t


def _alignment(*tensors: Tensor | None) -> int:
    """The largest power of two, up to 16 bytes, that divides every address."""
    together = 16
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return together & -together


def _alignment_of_pieces(xs: Sequence[Tensor], layout: Layout, *others: Tensor | None) -> int:
    """As `_alignment`; where channels lie side by side, a vector must not reach from one piece into the next."""
    alignment = _alignment(*xs, *others)
    if layout.inner == 1:
        for x in xs:
            alignment |= x.shape[1] * x.element_size()
    return alignment & -alignment


def _pieces(xs: Sequence[Tensor]) -> int:
    """The smallest of `PIECES` that will do."""
    return next(count for count in PIECES if count >= len(xs))


def _ends(xs: Sequence[Tensor], pieces: int) -> list[int]:
    """Behind which channel each piece ends; beyond all of them those that are not there."""
    ends = list(itertools.accumulate([x.shape[1] for x in xs]))
    return ends + [1 << 62] * (pieces - len(xs))


def _pointers(tensors: Sequence[Tensor | None], pieces: int) -> list[int]:
    return [_pointer(t) for t in tensors] + [0] * (pieces - len(tensors))


def _two(args: Sequence[float]) -> tuple[float, float]:
    first, second, *_ = *args, 0.0, 0.0
    return float(first), float(second)


def _running(running: Running | None, count: int) -> tuple[int, int, float, float]:
    """Pointers, the share of the new mean and that of the new biased variance, which becomes unbiased."""
    if running is None:
        return 0, 0, 0.0, 0.0
    share = running.momentum * count / max(count - 1, 1)
    return running.mean.data_ptr(), running.var.data_ptr(), float(running.momentum), share
