"""The activations that can stand behind a norm: value, derivative and inverse of each, in one table.

Every entry calls the ATen function that eager mode calls, so a fused site gives eager's numbers. A derivative
is taken from the activation's input y, except where eager takes it from the output (sigmoid, tanh). An
inverse exists where the function is strictly monotonic; the rest of the line of ELU-like functions approaches
a floor, where the inverse is clamped to stay finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


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


def _elu_inverse(z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    floor = torch.finfo(z.dtype).eps - 1  # z = −scale·alpha is reached only by rounding: log1p(−1) is −inf
    negative = (z / (scale * alpha)).clamp_(floor, 0).log1p_().div_(input_scale)
    return negative.add_(z.clamp(min=0), alpha=1 / scale)  # one of the two is 0


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
    ),
    "hardtanh": Rule(
        arguments=("min", "max"),
        forward=F.hardtanh,
        forward_=aten.hardtanh_,
        backward=aten.hardtanh_backward,
        constraint=("min <= max", lambda low, high: low <= high),
    ),
    "leaky_relu": Rule(
        arguments=("slope",),
        forward=F.leaky_relu,
        forward_=aten.leaky_relu_,
        backward=lambda g, y, slope: aten.leaky_relu_backward(g, y, slope, False),
        inverse=lambda z, slope: F.leaky_relu(z, 1 / slope),
        inverse_exists=lambda slope: slope > 0,
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
}


@dataclass(frozen=True)
class Activation:
    """An activation by name and arguments: `Activation("leaky_relu", (0.01,))`; ReLU6 is hardtanh(0, 6).

    Raises ValueError for an unknown name, a wrong number of arguments or a value outside the function's
    domain.
    """

    name: str
    args: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        args = tuple(float(arg) for arg in self.args)
        object.__setattr__(self, "args", args)
        words, holds = rule_for("Activation", self.name, args).constraint
        if not holds(*args):
            raise ValueError(f"Activation: `{self.name}` needs {words}, got {_spell(self.name, args)}")

    def __str__(self) -> str:
        return _spell(self.name, self.args)

    @property
    def invertible(self) -> bool:
        """Whether y can be had back from z = act(y): what in-place ABN needs."""
        return is_invertible(self.name, self.args)


def rule_for(where: str, name: str, args: Sequence[float]) -> Rule:
    """The table's entry for `name`; ValueError, saying what is allowed, if `name` or `args` is wrong."""
    rule = RULES.get(name)
    if rule is None:
        raise ValueError(f"{where}: unknown activation `{name}`; allowed are {', '.join(RULES)}")
    if len(args) != len(rule.arguments):
        raise ValueError(
            f"{where}: activation `{name}` takes {len(rule.arguments)} arguments "
            f"({', '.join(rule.arguments)}), got {len(args)}: {tuple(args)}"
        )
    return rule


def is_invertible(name: str, args: Sequence[float]) -> bool:
    """Whether `name` with `args` is a strictly increasing function whose inverse is in the table."""
    rule = rule_for("is_invertible", name, args)
    return rule.inverse is not None and rule.inverse_exists(*args)


def activate(y: Tensor, name: str, args: Sequence[float]) -> Tensor:
    """z = act(y). The identity returns `y` itself."""
    return RULES[name].forward(y, *args)


def activate_(y: Tensor, name: str, args: Sequence[float]) -> Tensor:
    """z = act(y), for a `y` that the caller owns: written over it where ATen can, in `y`'s dtype."""
    rule = RULES[name]
    if rule.forward_ is not None:
        return rule.forward_(y, *args)
    return rule.forward(y, *args).to(y.dtype)  # under CUDA autocast softplus answers in float32


def activation_backward(grad: Tensor, y: Tensor, name: str, args: Sequence[float], *, owns_y: bool = False) -> Tensor:
    """dL/dy from `grad` = dL/dz and the activation's input `y`, which `owns_y=True` allows us to overwrite.

    The identity returns `grad` itself; nothing is ever written to `grad`.
    """
    rule = RULES[name]
    if rule.backward_reads_output:
        y = activate_(y, name, args) if owns_y else rule.forward(y, *args)
    return rule.backward(grad, y, *args)


def deactivate(z: Tensor, name: str, args: Sequence[float]) -> Tensor:
    """y = act⁻¹(z). ValueError if there is no inverse. The identity returns `z` itself."""
    inverse = RULES[name].inverse
    if inverse is None or not is_invertible(name, args):
        raise ValueError(f"deactivate: {_spell(name, args)} has no inverse")
    return inverse(z, *args)


def _spell(name: str, args: Sequence[Any]) -> str:
    return f"{name}({', '.join(f'{arg:g}' for arg in args)})" if args else name
