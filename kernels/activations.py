"""The activations that can stand behind a norm: value, derivative and inverse of each, in one table.

Every entry calls the ATen function that eager mode calls, so a fused site gives eager's numbers. A derivative
is taken from the activation's input y, except where eager takes it from the output (sigmoid, tanh). An
inverse exists where the function is strictly monotonic; the rest of the line of ELU-like functions approaches
a floor, where the inverse is clamped to stay finite. `include/activation.h` has the same functions for the kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class TwoSlopes:
    """A derivative that is one of two numbers: one bit says which, and backward need not know y."""

    passes: Callable[..., Tensor]
    """(y, *args): where the gradient passes as it is"""
    below: Callable[..., Tensor]
    """(grad, *args): what is left of it elsewhere"""


@dataclass(frozen=True)
class Rule:
    """One activation. Every function takes the tensor(s) first, then the activation's arguments."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    """(grad, y, *args), or (grad, z, *args) where `backward_reads_output`."""
    arguments: tuple[str, ...] = ()
    forward_: Callable[..., Tensor] | None = None
    """`forward` written over its input, where ATen has it."""
    inverse: Callable[..., Tensor] | None = None
    inverse_exists: Callable[..., bool] = lambda *args: True
    backward_reads_output: bool = False
    constraint: tuple[str, Callable[..., bool]] = ("", lambda *args: True)
    """What the arguments must satisfy: in words, and as a predicate."""
    two_slopes: TwoSlopes | None = None


