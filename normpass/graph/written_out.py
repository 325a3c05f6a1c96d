"""Activations that are written out: `y * sigmoid(y)` is SiLU, `relu(y) ** 2` the squared ReLU.

What is computed from y is followed as a polynomial in y and in functions of such polynomials, so the order of factors
and terms, and where a constant stands, make no difference:

    0.5·y·(1 + tanh(√(2/π)·(y + 0.044715·y³)))   ⇒   0.5·y + 0.5·y·tanh(0.798·y + 0.0357·y³)   ⇒   GELU

A form and its activation are the same function; they round differently, and where an infinite gradient arrives a flat
part gives 0 in the one and NaN in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normpass.graph.activations import activation_of
from normpass.graph.nodes import is_in_place_call, name_of
from normpass.ops.activation import Activation

MOST_NODES = 12
"""of a form: GELU with tanh has ten"""
MOST_TERMS = 8

Polynomial = dict[tuple[str, ...], float]
"""the factors of a term, sorted -> its coefficient"""


@dataclass(frozen=True)
class Form:
    """An activation of some node, with the nodes that compute it."""

    activation: Activation
    nodes: tuple[fx.Node, ...]
    """in order; the value of the last is the activation's"""


def forms_behind(y: fx.Node) -> Iterator[Form]:
    """The activations of y that nothing reads but what they are computed by, from the shortest."""
    values: dict[fx.Node, Polynomial] = {y: {("y",): 1.0}}
    node = y.next
    while node.op != "root" and len(values) <= MOST_NODES:
        if any(n in values for n in node.all_input_nodes):
            value = _value(node, values)
            if value is None or len(value) > MOST_TERMS:
                return
            values[node] = value
            activation = _FORMS.get(_spelled(value))
            if activation is not None and _is_closed(values, node):
                yield Form(activation, tuple(n for n in values if n is not y))
        node = node.next


def _is_closed(values: dict[fx.Node, Polynomial], out: fx.Node) -> bool:
    """Whether all that is computed is read for `out` alone, which is what everything else reads."""
    return all(user in values for n in values if n is not out for user in n.users) and not any(
        user in values for user in out.users
    )


def _value(node: fx.Node, values: dict[fx.Node, Polynomial]) -> Polynomial | None:
    """What a call computes; None for what is not followed."""
    name = name_of(node.target).removeprefix("as_first_")
    if _writes(name, node) and any(len(n.users) > 1 for n in node.args[:1] if isinstance(n, fx.Node)):
        return None  # somebody else may see it
    activation = activation_of(node)
    if activation is not None:
        given = node.args[0] if node.args else None
        return _applied(str(activation), values[given]) if isinstance(given, fx.Node) else None
    name = _IN_PLACE.get(name, name.removesuffix("_"))
    if name not in _ARITHMETIC or node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    operands = [_operand(a, values) for a in node.args]
    known = [operand for operand in operands if operand is not None]
    return _computed(name, known) if len(known) == len(operands) else None


_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow", "truediv": "div"}
_ARITHMETIC = frozenset("add sub mul div pow square neg abs erf special_erf".split())


def _writes(name: str, node: fx.Node) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or (name in _IN_PLACE and name != "truediv") or is_in_place_call(node)


def _operand(argument: object, values: dict[fx.Node, Polynomial]) -> Polynomial | None:
    if isinstance(argument, fx.Node):
        return values.get(argument)
    is_number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
    return _number(float(argument)) if is_number else None  # type: ignore[arg-type]


def _computed(name: str, operands: list[Polynomial]) -> Polynomial | None:
    first, second = operands[0], operands[1] if len(operands) > 1 else None
    if second is None:
        return _of_one(name, first)
    if name == "add":
        return _sum(first, second)
    if name == "sub":
        return _sum(first, _product(second, _number(-1.0)))
    if name == "mul":
        return _product(first, second)
    number = _as_number(second)
    if name == "div":
        return (
            _product(first, _applied("1/", second) if number is None else _number(1 / number)) if number != 0 else None
        )
    if name != "pow" or number not in (2.0, 3.0):
        return None
    square = _product(first, first)
    return square if number == 2.0 else _product(square, first)


def _of_one(name: str, of: Polynomial) -> Polynomial | None:
    if name == "neg":
        return _product(of, _number(-1.0))
    if name == "square":
        return _product(of, of)
    return _applied(name.removeprefix("special_"), of) if name in ("abs", "erf", "special_erf") else None


def _number(value: float) -> Polynomial:
    return {(): value}


def _as_number(of: Polynomial) -> float | None:
    return of[()] if set(of) == {()} else None


def _sum(first: Polynomial, second: Polynomial) -> Polynomial:
    found = dict(first)
    for factors, coefficient in second.items():
        found[factors] = found.get(factors, 0.0) + coefficient
    return found


def _product(first: Polynomial, second: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for a, m in first.items():
        for b, n in second.items():
            found = _sum(found, {tuple(sorted(a + b)): m * n})
    return found


def _applied(function: str, to: Polynomial) -> Polynomial:
    return {(f"{function}[{_spelled(to)}]",): 1.0}


def _spelled(of: Polynomial) -> str:
    """One text for each polynomial; constants that somebody wrote with ten digits are as good as exact."""
    return " + ".join(f"{of[factors]:.8g}·{'·'.join(factors)}" for factors in sorted(of))


def _known_forms() -> dict[str, Activation]:
    y: Polynomial = {("y",): 1.0}
    half, relu = _product(y, _number(0.5)), _applied("relu", y)
    cubic = _sum(y, _product(_product(y, y), _product(y, _number(0.044715))))
    inner = _product(cubic, _number(math.sqrt(2 / math.pi)))
    forms: list[tuple[Polynomial, str]] = [
        (_product(relu, relu), "squared_relu"),
        (_product(y, _applied("sigmoid", y)), "silu"),
        (_product(half, _sum(_number(1.0), _applied("erf", _product(y, _number(math.sqrt(0.5)))))), "gelu"),
        (_product(half, _sum(_number(1.0), _applied("tanh", inner))), "gelu_tanh"),
        (_product(y, _applied("tanh", _applied("softplus(1, 20)", y))), "mish"),
        (_product(y, _product(_number(1 / 6), _applied("hardtanh(0, 6)", _sum(y, _number(3.0))))), "hardswish"),
        (_product(y, _applied("hardsigmoid", y)), "hardswish"),
        (_product(y, _applied("1/", _sum(_number(1.0), _applied("abs", y)))), "softsign"),
        (_sum(y, _product(_number(-1.0), _applied("tanh", y))), "tanhshrink"),
    ]
    return {_spelled(form): Activation(name) for form, name in forms}


_FORMS = _known_forms()


def rounds_alike(form: Form, y: object) -> bool:
    """Whether the form rounds as the activation does: ATen has hardsigmoid's 1/6 as a float, in float64 too."""
    is_wide = isinstance(y, Tensor) and y.dtype == torch.float64
    return not (is_wide and any(name_of(n.target).startswith("hardsigmoid") for n in form.nodes))


def is_of_one_kind(results: Sequence[object]) -> bool:
    """Whether the values of y and of the nodes of a form have one dtype and shape: autocast changes some."""
    tensors = [r for r in results if isinstance(r, Tensor)]
    first = tensors[0]
    return len(tensors) == len(results) and all(t.dtype == first.dtype and t.shape == first.shape for t in tensors)


__all__ = ["Form", "forms_behind", "is_of_one_kind", "rounds_alike"]
