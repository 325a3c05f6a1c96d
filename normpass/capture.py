"""A module's forward as a torch.fx graph, with what that graph depends on.

    capture(module, arguments) -> Capture        one traceable module
    find_parts(model) -> Parts                   the largest traceable modules of a model

The graph keeps `call_module` nodes at the original paths. Norms are never traced into (that would run
their counter update). A module whose own forward cannot be traced becomes one opaque call, and its
children are looked at as parts of their own.

`normpass.tracing` refuses what a graph cannot say, `normpass.guard` knows when a graph no longer holds.
"""

from __future__ import annotations

import enum
import inspect
import operator
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from normpass.functional import product_as_first, sum_as_first, survival_noise
from normpass.graph import VIEW_FUNCTIONS, VIEW_METHODS, hooks_of, is_in_place_call, join, module_of, owns_result
from normpass.guard import SIMPLE, Guard, make_guard
from normpass.tracing import CaptureError, Tracer, watched

NORM_BASES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
TENSOR = "<tensor>"
_CONSTANTS = (*SIMPLE, enum.Enum, type, types.FunctionType, types.BuiltinFunctionType)


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


def find_parts(model: nn.Module, also_without_norms: bool = False) -> Parts:
    """The largest traceable submodules of `model` that hold norms (or, `also_without_norms`, all of it)."""
    captures: dict[str, Capture] = {}
    if also_without_norms and not _holds_norms(model):
        try:
            return Parts({"": capture(model, required_arguments(model))})
        except CaptureError as error:
            return Parts({}, {"": str(error)})
    untraceable: dict[str, str] = {}
    _find_parts(model, "", captures, untraceable)
    return Parts(captures, untraceable)


def _find_parts(module: nn.Module, path: str, captures: dict, untraceable: dict) -> None:
    if isinstance(module, NORM_BASES) or not _holds_norms(module):
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


def _holds_norms(module: nn.Module) -> bool:
    return any(isinstance(m, NORM_BASES) for m in module.modules())


def _has_no_forward(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward in (
        nn.ModuleList.forward,
        nn.ModuleDict.forward,
    )


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


@dataclass(frozen=True)
class Tree:
    """A list, tuple or dict that is an argument: its structure, and what each leaf is."""

    structure: pytree.TreeSpec
    leaves: tuple


def required_arguments(module: nn.Module) -> dict[str, Any]:
    """Parameter name -> TENSOR, or its default where it has one: a call with tensors and nothing else."""
    arguments = {}
    for p in parameters_of(module):
        arguments[p.name] = TENSOR if p.default is inspect.Parameter.empty else described(p.default)
        if arguments[p.name] is None:
            raise CaptureError(f"its argument `{p.name}` is a {type(p.default).__name__}", module)
    return arguments


def described(value: Any) -> Any:
    """What a graph is traced for: TENSOR, `(type, constant)` or a Tree of these; None for anything else."""
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, _CONSTANTS):
        return None if value is inspect.Parameter.empty else (type(value), value)
    if not isinstance(value, (list, tuple, dict)):
        return None
    leaves, structure = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:  # a subclass that pytree does not look into
        return None
    found = tuple(described(leaf) for leaf in leaves)
    return None if None in found else Tree(structure, found)


def tensors_of(value: Any, description: Any) -> list[Tensor]:
    """The tensors of an argument, in the order of its description."""
    if description is TENSOR:
        return [value]
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)] if type(description) is Tree else []


def _rebuilt(description: Any, tensors: Iterator[Any]) -> Any:
    """The argument of that description, with the next of `tensors` wherever there is one."""
    if description is TENSOR:
        return next(tensors)
    if type(description) is Tree:
        return pytree.tree_unflatten([_rebuilt(leaf, tensors) for leaf in description.leaves], description.structure)
    return description[1]


# --- tracing --------------------------------------------------------------------------------------


def capture(module: nn.Module, arguments: dict[str, Any]) -> Capture:
    """Trace the module's own forward. `arguments` has each parameter as `described`.

    Raises CaptureError where the forward itself cannot be traced. Submodules that cannot be traced are
    left opaque, all of one class at once.
    """
    opaque: dict[type, str] = {}

    def is_kept_whole(m: nn.Module) -> bool:
        if type(m) in opaque or isinstance(m, NORM_BASES) or reason_to_keep_whole(m) is not None:
            return True
        return hasattr(type(m), "_normpass_plain_class")  # a part with a program of its own

    while True:
        tracer = Tracer(is_kept_whole)
        try:
            root = _entry(module, arguments)
            with watched(root, tracer) as recorded:
                graph = tracer.trace(root)
        except Exception as error:  # whatever the model's own code raises on a proxy
            culprit = tracer.failed
            reason = _one_line(error)
            if culprit is None or culprit is module or type(culprit) in opaque:
                raise CaptureError(reason, culprit) from error
            opaque[type(culprit)] = reason
            continue
        break
    normalise(graph, module)
    guard = make_guard(module, recorded, tracer.entered, tracer.is_leaf_module)
    return Capture(module, graph, _opaque_paths(graph, module, opaque), guard)


