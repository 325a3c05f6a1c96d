"""Capture -> Sites: the only file that recognises a norm and what stands around it.

A *site* is one normalisation with its producer, an optional residual input, its activation and the
consumers of the result:

    x = producer(…);  y = norm(x);  s = y + residual;  z = activation(s);  consumers(z)

A norm that cannot be rewritten at all is a site too, with the reason in `refused`.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass.capture import NORM_BASES, Capture, reason_to_keep_whole
from normpass.concatenation import dissolved, pieces_of
from normpass.functional import is_norm_act_module, is_supported_norm, sum_as_first
from normpass.graph import Storage, bound, called, module_of
from normpass.nn.kalman import KALMAN_NORMS, batch_norm_with_estimate
from normpass.nn.switchable import SWITCHABLE_NORMS, instance_norm, layer_norm, mixed_norm
from normpass.ops.activation import Activation

IDENTITY = Activation("identity")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add, sum_as_first)
CALLED_WITH_NORM = (batch_norm_with_estimate, instance_norm, layer_norm, mixed_norm)
_PASSES_ON = "its statistics are passed on to Kalman norms, and have a gradient"
_ADD_METHODS = ("add", "add_")


@dataclass(frozen=True)
class Site:
    """One normalisation with what stands around it. Nodes belong to the capture's graph."""

    path: str
    """dotted name of the norm, or the node's name for a functional one"""
    kind: str
    """class of the norm, or `F.batch_norm`"""
    norm: fx.Node
    x: fx.Node | None
    producer: str
    """what makes x: `Conv2d`, `cat`, `add`, …"""
    residual: fx.Node | None
    add: fx.Node | None
    activation: Activation
    out: fx.Node
    """the last node of norm, add, activation: its value is z"""
    written: str | None
    """the later node that changes z in place, if any"""
    gamma: torch.Tensor | None = None
    """the norm's weight, (C,), if it has one"""
    refused: str | None = None
    """why no rewrite may touch this norm"""
    cats: tuple[fx.Node, ...] = ()
    """x and the concatenations in it that only norms read (see `normpass.concatenation`); none if `not_shared`"""
    not_shared: str | None = None
    """why this norm cannot do with the pieces of a concatenation"""

    @property
    def pattern(self) -> str:
        parts = [self.producer, self.kind]
        parts += ["add"] if self.residual is not None else []
        parts += [] if self.activation.name == "identity" else [self.activation.name]
        return " → ".join(parts)

    @property
    def consumers(self) -> tuple[fx.Node, ...]:
        return tuple(self.out.users)


def find_sites(capture: Capture) -> tuple[Site, ...]:
    """Every norm of the captured graph, in order."""
    finder = _Finder(capture)
    sites = [finder.site(node) for node in capture.graph.nodes if finder.is_norm(node)]
    norms = frozenset(site.norm for site in sites if _reads_pieces(site))
    return tuple(finder.with_concatenations(site, norms) for site in sites)


def _reads_pieces(site: Site) -> bool:
    return site.refused is None and site.residual is None and site.written is None


