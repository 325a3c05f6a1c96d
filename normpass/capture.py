"""A module's forward as a torch.fx graph, with what that graph depends on.

    capture(module, arguments) -> Capture        one traceable module
    find_parts(model) -> Parts                   the largest traceable modules of a model

The graph keeps `call_module` nodes at the original paths. Norms are never traced into (that would run
their counter update). A module whose own forward cannot be traced becomes one opaque call, and its
children are looked at as parts of their own.

Tracing fixes what forward *read*: `self.training`, a flag, an attribute that is None. Every such read is
recorded as a guard, so that a later call that would have read something else is traced anew instead of
silently running the old graph. Hooks registered later and submodules replaced later are guarded too.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from normpass.functional import is_norm_act_module, product_as_first, sum_as_first, survival_noise
from normpass.graph import FRESH_MODULES, hooks_of, module_of

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_BOOKKEEPING = frozenset({"_is_full_backward_hook", "_compiled_call_impl", "_version"})
NORM_BASES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
TENSOR = "<tensor>"


class CaptureError(Exception):
    """Why a module could not be traced, in one line; `module` is the innermost one being traced."""

    def __init__(self, reason: str, module: nn.Module | None = None):
        super().__init__(reason)
        self.module = module


@dataclass(frozen=True)
class Guard:
    """What a graph relies on; `holds()` is run before every call, so it is a few dictionary look-ups."""

    reads: tuple[tuple[dict, str, Any], ...]
    children: tuple[tuple[dict, str, nn.Module | None], ...]
    hooks: tuple[dict, ...]

    def holds(self) -> bool:
        if any(self.hooks):
            return False
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        for attributes, name, value in self.reads:
            if attributes.get(name) is not value and attributes.get(name) != value:
                return False
        return True


@dataclass(frozen=True)
class Capture:
    """The traced forward of `root`: its graph, the modules left opaque, and what it relies on."""

    root: nn.Module
    graph: fx.Graph
    opaque: dict[str, str]
    """path -> why, for modules that are called as they are although they hold norms"""
    guard: Guard


@dataclass(frozen=True)
class Parts:
    """The modules of a model that are rewritten, as dotted paths (`""` is the model itself)."""

    captures: dict[str, Capture]
    untraceable: dict[str, str] = field(default_factory=dict)
    """path -> why its own forward is left as it is"""


def find_parts(model: nn.Module) -> Parts:
    """The largest traceable submodules of `model` that hold norms."""
    captures: dict[str, Capture] = {}
    untraceable: dict[str, str] = {}
    _find_parts(model, "", captures, untraceable)
    return Parts(captures, untraceable)


def _find_parts(module: nn.Module, path: str, captures: dict, untraceable: dict) -> None:
    if isinstance(module, NORM_BASES) or not any(isinstance(m, NORM_BASES) for m in module.modules()):
        return
    try:
        captured = capture(module, required_arguments(module))
    except CaptureError as error:
        if type(module).forward is not nn.Module.forward and not _has_no_forward(module):
            untraceable[path] = str(error)
        inner = [(name, child) for name, child in module.named_children()]
    else:
        captures[path] = captured
        inner = [(name, module.get_submodule(name)) for name in captured.opaque]
        untraceable.update({join(path, name): why for name, why in captured.opaque.items()})
    for name, child in inner:
        _find_parts(child, join(path, name), captures, untraceable)


def _has_no_forward(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward in (
        nn.ModuleList.forward,
        nn.ModuleDict.forward,
    )


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- arguments ------------------------------------------------------------------------------------


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The model's own class, below the one that `normpass.optimize` puts over it."""
    return getattr(type(module), "_normpass_plain_class", type(module))


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the module's own forward, `self` excluded; CaptureError for `*args`."""
    parameters = list(inspect.signature(plain_class(module).forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise CaptureError(f"its forward takes `{parameter}`", module)
    return parameters


def required_arguments(module: nn.Module) -> dict[str, Any]:
    """Parameter name -> TENSOR, or its default where it has one: a call with tensors and nothing else."""
    return {
        p.name: TENSOR if p.default is inspect.Parameter.empty else p.default for p in parameters_of(module)
    }


# --- tracing --------------------------------------------------------------------------------------


def capture(module: nn.Module, arguments: dict[str, Any]) -> Capture:
    """Trace the module's own forward. `arguments` maps each parameter to TENSOR or to a constant.

    Raises CaptureError where the forward itself cannot be traced. Submodules that cannot be traced are
    left opaque, all of one class at once.
    """
    opaque: dict[type, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            with _entry(module, arguments), _recorded_reads(module) as reads:
                graph = tracer.trace(module)
        except Exception as error:  # whatever the model's own code raises on a proxy
            culprit = tracer.innermost
            reason = _one_line(error)
            if culprit is None or culprit is module or type(culprit) in opaque:
                raise CaptureError(reason, culprit) from error
            opaque[type(culprit)] = reason
            continue
        break
    _normalise(graph, module)
    return Capture(module, graph, _opaque_paths(graph, module, tracer), _guard(module, tracer, reads))


class _Tracer(fx.Tracer):
    """fx tracing that stops at norms, hooked, parametrised and untraceable modules, and knows where it is."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: dict[type, str]):
        super().__init__()
        self.opaque = opaque
        self.stack: list[nn.Module] = []
        self.failed: nn.Module | None = None
        self.entered: list[nn.Module] = []

    @property
    def innermost(self) -> nn.Module | None:
        return self.failed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in self.opaque or isinstance(m, NORM_BASES) or reason_to_keep_whole(m):
            return True
        if hasattr(type(m), "_normpass_plain_class"):  # a part with a program of its own
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        leaf = self.is_leaf_module(m, "")
        if not leaf:
            self.entered.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = m
            raise

    def create_arg(self, a: Any):
        if isinstance(a, OrderedDict):  # fx would make it a plain dict
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)


def reason_to_keep_whole(module: nn.Module) -> str | None:
    """Why `module` must be called as it is, whatever it computes; None if its forward may be traced."""
    if any(hooks_of(module)):
        return "it has hooks"
    if is_parametrized(module):
        return "it is parametrised"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


@contextmanager
def _entry(module: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
    """Give `module` a class whose forward takes the tensors alone, so that constants are fixed."""
    forward = plain_class(module).forward
    tensors = [name for name, value in arguments.items() if value is TENSOR]
    constants = {name: value for name, value in arguments.items() if value is not TENSOR}
    passed = "".join(f", {name}={name}" for name in tensors)
    source = f"def forward(self{''.join(', ' + name for name in tensors)}):\n"
    source += f"    return plain(self{passed}, **constants)\n"
    scope: dict[str, Any] = {"plain": forward, "constants": constants}
    exec(source, scope)  # only identifiers taken from a signature are in the text
    original = type(module)
    module.__class__ = type(original.__name__, (original,), {"forward": scope["forward"]})
    try:
        yield
    finally:
        module.__class__ = original


_patch_lock = threading.RLock()


@contextmanager
def _recorded_reads(root: nn.Module) -> Iterator[dict]:
    """Record the plain values that modules of `root` read from themselves; refuse that they write any."""
    members = {id(m): m for m in root.modules()}
    reads: dict[tuple[int, str], tuple[dict, str, Any]] = {}
    get = object.__getattribute__

    def getattribute(self, name):
        value = get(self, name)
        if isinstance(value, _SIMPLE) and id(self) in members and name not in _BOOKKEEPING:
            attributes = get(self, "__dict__")
            if name in attributes:
                reads.setdefault((id(self), name), (attributes, name, value))
        return value

    def setattribute(self, name, value):
        if id(self) in members:
            raise CaptureError(f"its forward sets `self.{name}`", self)
        plain_set(self, name, value)

    with _patch_lock:
        plain_set = nn.Module.__setattr__
        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign]
        nn.Module.__setattr__ = setattribute  # type: ignore[method-assign]
        try:
            yield reads
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]


def _one_line(error: Exception) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_OUT_OF_PLACE = {
    operator.iadd: sum_as_first,
    operator.imul: product_as_first,
    "add_": sum_as_first,
    "mul_": product_as_first,
}


def _normalise(graph: fx.Graph, root: nn.Module) -> None:
    """One normal form of what the model spells in several ways; the same numbers.

    What does nothing goes (`nn.Identity`, stochastic depth that never drops); stochastic depth becomes a
    drawn factor and a product; a sum or product written over a value that nobody else reads is made out of
    place, so that the value can be rebuilt.
    """
    for node in list(graph.nodes):
        if _is_no_op(node, root):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif getattr(node.target, "__name__", "") == "stochastic_depth":
            _expand_stochastic_depth(graph, node)
    for node in graph.nodes:
        if node.target in _OUT_OF_PLACE and _overwrites_unshared(node, root):
            node.op, node.target = "call_function", _OUT_OF_PLACE[node.target]


def _expand_stochastic_depth(graph: fx.Graph, node: fx.Node) -> None:
    p, mode, _ = stochastic_depth_arguments(node)
    x = node.all_input_nodes[0]
    with graph.inserting_before(node):
        noise = graph.call_function(survival_noise, (x, p, mode))
        product = graph.call_function(operator.mul, (x, noise))
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _overwrites_unshared(node: fx.Node, root: nn.Module) -> bool:
    first = node.args[0]
    if not isinstance(first, fx.Node) or len(first.users) != 1 or len(node.args) != 2 or node.kwargs:
        return False
    if first.op == "call_module":
        return isinstance(module_of(first, root), FRESH_MODULES)
    return first.target in (operator.add, operator.mul, torch.add, torch.cat, F.batch_norm, sum_as_first)


def _is_no_op(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return (
            type(module) is nn.Identity and not reason_to_keep_whole(module) and len(node.all_input_nodes) == 1
        )
    if getattr(node.target, "__name__", "") != "stochastic_depth" or len(node.all_input_nodes) != 1:
        return False
    p, _, training = stochastic_depth_arguments(node)
    return p == 0.0 or not training


def stochastic_depth_arguments(node: fx.Node) -> tuple[float, str, bool]:
    """(p, mode, training) of a call of `torchvision.ops.stochastic_depth(input, p, mode, training=True)`."""
    given = dict(zip(("input", "p", "mode", "training"), node.args, strict=False)) | dict(node.kwargs)
    return given["p"], given["mode"], given.get("training", True)


def _opaque_paths(graph: fx.Graph, root: nn.Module, tracer: _Tracer) -> dict[str, str]:
    paths: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        if isinstance(module, NORM_BASES) or not any(isinstance(m, NORM_BASES) for m in module.modules()):
            continue
        why = tracer.opaque.get(type(module)) or reason_to_keep_whole(module)
        paths[str(node.target)] = why or f"{type(module).__name__} is called as one layer"
    return paths


def _guard(root: nn.Module, tracer: _Tracer, reads: dict) -> Guard:
    traced = {id(m): m for m in (root, *tracer.entered)}
    for path, module in root.named_modules():  # containers on the way are not called but walked through
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or is_norm_act_module(module):
            traced[id(module)] = module
    children = [
        (m._modules, name, child) for m in traced.values() for name, child in m._modules.items()
    ]
    # Whoever is hooked already is called whole; the root's own hooks run around its forward anyway.
    watched = {id(m): m for m in root.modules() if m is not root and not any(hooks_of(m))}
    hooks = [d for m in watched.values() if _is_dissolvable(m, traced) for d in hooks_of(m)]
    return Guard(tuple(reads.values()), tuple(children), tuple(hooks))


def _is_dissolvable(module: nn.Module, traced: dict[int, nn.Module]) -> bool:
    """Modules that no longer run themselves: traced into, or an activation that a rewrite may absorb."""
    return id(module) in traced or not any(True for _ in module.parameters(recurse=False))
