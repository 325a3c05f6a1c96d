"""A norm with a PReLU behind it: z = y above 0 and slope·y below, y = norm(x); keeps its input for backward.

As `norm_act` and `group_norm_act` with a leaky ReLU whose slope is a parameter, one number or one for each channel
(He et al. 2015). From g = dL/dz, with y made again by the code of forward:

    dy = g where y > 0, else slope·g        dslope = Σ g·y over all y that are not above 0

An autograd function and no operator of `torch.ops`: it runs in eager mode alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Norm

from .eager import eager_device, gradients_of, no_gradients
from .group_norm_act import GroupNormOptions, format_of, groups_of, result_format
from .layout import memory_format_of, new_result, statistics_dtype
from .norm_act_backward import norm_act_formula
from .operands import Values, dense, in_dtype_of, layout_of, new_like, new_per_channel, norm_operand
from .sample_norm import Moments, new_moments

Vector = Tensor | None
PLACEHOLDER = "leaky_relu", (0.0,)
"""the activation in whose place there is a slope"""


class Call(Protocol):
    """What belongs to a call and is no tensor, and what is computed with it."""

    def computed(self, device: str, x: Tensor, values: Values, slope: Tensor, is_given: bool) -> Tensor:
        """z; the moments of x are written to where `values` have them, or given."""

    def new_moments(self, x: Tensor) -> Moments:
        """Memory for the moments of x."""

    def write_gradients(
        self, device: str, to: Sequence[Vector], grad: Tensor, x: Tensor, values: Values, slope: Tensor
    ) -> None:
        """To dx, dweight, dbias and dslope, None for what is not needed. slope: (C,)."""

    def format_of_gradient(self, x: Tensor) -> torch.memory_format:
        """In which dx is dense."""

    def formula(self, x: Tensor, values: Values) -> Tensor:
        """y in differentiable operations."""


@dataclass(slots=True)  # no tuple: recipes look for tensors in those
class BatchNormCall:
    """Statistics over samples, which are given."""

    eps: float
    batch_statistics: bool
    """whether they are x's own, and its gradient goes through them"""

    def _norm(self, values: Values, x: Tensor, slope: Tensor) -> Norm:
        return norm_operand(values, (self.eps, self.batch_statistics, *PLACEHOLDER), statistics_dtype(x), slope)

    def computed(self, device: str, x: Tensor, values: Values, slope: Tensor, is_given: bool) -> Tensor:
        z, memory_format = new_result(x, PLACEHOLDER[0]), memory_format_of(x)
        norm, layout = self._norm(values, x, slope), layout_of(x, memory_format)
        _kernels(device).norm_act(z, dense(x, memory_format), None, norm, layout)
        return z

    def new_moments(self, x: Tensor) -> Moments:
        raise AssertionError("the statistics of a batch norm are given")

    def write_gradients(
        self, device: str, to: Sequence[Vector], grad: Tensor, x: Tensor, values: Values, slope: Tensor
    ) -> None:
        memory_format = memory_format_of(x)
        dx, dweight, dbias, dslope = to
        operands = dense(grad, memory_format), dense(x, memory_format), None, self._norm(values, x, slope)
        layout = layout_of(x, memory_format)
        _kernels(device).norm_act_backward(
            dx, None, dweight, dbias, *operands, self.batch_statistics, layout, dslope=dslope
        )

    def format_of_gradient(self, x: Tensor) -> torch.memory_format:
        return memory_format_of(x)

    def formula(self, x: Tensor, values: Values) -> Tensor:
        weight, bias, mean, var = values
        return norm_act_formula((x, None, weight, bias), mean, var, self.eps, self.batch_statistics, "identity", ())


@dataclass(slots=True)
class GroupNormCall:
    """Statistics of each sample's groups of channels."""

    options: GroupNormOptions
    """with the placeholder for an activation"""

    def _norm(self, values: Values, x: Tensor, slope: Tensor) -> Norm:
        return norm_operand(values, (self.options.eps, True, *PLACEHOLDER), statistics_dtype(x), slope)

    def computed(self, device: str, x: Tensor, values: Values, slope: Tensor, is_given: bool) -> Tensor:
        z, memory_format = torch.empty_like(x, memory_format=result_format(x, self.options)), format_of(x, self.options)
        norm, groups = self._norm(values, x, slope), groups_of(x, self.options.groups, memory_format)
        kernels = _kernels(device).sample_norms
        assert kernels is not None  # `takes` has looked
        kernels.group_norm_act(z, dense(x, memory_format), None, norm, is_given, groups)
        return z

    def new_moments(self, x: Tensor) -> Moments:
        return new_moments(x, (x.shape[0], self.options.groups))

    def write_gradients(
        self, device: str, to: Sequence[Vector], grad: Tensor, x: Tensor, values: Values, slope: Tensor
    ) -> None:
        memory_format = format_of(x, self.options)
        dx, dweight, dbias, dslope = to
        operands = dense(grad, memory_format), dense(x, memory_format), None, self._norm(values, x, slope)
        kernels = _kernels(device).sample_norms
        assert kernels is not None
        groups = groups_of(x, self.options.groups, memory_format)
        kernels.group_norm_act_backward(dx, None, dweight, dbias, *operands, groups, dslope)

    def format_of_gradient(self, x: Tensor) -> torch.memory_format:
        return format_of(x, self.options)

    def formula(self, x: Tensor, values: Values) -> Tensor:
        return F.group_norm(x, self.options.groups, *values[:2], self.options.eps)


