"""torch.fx helpers that know nothing about norms: which node writes where, and which share storage."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)

VIEW_METHODS = frozenset(
    "view reshape flatten transpose permute chunk split squeeze unsqueeze expand narrow contiguous "
    "view_as reshape_as unflatten swapaxes movedim unbind select t mT T detach to type_as float half "
    "bfloat16 double expand_as".split()
)
VIEW_FUNCTIONS = frozenset(
    {operator.getitem, getattr}
    | {
        getattr(torch, name)
        for name in (
            "reshape flatten transpose permute chunk split squeeze unsqueeze narrow swapaxes movedim "
            "unbind select detach unflatten tensor_split"
        ).split()
    }
)
FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
)
FRESH_FUNCTIONS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, F.interpolate, F.linear}
    | {F.batch_norm, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, torch.cat, torch.add, torch.mul}
    | {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.conv2d, torch.stack, torch.matmul}
)
IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in "iadd isub imul itruediv ifloordiv ipow iand ior ixor imatmul".split()
)


def join(path: str, name: str) -> str:
    """A dotted path below another; the root's is empty."""
    return f"{path}.{name}" if path else name


def replace_layers(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> dict[str, nn.Module]:
    """Put `make(layer)` in the place of every layer below `model` for which that is not None.

    A layer that stands in two places stays one. Returns path -> the layer that stood there.
    """
    replaced: dict[str, nn.Module] = {}
    new: dict[int, nn.Module | None] = {}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) not in new:
                new[id(child)] = make(child)
            other = new[id(child)]
            if other is not None:
                parent._modules[name] = other
                replaced[join(path, name)] = child
    return replaced


def hooks_of(module: nn.Module) -> list[dict]:
    """The hook dictionaries of `module` that a plain call consults."""
    return [module.__dict__[name] for name in HOOK_DICTS if name in module.__dict__]


def global_hooks() -> list[dict]:
    """The hook dictionaries that every module's call consults (`register_module_forward_hook` and its like)."""
    hooks = nn.modules.module
    return [
        hooks._global_forward_pre_hooks,
        hooks._global_forward_hooks,
        hooks._global_backward_pre_hooks,
        hooks._global_backward_hooks,
    ]


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a `call_module` node calls; None for any other node."""
    if node.op != "call_module":
        return None
    module: Any = root
    for name in str(node.target).split("."):  # `get_submodule` asks for each attribute twice: ten times slower
        module = module._modules[name]
    return module  # type: ignore[no-any-return]


def called(node: fx.Node) -> str:
    """What a report calls `node`: the path of the layer it calls, or its own name."""
    return str(node.target) if node.op == "call_module" else node.name


def key_of(node: fx.Node) -> str:
    """How a plan names `node`: by the norm whose site it is, by the layer it calls, else by its name when captured."""
    return str(node.meta.get("site") or node.meta.get("key") or called(node))


def replace_node(graph: fx.Graph, node: fx.Node, new: fx.Node) -> fx.Node:
    """Put `new` in the place of `node`; it goes by the same key."""
    new.meta.setdefault("key", key_of(node))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


@functools.cache
def called_on(caller: Callable, function: Callable) -> Callable:
    """`caller` with its first argument fixed: fx can print calls of a function, not functions as arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return caller(function, *args, **kwargs)

    call.__name__ = f"{caller.__name__}_{getattr(function, '__name__', 'function')}"
    return call


def bound(function: Callable, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of `node` by the names of `function`'s signature; None where they cannot be bound."""
    try:
        arguments = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    arguments.apply_defaults()
    return dict(arguments.arguments)


def written_nodes(node: fx.Node, root: nn.Module) -> Iterator[fx.Node]:
    """The nodes whose storage `node` changes in place."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    if isinstance(first, fx.Node) and _writes_first_argument(node, root):
        yield first


def _writes_first_argument(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(module_of(node, root), "inplace", False))
    if node.op != "call_function":
        return False
    if node.target in IN_PLACE_OPERATORS or node.target is operator.setitem:
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return is_in_place_call(node)


def is_in_place_call(node: fx.Node) -> bool:
    """Whether a function such as `F.relu` is called with `inplace=True`, by name or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    function = node.target
    if isinstance(function, str) or getattr(function, "__module__", None) != F.__name__ or len(node.args) < 2:
        return False
    arguments = bound(function, node)
    return bool(arguments and arguments.get("inplace", False))


class Storage:
    """Which nodes may share storage, and who writes to it when.

    Views, in-place operations and modules of unknown kind count as sharing with their inputs: it is
    enough that they may.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module):
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._parent = {node: node for node in graph.nodes}
        written_by: list[tuple[fx.Node, fx.Node]] = []
        for node in graph.nodes:
            written = list(written_nodes(node, root))
            written_by += [(target, node) for target in written]
            for source in written or (node.all_input_nodes if _may_alias(node, root) else ()):
                self._parent[self._find(source)] = self._find(node)
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        for target, writer in written_by:
            self._writers.setdefault(self._find(target), []).append(writer)

    def _find(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def writer_after(self, node: fx.Node, after: fx.Node, until: fx.Node | None = None) -> fx.Node | None:
        """The first node later than `after` (and earlier than `until`) that writes what `node` may share."""
        start = self.position[after]
        stop = self.position[until] if until is not None else len(self.position)
        writers = self._writers.get(self._find(node), ())
        return next((writer for writer in writers if start < self.position[writer] < stop), None)


def owns_result(node: fx.Node, root: nn.Module, also: frozenset = frozenset()) -> bool:
    """Whether the value of `node` certainly has storage of its own; `also` names more such functions."""
    if node.op == "call_module":
        return isinstance(module_of(node, root), FRESH_MODULES)
    return node.op == "call_function" and (node.target in FRESH_FUNCTIONS or node.target in also)


def _may_alias(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_method":
        return str(node.target) in VIEW_METHODS
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return node.target in VIEW_FUNCTIONS or "dropout" in name or "stochastic" in name or "drop" in name
    if node.op == "call_module":
        module = module_of(node, root)
        return not isinstance(module, FRESH_MODULES) and not _is_activation_layer(module)
    return False


def _is_activation_layer(module: nn.Module | None) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"
