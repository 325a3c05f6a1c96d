"""An activation by name: its value, derivative and inverse, as `normpass.kernels.activations` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normpass.kernels.activations import RULES as RULES
from normpass.kernels.activations import Rule


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
