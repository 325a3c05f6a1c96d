"""What a traced graph relies on, and whether that still holds.

Tracing fixes everything that forward read: flags, numbers, lists, the children of a container, that there are
no hooks. A `Guard` has it all; where one no longer holds, the module is traced anew.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normpass.graph import hooks_of

SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {
    "__dict__",
    "_compiled_call_impl",
    "_is_full_backward_hook",
    "_version",
}
_DEPTH = 4  # of lists in dicts in objects that are compared by content; deeper ones by identity


@dataclass(frozen=True)
class Guard:
    """What a graph relies on; `holds()` is run before every call, so it is a few dictionary look-ups."""

    reads: tuple[tuple[dict, str, Any], ...]
    """(attributes of a module, name, plain value); None stands for no such attribute too"""
    contents: tuple[tuple[dict, str, Any], ...]
    """(attributes, name, fingerprint) of lists, dicts and objects"""
    inherited: tuple[tuple[nn.Module, str, Any], ...]
    """(module, name, plain value) of attributes of the module's class"""
    children: tuple[tuple[dict, tuple[str, ...], tuple[nn.Module | None, ...]], ...]
    """(children of a module, their names in order, the children)"""
    hooks: tuple[dict, ...]

    def holds(self) -> bool:
        if any(self.hooks):
            return False
        for modules, names, children in self.children:
            if len(modules) != len(names):
                return False
            for name, child, now in zip(names, children, modules.values(), strict=True):
                if now is not child or modules.get(name) is not child:
                    return False
        for attributes, name, value in self.reads:
            if attributes.get(name) is not value and attributes.get(name) != value:
                return False
        for attributes, name, content in self.contents:
            if fingerprint(attributes.get(name)) != content:
                return False
        return all(getattr(module, name, None) == value for module, name, value in self.inherited)


class _Identity:
    """Equal to itself alone, whatever the value's own `==` does."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is _Identity and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def fingerprint(value: Any, depth: int = _DEPTH) -> Any:
    """What `value` holds now: plain values, containers and plain objects by content, the rest by identity."""
    kind = type(value)
    if issubclass(kind, SIMPLE):
        return value
    if issubclass(kind, (nn.Module, Tensor, fx.Proxy, type, types.ModuleType)) or callable(value) or depth == 0:
        return _Identity(value)
    if issubclass(kind, (list, tuple)):
        return kind, [fingerprint(item, depth - 1) for item in value]
    if issubclass(kind, dict):
        return kind, [(key, fingerprint(item, depth - 1)) for key, item in value.items()]
    if issubclass(kind, (set, frozenset)):
        return kind, frozenset(value)
    if hasattr(value, "__dict__"):
        return _Identity(value), fingerprint(vars(value), depth - 1)
    return _Identity(value)


def is_plain_attribute_of_class(module: nn.Module, name: str) -> bool:
    """Whether `name` is found on the module's class as a plain value (a property is computed from others)."""
    for kind in type(module).__mro__:
        if name in vars(kind):
            return isinstance(vars(kind)[name], SIMPLE)
    return False


def make_guard(root: nn.Module, recorded: Any, entered: Iterable[nn.Module], is_leaf: Any) -> Guard:
    """The guard of a graph of `root`: `recorded` reads, the modules traced into, those that may be absorbed."""
    seen = {id(m): m for m in (*walked(root, is_leaf), *entered)}
    reads = list(recorded.reads.values())
    for module in root.modules():
        if module is root or id(module) in seen or any(True for _ in module.parameters(recurse=False)):
            continue
        if not any(hooks_of(module)) and "forward" not in module.__dict__:
            reads += _plain_attributes(module)  # an activation: its slope is fixed, its forward dissolved
    own_forward = [(m.__dict__, "forward", None) for m in root.modules() if "forward" not in m.__dict__]
    children = [(m._modules, tuple(m._modules), tuple(m._modules.values())) for m in seen.values()]
    return Guard(
        tuple(reads + own_forward),
        tuple(recorded.contents.values()),
        tuple(recorded.inherited.values()),
        tuple(children),
        tuple(_hooks(root, seen)),
    )


def walked(module: nn.Module, is_leaf: Any) -> Iterator[nn.Module]:
    """`module` and the modules below it that have children and are not called as one layer, lists included.

    Of what is called as one layer, its outermost module: a norm may hold its activation.
    """
    yield module
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or not is_leaf(child, name):
            yield from walked(child, is_leaf)
        elif child._modules:
            yield child


def _plain_attributes(module: nn.Module) -> list[tuple[dict, str, Any]]:
    attributes = module.__dict__
    return [
        (attributes, name, value)
        for name, value in attributes.items()
        if name != "training" and name not in BOOKKEEPING and isinstance(value, SIMPLE)
    ]


def _hooks(root: nn.Module, seen: dict[int, nn.Module]) -> Iterator[dict]:
    # Whoever is hooked already is called whole; the root's own hooks run around its forward anyway.
    for module in root.modules():
        if module is root or any(hooks_of(module)):
            continue
        if id(module) in seen or not any(True for _ in module.parameters(recurse=False)):
            yield from hooks_of(module)
