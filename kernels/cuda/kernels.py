"""The GPU's kernels: CUDA C++ from `cuda/*.cu`, compiled by NVRTC when they are first needed.

Here is what happens on the host: which arguments, which passes, which scratch memory; `plans.py` says which
instantiation runs. The GPU itself is a `Device`, so that the tests run this same code with one that executes the
sources on the CPU. Every microsecond here is paid at every call: addresses are asked for once, plans are looked up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import Layout, Norm, Running
from normpass.kernels.cuda.plans import ALONE, STORAGE, Device, Join, Plans, pointer, site_arguments
from normpass.kernels.cuda.sample_norms import CudaSampleNorms

PIECES = (16, 64)
"""How many pieces of a concatenation the kernels are compiled for."""

MOMENTS_FIELDS, SUMS_FIELDS = 3, 2
"""Numbers in one accumulator of `cuda/moments.cu` and of `cuda/backward.cuh`."""


class CudaKernels:
    """The `Kernels` of CUDA devices that norms need; a kernel that cannot run is a `CudaError`, nothing written."""

    most_pieces = PIECES[-1]
    adds_gradients = normalizes_residuals = True
    takes_slopes = False
    masks = frozenset(name for name, rule in RULES.items() if rule.two_slopes is not None)

    def __init__(self, device: Device):
        self._plans = Plans(device)
        self.sample_norms = CudaSampleNorms(self._plans, self.moments)

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in STORAGE

    def moments(self, mean: Tensor, var: Tensor, x: Tensor, layout: Layout, running: Running | None = None) -> None:
        address = x.data_ptr()
        plan = self._plans.find("moments", "moments", x, layout, address)
        scratch, arrivals = self._plans.scratch(plan, var, MOMENTS_FIELDS)
        plan.launch(
            address,
            mean.data_ptr(),
            var.data_ptr(),
            *_running(running, layout.outer * layout.inner),
            scratch.data_ptr(),
            arrivals,
            *plan.grid,
        )

    def norm_act(
        self,
        z: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        layout: Layout,
        mask: Tensor | None = None,
        of_residual: Norm | None = None,
    ) -> None:
        to, source, added = z.data_ptr(), x.data_ptr(), 0 if residual is None else residual.data_ptr()
        join = ALONE if residual is None else _JOINS[mask is not None, of_residual is not None]
        plan = self._plans.find("norm_act", "norm_act", x, layout, to | source | added, norm.activation, join)
        plan.launch(
            to,
            source,
            added,
            pointer(mask),
            *site_arguments(norm),
            *(_NO_NORM if of_residual is None else site_arguments(of_residual)[:5]),
            *plan.grid,
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
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
        other: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if norm.activation == "identity":
            residual = None  # it has no part in act'
        if mask is not None:  # is read by the vectors that it was written by
            grad, x, other = _aligned(grad), _aligned(x), other if other is None else _aligned(other)
        outputs, through_sums = (dx, dresidual, dweight, dbias), batch_statistics and dx is not None
        self._backward("norm_act_backward", outputs, grad, other, x, residual, mask, norm, through_sums, layout)

    def cat_norm_act(
        self,
        z: Tensor,
        xs: Sequence[Tensor],
        norm: Norm,
        layout: Layout,
    ) -> None:
        pieces, addresses = _pieces(xs), _addresses_of_pieces(xs, layout, z)
        plan = self._plans.find("cat_norm_act", "cat_norm_act", z, layout, addresses, norm.activation, pieces=pieces)
        plan.launch(
            z.data_ptr(),
            *site_arguments(norm),
            *_ends(xs, pieces),
            *_pointers(xs, pieces),
            *plan.grid,
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
        norm: Norm,
        layout: Layout,
    ) -> None:
        op, pieces, addresses = "cat_norm_act_backward", _pieces(xs), _addresses_of_pieces(xs, layout, grad, *dxs)
        plan = self._plans.find(op, op, grad, layout, addresses, norm.activation, pieces=pieces)
        scratch, arrivals = self._plans.scratch(plan, norm.var, SUMS_FIELDS)
        bits = sum([1 << p for p, add in enumerate(adds) if add])
        plan.launch(
            grad.data_ptr(),
            pointer(dweight),
            pointer(dbias),
            *site_arguments(norm),
            bits - (1 << 64) if bits >> 63 else bits,  # as a signed number
            *_ends(xs, pieces),
            *_pointers(xs, pieces),
            *_pointers(dxs, pieces),
            *_pointers(totals, pieces),
            float(layout.outer * layout.inner),
            scratch.data_ptr(),
            arrivals,
            *plan.grid,
        )

    def add_statistics_gradient(self, dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, layout: Layout) -> None:
        op = "add_statistics_gradient"
        target, source = dx.data_ptr(), x.data_ptr()
        plan = self._plans.find(op, op, x, layout, target | source)
        plan.launch(target, source, mean.data_ptr(), total.data_ptr(), *plan.grid)

    def inplace_abn_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        z: Tensor,
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
    ) -> None:
        outputs, through_sums = (dx, None, dweight, dbias), batch_statistics and dx is not None
        self._backward("inplace_abn_backward", outputs, grad, None, z, None, None, norm, through_sums, layout)

    def running_stats(self, running: Running, mean: Tensor, var: Tensor, count: int) -> None:
        plan = self._plans.of_vectors("running_stats", mean)
        running_mean, running_var, *shares = _running(running, count)
        plan.launch(running_mean, running_var, mean.data_ptr(), var.data_ptr(), *shares, *plan.grid)

    def _backward(
        self,
        op: str,
        outputs: tuple[Tensor | None, ...],
        grad: Tensor,
        other: Tensor | None,
        kept: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        norm: Norm,
        through_sums: bool,
        layout: Layout,
    ) -> None:
        """One pass where dx needs no sums over the batch or no sums are needed at all, otherwise two.

        `outputs`: dx, dresidual, dweight, dbias.
        """
        read = [0 if t is None else t.data_ptr() for t in (grad, other, kept, residual, mask)]
        dx, dresidual, dweight, dbias = [0 if t is None else t.data_ptr() for t in outputs]
        addresses = dx | dresidual | read[0] | read[1] | read[2] | read[3]
        join = ALONE if residual is None and mask is None else Join(residual is not None, mask is not None)
        parts, coefficients, activation, site = 1 if other is None else 2, 0, norm.activation, site_arguments(norm)
        if through_sums or dweight or dbias:
            plan = self._plans.find(op, "reduce", kept, layout, addresses, activation, join, parts=parts)
            scratch, arrivals = self._plans.scratch(plan, norm.var, SUMS_FIELDS, 2 if through_sums else 0)
            partials = scratch.data_ptr()
            if through_sums:
                coefficients, partials = partials, partials + 2 * layout.channels * scratch.element_size()
            sums = 0 if through_sums else dx, dresidual, dweight, dbias, coefficients
            count = float(layout.outer * layout.inner)
            plan.launch(*sums, *read, *site, count, partials, arrivals, *plan.grid)
            if not through_sums:
                return
            if dresidual:  # the first pass left dy there
                read, activation, join, parts = [dresidual, 0, read[2], 0, 0], "identity", ALONE, 1
                dresidual = 0
        plan = self._plans.find(op, "apply", kept, layout, addresses, activation, join, parts=parts)
        plan.launch(dx, dresidual, 0, 0, coefficients, *read, *site, *plan.grid)


_JOINS = {(masked, normed): Join(True, masked, normed) for masked in (False, True) for normed in (False, True)}


_NO_NORM = 0, 0, 0, 0, 0.0


def _aligned(t: Tensor) -> Tensor:
    """A tensor that 16 divides the address of."""
    return t.clone() if t.data_ptr() % 16 else t


def _addresses_of_pieces(xs: Sequence[Tensor], layout: Layout, *others: Tensor | None) -> int:
    """By bitwise or; where channels lie side by side, a vector must not reach from one piece into the next."""
    addresses = 0
    for t in (*xs, *others):
        addresses |= 0 if t is None else t.data_ptr()
    if layout.inner == 1:
        for x in xs:
            addresses |= x.shape[1] * x.element_size()
    return addresses


def _pieces(xs: Sequence[Tensor]) -> int:
    """The smallest of `PIECES` that will do."""
    return next(count for count in PIECES if count >= len(xs))


def _ends(xs: Sequence[Tensor], pieces: int) -> list[int]:
    """Behind which channel each piece ends; beyond all of them those that are not there."""
    ends = list(itertools.accumulate([x.shape[1] for x in xs]))
    return ends + [1 << 62] * (pieces - len(xs))


def _pointers(tensors: Sequence[Tensor | None], pieces: int) -> list[int]:
    return [pointer(t) for t in tensors] + [0] * (pieces - len(tensors))


def _running(running: Running | None, count: int) -> tuple[int, int, float, float]:
    """Pointers, the share of the new mean and that of the new biased variance, which becomes unbiased."""
    if running is None:
        return 0, 0, 0.0, 0.0
    share = running.momentum * count / max(count - 1, 1)
    return running.mean.data_ptr(), running.var.data_ptr(), float(running.momentum), share