def takes(device: str | None, x: Any, slope: Any, are_groups: bool) -> bool:
    """Whether the kernels of a device take a PReLU of this slope behind a norm of x; both may be fake tensors."""
    kernels = None if device is None else kernels_for(device)
    if kernels is None or not kernels.takes_slopes or (are_groups and kernels.sample_norms is None):
        return False
    fits = slope.dim() == 1 and slope.numel() in (1, x.shape[1]) and slope.dtype == x.dtype
    return bool(fits and slope.device == x.device and kernels.supports(x.dtype))


class NormPrelu(torch.autograd.Function):
    """z and the statistics, which have no gradient: it is inside that of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Vector,
        bias: Vector,
        slope: Tensor,
        mean: Vector,
        var: Vector,
        device: str,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        is_given = mean is not None
        z, mean, var = _computed(device, call, x, (weight, bias), slope, mean, var)
        ctx.device, ctx.call = device, call
        ctx.save_for_backward(x, weight, bias, slope, mean, var)
        if is_given:
            mean, var = mean.view_as(mean), var.view_as(var)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Vector, ...]:
        if grad is None:
            return no_gradients(ctx)
        needs = ctx.needs_input_grad[:4]
        x, weight, bias, slope, mean, var = ctx.saved_tensors
        is_switched_off = kernels_for(ctx.device) is None
        if torch.is_grad_enabled() or is_switched_off:
            formula = functools.partial(_formula, ctx.call, mean, var)
            found = gradients_of(formula, (x, weight, bias, slope), grad, needs)
        else:
            found = _gradients(ctx.device, ctx.call, grad, x, (weight, bias, mean, var), slope, needs)
        return *found, *[None] * 4


def norm_prelu_on(
    device: str,
    x: Tensor,
    weight: Vector,
    bias: Vector,
    slope: Tensor,
    mean: Vector,
    var: Vector,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, and the mean and the biased variance.

    Args:
        device: whose kernels take these (`takes`).
        x: (N, C, *), floating, not empty.
        weight, bias: None or (C,).
        slope: (C,) or (1,), in the dtype of x.
        mean, var: the statistics; None where groups have theirs computed.
    """
    if torch.is_grad_enabled():
        z, mean, var = NormPrelu.apply(x, weight, bias, slope, mean, var, device, call)
        return z, mean, var
    return _computed(device, call, x, (weight, bias), slope, mean, var)


def rebuild_norm_prelu(
    x: Tensor, weight: Vector, bias: Vector, slope: Tensor, mean: Tensor, var: Tensor, call: Call
) -> Tensor:
    """z again, bit for bit: what a recipe calls."""
    device = eager_device(x, slope)
    if device is None or not takes(device, x, slope, isinstance(call, GroupNormCall)):  # switched off meanwhile
        return _formula(call, mean, var, x, weight, bias, slope)
    return norm_prelu_on(device, x, weight, bias, slope, mean, var, call)[0]


def _formula(call: Call, mean: Tensor, var: Tensor, x: Tensor, weight: Vector, bias: Vector, slope: Tensor) -> Tensor:
    """z in differentiable operations."""
    return F.prelu(call.formula(x, (weight, bias, mean, var)), slope)


def _kernels(device: str) -> Any:
    return kernels_for(device)


def _computed(
    device: str, call: Call, x: Tensor, affine: tuple[Vector, Vector], slope: Tensor, mean: Vector, var: Vector
) -> tuple[Tensor, Tensor, Tensor]:
    is_given = mean is not None and var is not None
    moments = (mean, var) if mean is not None and var is not None else call.new_moments(x)
    mean, var = moments
    return call.computed(device, x, (*affine, mean, var), _spread(slope, x), is_given), mean, var


def _spread(slope: Tensor, x: Tensor) -> Tensor:
    return slope.expand(x.shape[1])


def _gradients(
    device: str, call: Call, grad: Tensor, x: Tensor, values: Values, slope: Tensor, needs: Sequence[bool]
) -> list[Vector]:
    weight, bias, _, _ = values
    spread, dtype = _spread(slope, x), statistics_dtype(x)
    dx = new_like(x, call.format_of_gradient(x), needs[0])
    dweight, dbias = new_per_channel(weight, dtype, needs[1]), new_per_channel(bias, dtype, needs[2])
    dslope = new_per_channel(spread, dtype, needs[3])
    call.write_gradients(device, (dx, dweight, dbias, dslope), grad, x, values, spread)
    if dslope is not None and slope.numel() == 1:
        dslope = dslope.sum(0, keepdim=True)
    return [dx, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias), in_dtype_of(slope, dslope)]
