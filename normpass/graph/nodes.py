"""torch.fx helpers that know nothing about norms: names of nodes, calls, and the modules they come from.

A captured graph has functions and methods alone; parameters and buffers are inputs. Each node carries the stack of
modules in whose forward it was called, as Dynamo leaves it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
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


# --- names ----------------------------------------------------------------------------------------


def module_of(node: fx.Node) -> tuple[str, type | None]:
    """(dotted path, class) of the innermost module in whose forward `node` was called; ("", None) for none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", None
    name, kind = list(stack.values())[-1]
    return _dotted(str(name)), kind if isinstance(kind, type) else None


@functools.lru_cache(maxsize=100_000)
def _dotted(name: str) -> str:
    """`L['self'].layers['a'][0].bn` -> `layers.a.0.bn`: a module's name as `named_modules` has it."""
    name = re.sub(r"\._modules\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", name)
    name = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", name)
    return re.sub(r"^L\.\w+\.?", "", name).strip(".")


def path_of(node: fx.Node) -> str:
    """Dotted path of the innermost module in whose forward `node` was called; empty for the model itself."""
    return module_of(node)[0]


def name_from_root(graph: fx.Graph, model: nn.Module | None) -> None:
    """Give what a piece of forward calls its modules, captured by itself, the names that they have in `model`."""
    names = {} if model is None else {str(id(module)): name for name, module in model.named_modules()}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for key, (_, kind) in list(stack.items()):
            name = names.get(str(key).partition("@")[0])  # of a second call: "id@1"
            if name is not None:
                stack[key] = (f"L['self'].{name}".rstrip("."), kind)


def is_state(placeholder: fx.Node) -> bool:
    """Whether an input of the graph is a parameter, a buffer or another tensor of the model."""
    source = getattr(placeholder, "_dynamo_source", None)
    return source is not None and "NN_MODULE" in str(source.guard_source)


def name_of(target: Any) -> str:
    """What a node calls, in short: `conv2d`, `iadd`, `view`."""
    return str(getattr(target, "__name__", target))


def give_keys(graph: fx.Graph) -> None:
    """Name every call once and for all, by where it stands: `layer1.0.conv1`, `layer1.0.iadd`, `features.cat.2`.

    A layer of torch.nn or a norm is called by its path alone; what else it calls, and everything else, by its function.
    """
    seen: Counter[str] = Counter()
    layers: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        path, kind = module_of(node)
        is_layer = path not in layers and _is_layer(kind) and not _is_bookkeeping(node)
        layers.update({path} if is_layer else ())
        name = path if is_layer and path else join(path, name_of(node.target))
        seen[name] += 1
        node.meta["key"] = name if seen[name] == 1 else f"{name}.{seen[name]}"


def _is_layer(kind: type | None) -> bool:
    if kind is None:
        return False
    return kind.__module__.startswith("torch.nn.modules") or issubclass(kind, nn.modules.batchnorm._NormBase)


def _is_bookkeeping(node: fx.Node) -> bool:
    """Whether a call touches a layer's state alone: the counter of a norm."""
    inputs = node.all_input_nodes
    return bool(inputs) and all(n.op == "placeholder" and is_state(n) for n in inputs)


def called(node: fx.Node) -> str:
    """What a report calls `node`."""
    return key_of(node)


def key_of(node: fx.Node) -> str:
    """How a plan names `node`: see `give_keys`; a node that a rewrite has made goes by what it stands for."""
    return str(node.meta.get("key") or node.name)


def replace_node(graph: fx.Graph, node: fx.Node, new: fx.Node) -> fx.Node:
    """Put `new` in the place of `node`; it goes by the same key."""
    inherit(new, node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def inherit(new: fx.Node, node: fx.Node) -> None:
    """Let `new` go by the name of `node`, from the same module."""
    new.meta["key"] = key_of(node)
    for name in ("nn_module_stack", "stack_trace"):
        if name in node.meta:
            new.meta[name] = node.meta[name]


# --- calls ----------------------------------------------------------------------------------------


@functools.cache
def called_on(caller: Callable, function: Callable) -> Callable:
    """`caller` with its first argument fixed: fx can print calls of a function, not functions as arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return caller(function, *args, **kwargs)

    call.__name__ = f"{caller.__name__}_{name_of(function)}"
    return call


@functools.cache
def method_function(name: str) -> Callable:
    """The tensor method `name` as a function of the tensor and its arguments."""

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    call.__name__ = name
    return call


def function_of(node: fx.Node) -> Callable:
    """What `node` calls, as a function."""
    return method_function(str(node.target)) if node.op == "call_method" else node.target  # type: ignore[return-value]


def bound(function: Callable, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of `node` by the names of `function`'s signature; None where they cannot be bound."""
    try:
        arguments = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    arguments.apply_defaults()
    return dict(arguments.arguments)


def is_in_place_call(node: fx.Node) -> bool:
    """Whether a function such as `F.relu` is called with `inplace=True`, by name or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    function = node.target
    if isinstance(function, str) or getattr(function, "__module__", None) != "torch.nn.functional":
        return False
    arguments = bound(function, node) if len(node.args) >= 2 else None
    return bool(arguments and arguments.get("inplace", False))


def copy_graph(graph_module: fx.GraphModule, copies: dict[fx.Node, fx.Node] | None = None) -> fx.GraphModule:
    """The same graph once more, over the same submodules; `copies` gets node -> its copy."""
    graph = fx.Graph()
    copies = {} if copies is None else copies
    graph.output(graph.graph_copy(graph_module.graph, copies))
    return fx.GraphModule(graph_module, graph)