class _Finder:
    def __init__(self, capture: Capture):
        self.root = capture.root
        self.graph = capture.graph
        self.storage = Storage(capture.graph, capture.root)
        self.calls = Counter(id(module_of(n, self.root)) for n in self.graph.nodes if n.op == "call_module")

    def is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(module_of(node, self.root), NORM_BASES)
        functions = (F.batch_norm, torch.batch_norm, F.group_norm, F.layer_norm, F.instance_norm)
        return node.target in (*CALLED_WITH_NORM, *functions)

    def site(self, norm: fx.Node) -> Site:
        module = module_of(norm, self.root)
        path = str(norm.target) if module is not None else norm.name
        kind = type(module).__name__ if module is not None else f"F.{norm.target.__name__}"
        if norm.target in CALLED_WITH_NORM:
            return self._called_with_norm(norm)
        x = input_of(norm)
        producer = self._producer(x)
        refused = self._refusal(norm, module, x)
        if refused is not None:
            return Site(path, kind, norm, x, producer, None, None, IDENTITY, norm, None, None, refused)
        add, residual = (None, None) if is_norm_act_module(module) else self._residual(norm)
        activation, out = self._activation(module, add if add is not None else norm)
        if x is not None and residual is not None and self.storage.writer_after(x, norm, until=out):
            add, residual = None, None
            activation, out = self._activation(module, norm)
        writer = self.storage.writer_after(out, out)
        written = called(writer) if writer is not None else None
        gamma = getattr(module, "weight", None)
        return Site(path, kind, norm, x, producer, residual, add, activation, out, written, gamma)

    def with_concatenations(self, site: Site, norms: frozenset[fx.Node]) -> Site:
        """The site with the concatenations that it can do without, `norms` being all that might."""
        if site.x is None or site.refused is not None:
            return site
        cats = dissolved(site.x, norms | {site.norm})
        if isinstance(cats, str):
            return replace(site, not_shared=cats)
        for piece in pieces_of(site.x, cats):
            writer = self.storage.writer_after(piece, piece)
            if writer is not None:
                reason = f"a tensor of its concatenation is changed in place later, by `{called(writer)}`"
                return replace(site, not_shared=reason)
        return replace(site, cats=cats)

    def _called_with_norm(self, norm: fx.Node) -> Site:
        """A function that a change has put in a norm's place, with the norm as its first argument."""
        path, x = str(norm.args[0].target), norm.all_input_nodes[1]
        module = self.root.get_submodule(path)
        reason = _PASSES_ON if norm.target is batch_norm_with_estimate else _has_chosen(module)
        kind = type(module).__name__
        return Site(path, kind, norm, x, self._producer(x), None, None, IDENTITY, norm, None, None, reason)

    # --- the norm itself ---

    def _refusal(self, norm: fx.Node, module: nn.Module | None, x: fx.Node | None) -> str | None:
        if x is None:
            return "it is not called with one tensor"
        if module is None:
            return self._functional_refusal(norm)
        if isinstance(module, KALMAN_NORMS):
            return "its statistics come from the norm before it too, and have a gradient"
        if isinstance(module, SWITCHABLE_NORMS) and module.chosen is None:
            return "it has not chosen yet: it computes all three norms"
        if isinstance(module, SWITCHABLE_NORMS) and module.chosen != ("batch", "batch"):
            return _has_chosen(module)
        if isinstance(module, nn.SyncBatchNorm):
            return "SyncBatchNorm is not supported yet"
        whole = reason_to_keep_whole(module)
        if whole is not None:
            return whole
        if not is_supported_norm(module):
            known = "BatchNorm1d, 2d, 3d and timm's BatchNormAct2d"
            return f"{type(module).__name__} is not one of the norms that can be rewritten ({known})"
        if is_norm_act_module(module) and _norm_act_activation(module) is None:
            return "its dropout or activation layer is not one that can be fused"
        if self.calls[id(module)] > 1:
            return f"it is called {self.calls[id(module)]} times in one forward"
        if len(norm.args) + len(norm.kwargs) != 1:
            return "it is called with more than its input"
        writer = self.storage.writer_after(x, norm)
        return f"its input is changed in place later, by `{called(writer)}`" if writer is not None else None

    def _functional_refusal(self, norm: fx.Node) -> str | None:
        if norm.target is not F.batch_norm:
            return f"{norm.target.__name__} is not a batch norm"
        arguments = bound(F.batch_norm, norm)
        if arguments is None or not isinstance(arguments["training"], bool):
            return "its `training` argument is computed"
        writer = self.storage.writer_after(arguments["input"], norm)
        return f"its input is changed in place later, by `{called(writer)}`" if writer is not None else None

    def _producer(self, x: fx.Node | None) -> str:
        if x is None:
            return "?"
        module = module_of(x, self.root)
        if module is not None:
            return type(module).__name__
        return x.op if x.op == "placeholder" else getattr(x.target, "__name__", str(x.target))

    # --- what follows ---

    def _residual(self, norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that alone uses the norm's result, and its other operand; or (None, None)."""
        if len(norm.users) != 1:
            return None, None
        add = next(iter(norm.users))
        if not is_add(add):
            return None, None
        first = add.args[0]
        residual = other_operand(add, norm)
        if residual is norm or self._is_norm_of_another_site(residual, norm):
            return None, None
        if sums_in_place(add) and add.target is not sum_as_first and first is not norm:
            return None, None  # it is the other operand that is written
        if self.storage.writer_after(residual, add) is not None:
            return None, None  # kept as the residual, it must not change later
        return add, residual

    def _is_norm_of_another_site(self, node: fx.Node, norm: fx.Node) -> bool:
        """Of two norms added to each other the later one takes the other as its residual."""
        if not self.is_norm(node) or len(node.users) != 1:
            return False
        return self.storage.position[node] > self.storage.position[norm]

    def _activation(self, module: nn.Module | None, last: fx.Node) -> tuple[Activation, fx.Node]:
        """The activation that alone uses `last`, with its node; the identity and `last` if there is none."""
        if module is not None and is_norm_act_module(module):
            return _norm_act_activation(module) or IDENTITY, last
        if len(last.users) != 1:
            return IDENTITY, last
        user = next(iter(last.users))
        activation = activation_of(user, self.root)
        return (activation, user) if activation is not None else (IDENTITY, last)


def _has_chosen(module: Any) -> str:
    return f"it has chosen the mean of {module.chosen[0]} norm and the variance of {module.chosen[1]} norm"


def is_add(node: fx.Node) -> bool:
    """Whether `node` adds two tensors, nothing else (no `alpha`, no number)."""
    spelled = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return spelled and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def other_operand(add: fx.Node, operand: fx.Node) -> fx.Node:
    """The operand of the addition that is not `operand` (itself, where both are)."""
    first, second = add.args
    other = second if first is operand else first
    assert isinstance(other, fx.Node)  # `is_add` has looked
    return other


def sums_in_place(add: fx.Node) -> bool:
    """Whether the result of an addition has its first operand's dtype, as `a += b` has."""
    return add.target in (operator.iadd, sum_as_first, "add_")


def input_of(norm: fx.Node) -> fx.Node | None:
    """The node that a norm normalises; None where it is not called with one."""
    x = norm.args[0] if norm.args else norm.kwargs.get("input")
    return x if isinstance(x, fx.Node) else None


def _norm_act_activation(module: Any) -> Activation | None:
    """The activation inside timm's `BatchNormAct2d`; None if it cannot be fused or dropout is on."""
    if type(module.drop) is not nn.Identity:
        return None
    return activation_of_module(module.act)


# --- activations ----------------------------------------------------------------------------------


def activation_of(node: fx.Node, root: nn.Module) -> Activation | None:
    """The activation that `node` applies to one tensor, in any spelling; None if it is none known."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return None if reason_to_keep_whole(module) else activation_of_module(module)
    if node.op == "call_method":
        name = str(node.target).removesuffix("_")
        plain = name in ("relu", "sigmoid", "tanh") and len(node.args) == 1 and not node.kwargs
        return Activation(name) if plain else None
    if node.op != "call_function":
        return None
    return _activation_of_function(node)


def activation_of_module(module: nn.Module) -> Activation | None:
    """The activation that a layer is; None for any other layer and for subclasses."""
    known = next((k for k in _MODULES if type(module) is k), None)
    if known is not None:
        return _MODULES[known](module)
    name = _TIMM_MODULES.get(type(module).__name__)
    return Activation(name) if name and type(module).__module__.startswith("timm.layers.") else None


_MODULES: dict[type[nn.Module], Any] = {
    nn.Identity: lambda m: IDENTITY,
    nn.ReLU: lambda m: Activation("relu"),
    nn.ReLU6: lambda m: Activation("hardtanh", (0.0, 6.0)),
    nn.Hardtanh: lambda m: Activation("hardtanh", (float(m.min_val), float(m.max_val))),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", (float(m.negative_slope),)),
    nn.ELU: lambda m: Activation("elu", (float(m.alpha),)),
    nn.SELU: lambda m: Activation("selu"),
    nn.CELU: lambda m: Activation("celu", (float(m.alpha),)),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu_tanh" if m.approximate == "tanh" else "gelu"),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Softplus: lambda m: Activation("softplus", (float(m.beta), float(m.threshold))),
    nn.Mish: lambda m: Activation("mish"),
}
_TIMM_MODULES = {"Swish": "silu", "Mish": "mish", "Sigmoid": "sigmoid", "Tanh": "tanh"}

# function -> (name, the names of its arguments that the activation needs)
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu_: ("relu", ()),
    F.relu6: ("relu6", ()),
    F.hardtanh: ("hardtanh", ("min_val", "max_val")),
    F.leaky_relu: ("leaky_relu", ("negative_slope",)),
    F.elu: ("elu", ("alpha",)),
    F.selu: ("selu", ()),
    F.celu: ("celu", ("alpha",)),
    F.silu: ("silu", ()),
    F.gelu: ("gelu", ("approximate",)),
    F.hardswish: ("hardswish", ()),
    F.hardsigmoid: ("hardsigmoid", ()),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    F.tanh: ("tanh", ()),
    torch.tanh: ("tanh", ()),
    F.softplus: ("softplus", ("beta", "threshold")),
    F.mish: ("mish", ()),
}


def _activation_of_function(node: fx.Node) -> Activation | None:
    known = _FUNCTIONS.get(node.target)
    if known is None or len(node.all_input_nodes) != 1:
        return None
    name, wanted = known
    arguments = _function_arguments(node, wanted)
    if arguments is None:
        return None
    if name == "gelu":
        return Activation("gelu_tanh" if arguments == ("tanh",) else "gelu")
    if name == "relu6":
        return Activation("hardtanh", (0.0, 6.0))
    return Activation(name, tuple(float(a) for a in arguments))


_DEFAULTS = {
    "min_val": -1.0,
    "max_val": 1.0,
    "negative_slope": 0.01,
    "alpha": 1.0,
    "approximate": "none",
    "beta": 1.0,
    "threshold": 20.0,
}


def _function_arguments(node: fx.Node, wanted: tuple[str, ...]) -> tuple | None:
    """The values of `wanted`, given by name or in that order after the input; built-ins have no signature."""
    positional = dict(zip(wanted, node.args[1:], strict=False))
    values = [node.kwargs.get(name, positional.get(name, _DEFAULTS[name])) for name in wanted]
    return None if any(isinstance(v, fx.Node) for v in values) else tuple(values)
