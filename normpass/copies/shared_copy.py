"""A copy of a model that shares everything with it but its modules.

    shared_copy(model): every registered module, and whatever leads to one ──► new;    all else ──► the same object

`copy.deepcopy` copies too much (a generator that two layers draw from, a list that the user reads, a module kept out
of the parameters) and fails on an activation or a lock. Here an object is copied only where it must be: a registered
module; a container, plain object, bound method, closure, partial or weak reference from which one can be reached, so
that the copy leads to the copies. Found by a walk over all that modules hold, then back from the modules to holders.

New for every module too: its dicts of parameters, buffers, children and hooks, the flat weights of an RNN, the graph
of a `fx.GraphModule`: nothing that is registered, replaced or set on the copy is seen by the original. Parameters and
buffers are the same objects: `to()`, or a lazy module's first forward, changes them for both. Shared with their flags:
TorchScript modules, unregistered modules. Refused: a generator, iterator or object of an extension that holds a module.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import fx, nn

from normpass.copies.kinds import LEAVES, NEVER_COPIED, Kind, dict_of, kind_of
from normpass.errors import InvalidModelError

_OWN: dict[type[nn.Module], frozenset[str]] = {
    nn.Module: frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))),
    nn.RNNBase: frozenset({"_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"}),
    nn.ParameterDict: frozenset({"_keys"}),
    fx.GraphModule: frozenset(
        {"_graph", "meta", "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks"}
    ),
}
"""attributes that torch changes in place, so that each module needs its own"""
_CONTAINERS = (dict, OrderedDict, set, list)


def shared_copy(model: nn.Module) -> nn.Module:
    """The same modules again, of the same classes, around the same parameters, buffers and other attributes.

    Raises `InvalidModelError` where something that holds a module cannot be made again.
    """
    return _Copier(model).copy()


def _registered(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """id -> (dotted name, module), the model first; without what is TorchScript's."""
    found: dict[int, tuple[str, nn.Module]] = {}
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in found or not issubclass(type(module), nn.Module) or issubclass(type(module), NEVER_COPIED):
            continue
        found[id(module)] = name, module
        children = dict_of(module).get("_modules", {})
        stack += [(f"{name}.{key}".lstrip("."), child) for key, child in reversed(children.items())]
    return found


def _own(module: nn.Module) -> list[Any]:
    """The containers and the graph that a copy must not share."""
    attributes = dict_of(module)
    names = [name for cls, names in _OWN.items() if isinstance(module, cls) for name in names if name in attributes]
    return [value for value in map(attributes.__getitem__, names) if isinstance(value, (*_CONTAINERS, fx.Graph))]


class _Copier:
    """One copy of one model. Objects are known by their ids: `found` keeps them alive."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, _registered(model)
        self.own = {id(value): value for _, module in self.modules.values() for value in _own(module)}
        self.found: dict[int, Any] = {key: module for key, (_, module) in self.modules.items()}
        self.holders: dict[int, list[int]] = {}
        """ids of those that lead to it, the one it was found from first"""
        self.kinds: dict[type, Kind] = {}
        self.copies: dict[int, Any] = {}
        self._explore()
        self.changing = self._changing()

    def copy(self) -> Any:
        """The copy of the model, and of all that must lead to copies."""
        if id(self.model) not in self.modules:
            raise InvalidModelError(f"a {type(self.model).__name__} belongs to TorchScript and cannot be copied")
        kinds = [(key, self._kind(self.found[key])) for key in self.changing]
        filled = [(key, kind) for key, kind in kinds if kind.fill is not None]
        for key, _ in filled:
            self._twin(self.found[key])
        for key, kind in sorted(filled, key=lambda pair: pair[1].is_hashed):  # a key's hash may read its attributes
            kind.fill(self.copies[key], self.found[key], self._twin)  # type: ignore[misc]
        return self.copies[id(self.model)]

    def _kind(self, value: Any) -> Kind:
        cls = type(value)
        if cls not in self.kinds:
            self.kinds[cls] = kind_of(cls)
        return self.kinds[cls]

    def _explore(self) -> None:
        """Find all that the modules lead to, and who holds it."""
        stack = list(self.found.values())
        while stack:
            holder = stack.pop()
            kind = self._kind(holder)
            for value in kind.weakly(holder):
                self.holders.setdefault(id(value), []).append(id(holder))
            for value in kind.held(holder):
                if type(value) in LEAVES or (type(value) in _CONTAINERS and not value):
                    continue
                self.holders.setdefault(id(value), []).append(id(holder))
                if id(value) not in self.found:
                    self.found[id(value)] = value
                    stack.append(value)

    def _changing(self) -> dict[int, None]:
        """The modules, what is their own, and all that leads to one of these."""
        changing: dict[int, None] = {}
        stack = [*self.own, *self.modules]
        while stack:
            key = stack.pop()
            if key not in changing:
                changing[key] = None
                stack += self.holders.get(key, ())
        return {key: None for key in changing if key in self.found}

    def _twin(self, value: Any) -> Any:
        """The copy of `value`, made now if need be; itself where it is shared."""
        key = id(value)
        if key not in self.copies:
            if key in self.changing:
                self.copies[key] = self._made(value)
            elif key in self.own:
                self.copies[key] = type(value)()  # empty, or it would have been found
            else:
                return value
        return self.copies[key]

    def _made(self, value: Any) -> Any:
        try:
            return self._kind(value).make(value, self._twin)
        except InvalidModelError:
            raise
        except Exception as error:
            raise InvalidModelError(self._reason(value, error)) from error

    def _reason(self, value: Any, error: Exception) -> str:
        key = id(value)
        while key not in self.modules:
            key = self.holders[key][0]
        name = self.modules[key][0]
        return (
            f"this {type(self.model).__name__} cannot be copied ({type(error).__name__}: {error}), and the given model "
            f"must stay as it is: its module `{name}` has an attribute that leads to a {type(value).__name__}, which "
            "holds a module and cannot be made to hold the copy; take the attribute off the module"
        )
