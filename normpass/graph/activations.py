"""The activations that the library knows by name, in every spelling: functions, methods, clamps and clips."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normpass.kernels.activations import clamp_of_torch
from normpass.ops.activation import Activation

# function or method -> (name, the names of its arguments that the activation needs)
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu_: ("relu", ()),
    F.relu6: ("relu6", ()),
    F.hardtanh: ("hardtanh", ("min_val", "max_val")),
    F.hardtanh_: ("hardtanh", ("min_val", "max_val")),
    F.leaky_relu: ("leaky_relu", ("negative_slope",)),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.elu: ("elu", ("alpha",)),
    F.elu_: ("elu", ("alpha",)),
    F.selu: ("selu", ()),
    F.celu: ("celu", ("alpha",)),
    F.silu: ("silu", ()),
    F.gelu: ("gelu", ("approximate",)),
    F.hardswish: ("hardswish", ()),
    F.hardsigmoid: ("hardsigmoid", ()),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    F.tanh: ("tanh", ()),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
    F.softplus: ("softplus", ("beta", "threshold")),
    F.mish: ("mish", ()),
    F.rrelu: ("rrelu", ("lower", "upper", "training")),
    torch.rrelu: ("rrelu", ("lower", "upper", "training")),
    F.softsign: ("softsign", ()),
    F.logsigmoid: ("log_sigmoid", ()),
    F.hardshrink: ("hardshrink", ("lambd",)),
    torch.hardshrink: ("hardshrink", ("lambd",)),
    F.softshrink: ("softshrink", ("lambd",)),
    F.tanhshrink: ("tanhshrink", ()),
    F.threshold: ("threshold", ("threshold", "value")),
    torch.threshold: ("threshold", ("threshold", "value")),
    torch.threshold_: ("threshold", ("threshold", "value")),
}
_ACTIVATION_METHODS = frozenset({"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"})
# method or function -> the names of its bounds
_CLAMPS: dict[Any, tuple[str, ...]] = {
    spelling: bounds
    for name, bounds in {
        "clamp": ("min", "max"),
        "clip": ("min", "max"),
        "clamp_min": ("min",),
        "clamp_max": ("max",),
    }.items()
    for method in (name, f"{name}_")
    for spelling in (method, getattr(torch, method), getattr(Tensor, method))
}
_DEFAULTS: dict[str, Any] = {
    "min_val": -1.0,
    "max_val": 1.0,
    "negative_slope": 0.01,
    "alpha": 1.0,
    "approximate": "none",
    "beta": 1.0,
    "threshold": 20.0,
    "lambd": 0.5,
    "lower": 1 / 8,
    "upper": 1 / 3,
    "training": False,
}


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that `node` applies to one tensor, in any spelling; None if it is none known."""
    if node.op not in ("call_method", "call_function") or len(node.all_input_nodes) != 1 or "out" in node.kwargs:
        return None
    if node.target in _CLAMPS:
        return _clamp_of(node, _CLAMPS[node.target])
    if node.op == "call_method":
        plain = node.target in _ACTIVATION_METHODS and len(node.args) == 1 and not node.kwargs
        return Activation(str(node.target).removesuffix("_")) if plain else None
    known = _ACTIVATIONS.get(node.target)
    if known is None:
        return None
    name, wanted = known
    arguments = _activation_arguments(node, wanted)
    if arguments is None:
        return None
    if name == "gelu":
        return Activation("gelu_tanh" if arguments == ("tanh",) else "gelu")
    if name == "relu6":
        return Activation("hardtanh", (0.0, 6.0))
    if name == "rrelu":
        lower, upper, training = arguments
        return None if training else Activation("leaky_relu", ((lower + upper) / 2,))
    return Activation(name, tuple(float(a) for a in arguments))


def _activation_arguments(node: fx.Node, wanted: tuple[str, ...]) -> tuple | None:
    """The values of `wanted`, given by name or in that order after the input; built-ins have no signature."""
    positional = dict(zip(wanted, node.args[1:], strict=False))
    values = [node.kwargs.get(name, positional.get(name, _DEFAULTS.get(name))) for name in wanted]
    return None if any(isinstance(v, fx.Node) or v is None for v in values) else tuple(values)


def _clamp_of(node: fx.Node, names: tuple[str, ...]) -> Activation | None:
    """With an infinity for a bound that is not given."""
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    low, high = given.get("min"), given.get("max")
    bounds = [bound for bound in (low, high) if bound is not None]
    if not bounds or not all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in bounds):
        return None
    return Activation(clamp_of_torch(), (-math.inf if low is None else low, math.inf if high is None else high))


__all__ = ["activation_of"]