def _elu_inverse(z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    floor = torch.finfo(z.dtype).eps - 1  # z = −scale·alpha is reached only by rounding: log1p(−1) is −inf
    negative = (z / (scale * alpha)).clamp_(floor, 0).log1p_().div_(input_scale)
    return negative.add_(z.clamp(min=0), alpha=1 / scale)  # one of the two is 0


@torch.no_grad()
def _softsign_backward(grad: Tensor, y: Tensor) -> Tensor:
    """grad/d − grad·|y|/d², d = 1 + |y|, rounded as autograd rounds the quotient's."""
    divisor = y.abs().add_(1)
    through_divisor = (y / divisor).div_(divisor).abs_().mul_(grad)
    return torch.div(grad, divisor, out=divisor).sub_(through_divisor)


def _log_sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    """With exp(−|y|) as forward keeps it on a CPU."""
    return aten.log_sigmoid_backward(grad, y, aten.log_sigmoid_forward(y)[1])


@torch.no_grad()
def _tanhshrink_backward(grad: Tensor, y: Tensor) -> Tensor:
    through_tanh = aten.tanh_backward(grad, torch.tanh(y))
    return torch.sub(grad, through_tanh, out=through_tanh)


@torch.no_grad()
def _squared_relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    scaled = F.relu(y).mul_(2).mul_(grad)
    return aten.threshold_backward.grad_input(scaled, y, 0, grad_input=scaled)


def _clamp(y: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(y, *_bounds(low, high))


def _clamp_(y: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp_(y, *_bounds(low, high))


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    """An infinite bound is none: ATen lets no gradient through where y is such a bound."""
    return None if low == -math.inf else low, None if high == math.inf else high


def _has_bound(low: float, high: float) -> bool:
    return math.isfinite(low) or math.isfinite(high)


def _is_within(y: Tensor, low: float, high: float) -> Tensor:
    return (y >= low).logical_and_(y <= high)


def _is_inside(y: Tensor, low: float, high: float) -> Tensor:
    above = y > low if low > -math.inf else ~y.isnan()
    return above.logical_and_(y < high) if high < math.inf else above


def _none(grad: Tensor, *args: float) -> Tensor:
    return torch.zeros_like(grad)


RULES: dict[str, Rule] = {
    "identity": Rule(
        forward=lambda y: y,
        forward_=lambda y: y,
        backward=lambda g, y: g,
        inverse=lambda z: z,
    ),
    "relu": Rule(
        forward=F.relu,
        forward_=torch.relu_,
        backward=lambda g, y: aten.threshold_backward(g, y, 0),
        two_slopes=TwoSlopes(lambda y: ~(y <= 0), torch.zeros_like),
    ),
    "hardtanh": Rule(
        arguments=("min", "max"),
        forward=F.hardtanh,
        forward_=aten.hardtanh_,
        backward=aten.hardtanh_backward,
        constraint=("min <= max", lambda low, high: low <= high),
        two_slopes=TwoSlopes(lambda y, low, high: ~((y <= low) | (y >= high)), _none),
    ),
    "leaky_relu": Rule(
        arguments=("slope",),
        forward=F.leaky_relu,
        forward_=aten.leaky_relu_,
        backward=lambda g, y, slope: aten.leaky_relu_backward(g, y, slope, False),
        inverse=lambda z, slope: F.leaky_relu(z, 1 / slope),
        inverse_exists=lambda slope: slope > 0,
        two_slopes=TwoSlopes(lambda y, slope: y > 0, lambda g, slope: g * slope),
    ),
    "elu": Rule(
        arguments=("alpha",),
        forward=F.elu,
        forward_=aten.elu_,
        backward=lambda g, y, alpha: aten.elu_backward(g, alpha, 1, 1, False, y),
        inverse=lambda z, alpha: _elu_inverse(z, alpha, 1, 1),
        inverse_exists=lambda alpha: alpha > 0,
    ),
    "selu": Rule(
        forward=F.selu,
        forward_=torch.selu_,
        backward=lambda g, y: aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1, False, y),
        inverse=lambda z: _elu_inverse(z, SELU_ALPHA, SELU_SCALE, 1),
    ),
    "celu": Rule(
        arguments=("alpha",),
        forward=F.celu,
        forward_=torch.celu_,
        backward=lambda g, y, alpha: aten.elu_backward(g, alpha, 1, 1 / alpha, False, y),
        inverse=lambda z, alpha: _elu_inverse(z, alpha, 1, 1 / alpha),
        inverse_exists=lambda alpha: alpha > 0,
        constraint=("alpha != 0", lambda alpha: alpha != 0),
    ),
    "silu": Rule(forward=F.silu, forward_=aten.silu_, backward=aten.silu_backward),
    "gelu": Rule(forward=F.gelu, forward_=aten.gelu_, backward=aten.gelu_backward),
    "gelu_tanh": Rule(
        forward=lambda y: F.gelu(y, approximate="tanh"),
        forward_=lambda y: aten.gelu_(y, approximate="tanh"),
        backward=lambda g, y: aten.gelu_backward(g, y, approximate="tanh"),
    ),
    "hardswish": Rule(forward=F.hardswish, forward_=aten.hardswish_, backward=aten.hardswish_backward),
    "hardsigmoid": Rule(forward=F.hardsigmoid, forward_=aten.hardsigmoid_, backward=aten.hardsigmoid_backward),
    "sigmoid": Rule(
        forward=torch.sigmoid,
        forward_=torch.sigmoid_,
        backward=aten.sigmoid_backward,
        backward_reads_output=True,
    ),
    "tanh": Rule(forward=torch.tanh, forward_=torch.tanh_, backward=aten.tanh_backward, backward_reads_output=True),
    "softplus": Rule(
        arguments=("beta", "threshold"),
        forward=F.softplus,
        backward=aten.softplus_backward,
        constraint=("beta > 0", lambda beta, threshold: beta > 0),
    ),
    "mish": Rule(forward=F.mish, forward_=aten.mish_, backward=aten.mish_backward),
    "softsign": Rule(forward=F.softsign, backward=_softsign_backward),
    "log_sigmoid": Rule(forward=F.logsigmoid, backward=_log_sigmoid_backward),
    "hardshrink": Rule(
        arguments=("lambd",),
        forward=F.hardshrink,
        backward=aten.hardshrink_backward,
        two_slopes=TwoSlopes(lambda y, lambd: (y < -lambd) | (y > lambd), _none),
    ),
    "softshrink": Rule(
        arguments=("lambd",),
        forward=F.softshrink,
        backward=aten.softshrink_backward,
        constraint=("lambd >= 0", lambda lambd: lambd >= 0),
        two_slopes=TwoSlopes(lambda y, lambd: (y < -lambd) | (y > lambd), _none),
    ),
    "tanhshrink": Rule(forward=F.tanhshrink, backward=_tanhshrink_backward),
    "clamp": Rule(
        arguments=("min", "max"),
        forward=_clamp,
        forward_=_clamp_,
        constraint=("a finite bound", _has_bound),
        backward=lambda g, y, low, high: torch.where(_is_within(y, low, high), g, 0),
        two_slopes=TwoSlopes(_is_within, _none),
    ),
    "open_clamp": Rule(  # the gradient at a bound is 0
        arguments=("min", "max"),
        forward=_clamp,
        forward_=_clamp_,
        constraint=("a finite bound", _has_bound),
        backward=lambda g, y, low, high: torch.where(_is_inside(y, low, high), g, 0),
        two_slopes=TwoSlopes(_is_inside, _none),
    ),
    "threshold": Rule(
        arguments=("threshold", "value"),
        forward=F.threshold,
        forward_=aten.threshold_,
        backward=lambda g, y, threshold, value: aten.threshold_backward(g, y, threshold),
        two_slopes=TwoSlopes(lambda y, threshold, value: ~(y <= threshold), _none),
    ),
    "squared_relu": Rule(forward=lambda y: F.relu(y).square(), backward=_squared_relu_backward),
}


@functools.cache
def clamp_of_torch() -> str:
    """Which of the two clamps is `torch.clamp`: where y is one of the bounds versions of torch differ."""
    with torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        y = torch.zeros(1, device="cpu", requires_grad=True)
        (at_bound,) = torch.autograd.grad(torch.clamp(y, 0.0, 1.0), y)
    return "clamp" if at_bound.item() else "open_clamp"