def reason_to_keep_whole(module: nn.Module) -> str | None:
    """Why `module` must be called as it is, whatever it computes; None if its forward may be traced."""
    if any(hooks_of(module)):
        return "it has hooks"
    if is_parametrized(module):
        return "it is parametrised"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def _entry(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """`module` with a forward that takes the tensors alone, one by one, so that constants are fixed.

    It is another object with the very same `__dict__`: a thread that runs `module` meanwhile sees nothing of it.
    """
    names = [slot for name, description in arguments.items() for slot in _slots(name, description)]
    plain = plain_class(module).forward

    def call(self, *tensors):
        remaining = iter(tensors)
        given = {name: _rebuilt(description, remaining) for name, description in arguments.items()}
        return plain(self, **given)

    scope: dict[str, Any] = {"_normpass_call": call}
    exec(f"def forward(self, {', '.join(names)}):\n    return _normpass_call(self, {', '.join(names)})\n", scope)
    traced: nn.Module = object.__new__(type(type(module).__name__, (type(module),), {"forward": scope["forward"]}))
    traced.__dict__ = module.__dict__
    return traced


def _slots(name: str, description: Any) -> list[str]:
    """A name for each tensor of the argument `name`."""
    if type(description) is Tree:
        inner = (_slots(f"{name}_{index}", leaf) for index, leaf in enumerate(description.leaves))
        return [slot for slots in inner for slot in slots]
    return [name] if description is TENSOR else []


def _one_line(error: Exception) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame, _ in frames):
        return "it runs a part of its forward under `checkpoint`"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_OUT_OF_PLACE = {
    operator.iadd: sum_as_first,
    operator.imul: product_as_first,
    "add_": sum_as_first,
    "mul_": product_as_first,
}


_OWN_RESULT = frozenset({operator.add, operator.mul, torch.add, torch.cat, F.batch_norm, sum_as_first})
_ACTIVATIONS = (F.relu, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardtanh, F.relu6, F.hardswish, F.mish, torch.relu)


def normalise(graph: fx.Graph, root: nn.Module) -> None:
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
    if len(node.args) != 2 or node.kwargs:
        return False
    return _is_unshared(node.args[0], root, of_activation=node.target in (operator.iadd, operator.imul))


def _is_unshared(node: Any, root: nn.Module, of_activation: bool) -> bool:
    """Whether the value of `node` is new memory that its one user alone sees."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if owns_result(node, root, also=_OWN_RESULT):
        return True
    if not of_activation:
        return False
    if _is_view_of_one(node):
        return _is_unshared(node.args[0], root, of_activation)
    module = module_of(node, root)
    if type(module).__module__ == "torch.nn.modules.activation":
        return not getattr(module, "inplace", False) or _is_unshared(node.args[0], root, of_activation)
    if node.target in _ACTIVATIONS:
        return not is_in_place_call(node) or _is_unshared(node.args[0], root, of_activation)
    return False


def _is_view_of_one(node: fx.Node) -> bool:
    """Whether `node` is a part or another shape of one tensor."""
    spelled = node.target in VIEW_FUNCTIONS or (node.op == "call_method" and node.target in VIEW_METHODS)
    return spelled and len(node.all_input_nodes) == 1 and node.args[0] is node.all_input_nodes[0]


def _is_no_op(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module) is nn.Identity and not reason_to_keep_whole(module) and len(node.all_input_nodes) == 1
    if getattr(node.target, "__name__", "") != "stochastic_depth" or len(node.all_input_nodes) != 1:
        return False
    p, _, training = stochastic_depth_arguments(node)
    return p == 0.0 or not training


def stochastic_depth_arguments(node: fx.Node) -> tuple[float, str, bool]:
    """(p, mode, training) of a call of `torchvision.ops.stochastic_depth(input, p, mode, training=True)`."""
    given: dict[str, Any] = dict(zip(("input", "p", "mode", "training"), node.args, strict=False))
    given |= node.kwargs
    return given["p"], given["mode"], given.get("training", True)


def _opaque_paths(graph: fx.Graph, root: nn.Module, opaque: dict[type, str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        if isinstance(module, NORM_BASES) or not any(isinstance(m, NORM_BASES) for m in module.modules()):
            continue
        why = opaque.get(type(module)) or reason_to_keep_whole(module)
        paths[str(node.target)] = why or f"{type(module).__name__} is called as one layer"
    return paths
