"""The GPU's kernels of norms whose statistics are a sample's own.

Contiguous groups and rows are one thing, runs (`runs.py`): a row is a group of channels of one value each.

    forward    one kernel takes the moments of a run and applies them; runs that are too few to keep the GPU busy are
               shared out among blocks: the moments of `moments.cu` first
    backward   of planes: sums of each channel of each sample, dx from them, dweight and dbias over the samples
               of rows: dx, a run at a time; dweight and dbias over the rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normpass.kernels.contract import Groups, Layout, Norm, Rows
from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.geometry import THREADS, Geometry, geometry_of_rows
from normpass.kernels.cuda.plans import ALONE, Join, Plan, Plans, pointer, site_arguments, variant_of
from normpass.kernels.cuda.runs import Runs, Teams, teams, teams_of_planes
from normpass.kernels.cuda.variant import Variant

SUMS_FIELDS = 2
FEW, LONG = 2, 4
"""Runs are shared out that are fewer than one for `FEW` multiprocessors, and longer than `LONG` vectors a thread."""


class Wanted(NamedTuple):
    """The gradients that are wanted."""

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


class Given(NamedTuple):
    """What they are computed from."""

    grad: Tensor
    x: Tensor
    residual: Tensor | None
    norm: Norm
    is_centred: bool


class CudaSampleNorms:
    """The `SampleNorms` of CUDA devices; a kernel that cannot run is a `CudaError`, nothing written."""

    def __init__(self, plans: Plans, moments: Callable[[Tensor, Tensor, Tensor, Layout], None]):
        self._plans, self._moments = plans, moments
        self._found: dict[tuple[object, ...], Plan] = {}
        self._shared: dict[tuple[object, ...], bool] = {}

    def group_norm_act(
        self, z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, groups: Groups
    ) -> None:
        self._forward(z, x, residual, norm, is_given, True, _runs_of(groups))

    def group_norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        groups: Groups,
    ) -> None:
        given = Given(grad, x, residual, norm, True)
        self._backward(Wanted(dx, dresidual, dweight, dbias), given, _runs_of(groups))

    def row_norm_act(self, z: Tensor, x: Tensor, norm: Norm, is_given: bool, rows: Rows) -> None:
        self._forward(z, x, None, norm, is_given, rows.is_centred, Runs(rows.rows, 1, rows.width, 1))

    def row_norm_act_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        norm: Norm,
        rows: Rows,
    ) -> None:
        given = Given(grad, x, None, norm, rows.is_centred)
        self._backward(Wanted(dx, None, dweight, dbias), given, Runs(rows.rows, 1, rows.width, 1))

    def _forward(
        self, z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, is_centred: bool, runs: Runs
    ) -> None:
        norm = _aligned(norm)
        assert norm.mean is not None
        source, added = x.data_ptr(), pointer(residual)
        addresses, activation = z.data_ptr() | source | added, norm.activation
        plan = self._of_runs("sample_norm_act", x, runs, addresses, activation, residual is not None, is_given)
        if not is_given and is_centred and self._are_shared(x, runs):
            self._moments(norm.mean, norm.var, x, Layout(1, runs.runs, runs.channels * runs.spatial))
            is_given = True
            plan = self._of_runs("sample_norm_act", x, runs, addresses, activation, residual is not None, is_given)
        plan.launch(z.data_ptr(), source, added, *site_arguments(norm), is_given, is_centred, *plan.grid)

    def _are_shared(self, x: Tensor, runs: Runs) -> bool:
        """Whether runs are so few and so long that one block for each would leave the GPU idle."""
        key = runs, x.dtype, x.get_device()
        found = self._shared.get(key)
        if found is None:
            few = runs.runs * FEW <= self._plans.device.multiprocessors(x.get_device())
            long = runs.channels * runs.spatial > THREADS * 16 // x.element_size() * LONG
            found = self._shared[key] = few and long
        return found

    def _backward(self, wanted: Wanted, given: Given, runs: Runs) -> None:
        if given.norm.activation == "identity":
            given = given._replace(residual=None)  # it has no part in act'
        given = given._replace(norm=_aligned(given.norm))
        is_planes, of_parameters = runs.spatial > 1, wanted.dweight is not None or wanted.dbias is not None
        sums = None
        if is_planes and (wanted.dx is not None or of_parameters):
            sums = given.norm.var.new_empty(2 * runs.runs * runs.channels)
            self._launch("plane_sums", wanted, sums, given, runs)
        if wanted.dx is not None or wanted.dresidual is not None:
            self._launch("gradients", wanted, sums, given, runs)
        if of_parameters and sums is not None:
            self._over_samples(wanted, sums, runs)
        elif of_parameters:
            self._over_rows(wanted, given, runs)

    def _launch(self, entry: str, wanted: Wanted, sums: Tensor | None, given: Given, runs: Runs) -> None:
        grad, x, residual, norm, is_centred = given
        read = grad.data_ptr(), x.data_ptr(), pointer(residual)
        dx, dresidual = pointer(wanted.dx), pointer(wanted.dresidual)
        addresses, is_shared = dx | dresidual | read[0] | read[1] | read[2], runs.spatial > 1
        plan = self._of_runs(entry, x, runs, addresses, norm.activation, residual is not None, is_shared)
        plan.launch(dx, dresidual, pointer(sums), *read, *site_arguments(norm), is_centred, *plan.grid)

    def _over_samples(self, wanted: Wanted, sums: Tensor, runs: Runs) -> None:
        channels = runs.groups * runs.channels
        plan = self._of_rows("over_samples", sums, runs.runs // runs.groups, channels, channels, 0)
        scratch, arrivals = self._plans.scratch(plan, sums, SUMS_FIELDS)
        dweight, dbias = pointer(wanted.dweight), pointer(wanted.dbias)
        plan.launch(dweight, dbias, sums.data_ptr(), scratch.data_ptr(), arrivals, *plan.grid)

    def _over_rows(self, wanted: Wanted, given: Given, runs: Runs) -> None:
        grad, x, residual, norm, _ = given
        read = grad.data_ptr(), x.data_ptr(), pointer(residual)
        addresses, join = read[0] | read[1] | read[2], ALONE if residual is None else Join(True)
        samples, channels = runs.runs // runs.groups, runs.groups * runs.channels
        plan = self._of_rows("over_rows", x, samples, channels, runs.channels, addresses, norm.activation, join)
        scratch, arrivals = self._plans.scratch(plan, norm.var, SUMS_FIELDS)
        dweight, dbias = pointer(wanted.dweight), pointer(wanted.dbias)
        of_groups, partials = (runs.groups, runs.channels), scratch.data_ptr()
        plan.launch(dweight, dbias, *read, *site_arguments(norm), *of_groups, partials, arrivals, *plan.grid)

    def _of_runs(
        self, entry: str, x: Tensor, runs: Runs, addresses: int, activation: str, residual: bool, is_shared: bool
    ) -> Plan:
        alignment, index = addresses & 15, x.get_device()
        key = entry, x.dtype, index, runs, alignment, activation, residual, is_shared
        plan = self._found.get(key)
        if plan is None:
            device, divisor = self._plans.device, (alignment | 16) & -(alignment | 16)
            shape = teams_of_planes if entry == "plane_sums" else teams
            shared = shape(runs, x.element_size(), divisor, device.multiprocessors(index), is_shared)
            variant = variant_of_runs(entry, x.dtype, shared, runs, activation, residual)
            launch = device.kernel(variant, entry, (shared.blocks, shared.parts), shared.threads, index)
            plan = self._found[key] = Plan(launch, shared.parameters, runs.runs, 0, 1)
        return plan

    def _of_rows(
        self,
        op: str,
        x: Tensor,
        rows: int,
        channels: int,
        together: int,
        addresses: int,
        activation: str = "",
        join: Join = ALONE,
    ) -> Plan:
        """A kernel that sums over rows. `together`: channels that a vector must divide."""
        alignment, index = addresses & 15, x.get_device()
        key = op, x.dtype, index, rows, channels, together, alignment, activation, join
        plan = self._found.get(key)
        if plan is None:
            device, vector = self._plans.device, max(((alignment | 16) & -(alignment | 16)) // x.element_size(), 1)
            while together % vector:
                vector //= 2
            shape = geometry_of_rows(rows, channels, vector, device.multiprocessors(index))
            launch = device.kernel(
                variant_of(op, x.dtype, shape, activation, join), op, (shape.tiles, shape.slabs), THREADS, index
            )
            plan = self._found[key] = Plan(launch, shape.parameters, channels, shape.tiles, shape.slabs)
        return plan


def variant_of_runs(
    entry: str, dtype: torch.dtype, shape: Teams, runs: Runs, activation: str, residual: bool
) -> Variant:
    """The instantiation of the file of `entry` for one dtype, shape and activation."""
    source = "sample_norm_act" if entry == "sample_norm_act" else "sample_norm_act_backward"
    as_rows = Geometry(runs.spatial == 1, shape.vector, 0, 0, ())
    variant = variant_of(source, dtype, as_rows, activation, Join(residual) if residual else ALONE)
    return Variant(source, (*variant.macros, ("NORMPASS_TEAM", str(shape.team))))


def _runs_of(groups: Groups) -> Runs:
    samples, count, channels, spatial, is_rows = groups
    if is_rows and spatial > 1:
        raise CudaError("groups of channels that lie side by side (channels_last) have no kernel")
    return Runs(samples * count, count, channels // count, spatial)


def _aligned(norm: Norm) -> Norm:
    """The norm with a weight and a bias that vectors of 16 bytes may be read from."""
    weight, bias = norm.weight, norm.bias
    if (pointer(weight) | pointer(bias)) % 16 == 0:
        return norm
    return norm._replace(weight=_copy(weight), bias=_copy(bias))


def _copy(t: Tensor | None) -> Tensor | None:
    return t.clone() if t is not None and t.data_ptr() % 16 else t
