"""How Python's objects are looked into and made again, kind by kind; for `shared_copy`.

    kind_of(class) ──► Kind: what an object holds, an empty copy of it, how that is filled

Never by an object's own `__deepcopy__`, `__getstate__`, `__setattr__` or `__getattr__`, which may copy too much or
refuse: attributes are read from `__dict__` and slots, containers through the methods of their built-in base. What can
change is made empty and filled later, so cycles need no care; what cannot (a tuple, a bound method) is made of copies.
"""

from __future__ import annotations

import copy
import enum
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

Twin = Callable[[Any], Any]
"""object -> its copy, or the object itself where it is shared"""

LEAVES = frozenset({bool, int, float, complex, str, bytes, type(None), type, Tensor, nn.Parameter, torch.dtype})
"""classes of which no object holds another: what most attributes are"""

NEVER_COPIED: tuple[type, ...] = (
    *(Tensor, torch.jit.ScriptModule, fx.Node, type, enum.Enum),
    *(types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, types.CoroutineType),
)


def nothing(value: Any) -> Iterable[Any]:
    """Holds nothing."""
    return ()


@dataclass(frozen=True)
class Kind:
    """How objects of some classes are looked into and made again."""

    held: Callable[[Any], Iterable[Any]]
    make: Callable[[Any, Twin], Any]
    """the copy; an empty one where there is `fill`"""
    fill: Callable[[Any, Any, Twin], None] | None = None
    """(copy, original, twin); None for what cannot change"""
    weakly: Callable[[Any], Iterable[Any]] = nothing
    """what it points at without holding it"""
    is_hashed: bool = False


def kind_of(cls: type) -> Kind:
    """The kind of the objects of a class."""
    if issubclass(cls, NEVER_COPIED):
        return Kind(nothing, _refused)
    if issubclass(cls, nn.Module):
        return _MODULE
    special = next((base for base in cls.__mro__ if base in _SPECIAL), None)
    return _SPECIAL[special] if special else _BUILT_IN.get(_builtin_base(cls), _OPAQUE)


def _builtin_base(cls: type) -> Any:
    """The nearest base that was not written in Python."""
    heap, immutable = 1 << 9, 1 << 8
    return next(base for base in cls.__mro__ if not base.__flags__ & heap or base.__flags__ & immutable)


def _refused(value: Any, twin: Twin) -> Any:
    raise TypeError(f"a {type(value).__name__} cannot be made again")


def _referents(value: Any) -> Iterable[Any]:
    """What a generator, or an object of C, holds directly."""
    if not isinstance(value, types.GeneratorType):
        return gc.get_referents(value)
    return value.gi_frame.f_locals.values() if value.gi_frame else ()


# --- attributes, modules --------------------------------------------------------------------------


def dict_of(value: Any) -> dict[str, Any]:
    """An object's `__dict__`, past any `__getattribute__`; empty where it has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


@functools.cache
def _slots(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    python = (base for base in cls.__mro__ if _builtin_base(base) is not base)
    return tuple(s for base in python for s in vars(base).values() if isinstance(s, types.MemberDescriptorType))


def _slots_of(value: Any) -> Iterator[tuple[types.MemberDescriptorType, Any]]:
    for slot in _slots(cast("Any", type(value))):
        try:
            yield slot, slot.__get__(value)
        except AttributeError:  # not set
            continue


def _attributes(value: Any) -> list[Any]:
    return [*dict_of(value).values(), *(item for _, item in _slots_of(value))]


def _fill_attributes(new: Any, old: Any, twin: Twin) -> None:
    attributes = dict_of(old)
    if attributes:
        dict_of(new).update({name: v if type(v) in LEAVES else twin(v) for name, v in attributes.items()})
    for slot, item in _slots_of(old):
        slot.__set__(new, twin(item))


def _empty(value: Any, twin: Twin) -> Any:
    return _builtin_base(type(value)).__new__(type(value))


def _empty_module(module: nn.Module, twin: Twin) -> nn.Module:
    """A twin of the class too where it is the object's own: `recompile()` and parametrize write to it."""
    cls = type(module)
    parametrized = cls.__name__.startswith("Parametrized") and "parametrizations" in dict_of(module).get("_modules", {})
    if not parametrized and not issubclass(cls, fx.GraphModule):
        return object.__new__(cls)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    names["__qualname__"] = cls.__qualname__  # by which `GraphModule.__new__` knows what is an object's own
    called = names.get("_wrapped_call")  # of `recompile()`: knows the class whose `super()` it calls
    if called is not None:
        names["_wrapped_call"] = called = copy.copy(called)
    own = cast("Any", type(cls))(cls.__name__, cls.__bases__, names)
    if called is not None:
        called.cls = own
    return object.__new__(own)


def _fill_module(new: nn.Module, old: nn.Module, twin: Twin) -> None:
    _fill_attributes(new, old, twin)
    dict_of(new).pop("_compiled_call_impl", None)  # made by `module.compile()` for the original; deepcopy drops it too


def _fill_graph(new: fx.Graph, old: fx.Graph, twin: Twin) -> None:
    new.owning_module = twin(old.owning_module)


# --- containers -----------------------------------------------------------------------------------


def _empty_deque(value: deque, twin: Twin) -> deque:
    new = deque.__new__(type(value))
    deque.__init__(new, (), value.maxlen)
    return new


def _fill_items(new: Any, old: Any, twin: Twin) -> None:
    base = _builtin_base(type(old))
    extend = set.update if base is set else base.extend
    extend(new, [twin(item) for item in base.__iter__(old)])
    _fill_attributes(new, old, twin)


def _items(value: Any) -> list[Any]:
    return [*_builtin_base(type(value)).__iter__(value), *_attributes(value)]


def _again_of_items(value: Any, twin: Twin) -> Any:
    base = _builtin_base(type(value))
    new = base.__new__(type(value), [twin(item) for item in base.__iter__(value)])
    _fill_attributes(new, value, twin)
    return new


def _entries(value: dict) -> list[Any]:
    factory = [value.default_factory] if isinstance(value, defaultdict) else []
    return [*dict.keys(value), *dict.values(value), *factory, *_attributes(value)]


def _fill_dict(new: Any, old: dict, twin: Twin) -> None:
    base = _builtin_base(type(old))
    for key, value in base.items(old):
        base.__setitem__(new, twin(key), twin(value))
    if isinstance(old, defaultdict):
        new.default_factory = twin(old.default_factory)
    _fill_attributes(new, old, twin)


# --- what is called: the code is shared, what it is bound to is not -------------------------------

_OF_A_FUNCTION: tuple[str, ...] = ("__qualname__", "__module__", "__doc__", "__type_params__")
_OF_A_FUNCTION += ("__annotate__",) if hasattr(types.FunctionType, "__annotate__") else ("__annotations__",)


def _function_parts(value: types.FunctionType) -> list[Any]:
    keywords = (value.__kwdefaults__ or {}).values()
    return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *keywords, *vars(value).values()]


def _empty_function(value: types.FunctionType, twin: Twin) -> types.FunctionType:
    cells = tuple(twin(cell) for cell in value.__closure__ or ())
    return types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)


def _fill_function(new: types.FunctionType, old: types.FunctionType, twin: Twin) -> None:
    for name in _OF_A_FUNCTION:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    if old.__defaults__ is not None:
        new.__defaults__ = tuple(twin(value) for value in old.__defaults__)
    if old.__kwdefaults__ is not None:
        new.__kwdefaults__ = {name: twin(value) for name, value in old.__kwdefaults__.items()}
    _fill_attributes(new, old, twin)


def _in_cell(value: types.CellType) -> list[Any]:
    try:
        return [value.cell_contents]
    except ValueError:  # empty
        return []


def _fill_cell(new: types.CellType, old: types.CellType, twin: Twin) -> None:
    new.cell_contents = twin(old.cell_contents)


def _method_again(value: types.MethodType, twin: Twin) -> Any:
    return type(value)(twin(value.__func__), twin(value.__self__))


def _bound_in_c(value: Any, twin: Twin) -> Any:
    return getattr(twin(value.__self__), value.__name__)


def _partial_parts(value: functools.partial) -> list[Any]:
    return [value.func, *value.args, *value.keywords.values(), *_attributes(value)]


def _empty_partial(value: functools.partial, twin: Twin) -> Any:
    return functools.partial.__new__(type(value), len)


def _fill_partial(new: Any, old: functools.partial, twin: Twin) -> None:
    keywords = {name: twin(value) for name, value in old.keywords.items()}
    new.__setstate__((twin(old.func), tuple(twin(value) for value in old.args), keywords, None))
    _fill_attributes(new, old, twin)


def _cached_again(value: Any, twin: Twin) -> Any:
    return functools.lru_cache(**value.cache_parameters())(twin(value.__wrapped__))


# --- weak references ------------------------------------------------------------------------------


def _referent(value: Any) -> list[Any]:
    target = weakref.ref.__call__(value)
    return [] if target is None else [target]


def _callback(value: weakref.ref) -> list[Any]:
    return [] if value.__callback__ is None else [value.__callback__]


def _reference_again(value: weakref.ref, twin: Twin) -> Any:
    if isinstance(value, weakref.WeakMethod):
        method: Any = value()
        return type(value)(_method_again(method, twin))
    return type(value)(twin(_referent(value)[0]), *(twin(callback) for callback in _callback(value)))


def _behind_proxy(value: Any) -> list[Any]:
    try:
        return [value.__repr__.__self__]
    except (ReferenceError, AttributeError):  # it is gone, or hides
        return []


def _proxy_again(value: Any, twin: Twin) -> Any:
    return weakref.proxy(twin(_behind_proxy(value)[0]))


def _fill_weak_set(new: weakref.WeakSet, old: weakref.WeakSet, twin: Twin) -> None:
    new.update(twin(item) for item in old)


def _fill_weak_dict(new: Any, old: Any, twin: Twin) -> None:
    new.update({twin(key): twin(value) for key, value in old.items()})


def _again_by_class(value: Any, twin: Twin) -> Any:
    return type(value)()


_PLAIN = Kind(_attributes, _empty, _fill_attributes)
_MODULE = Kind(_attributes, _empty_module, _fill_module)
_OPAQUE = Kind(_referents, _refused)
_DICT = Kind(_entries, _empty, _fill_dict, is_hashed=True)
_WEAK_KEYS = Kind(lambda v: list(v.values()), _again_by_class, _fill_weak_dict, lambda v: list(v), is_hashed=True)
_WEAK_VALUES = Kind(lambda v: list(v), _again_by_class, _fill_weak_dict, lambda v: list(v.values()), is_hashed=True)
_IN_C = Kind(lambda value: [value.__self__], _bound_in_c)
_PROXY = Kind(nothing, _proxy_again, weakly=_behind_proxy)

_SPECIAL: dict[type, Kind] = {
    fx.Graph: Kind(lambda graph: [graph.owning_module], lambda graph, twin: copy.deepcopy(graph), _fill_graph),
    weakref.WeakSet: Kind(nothing, _again_by_class, _fill_weak_set, lambda v: list(v), is_hashed=True),
    weakref.WeakKeyDictionary: _WEAK_KEYS,
    weakref.WeakValueDictionary: _WEAK_VALUES,
}
"""by class, before any built-in base"""

_BUILT_IN: dict[Any, Kind] = {
    object: _PLAIN,
    types.SimpleNamespace: _PLAIN,
    **dict.fromkeys((dict, OrderedDict, defaultdict), _DICT),
    list: Kind(_items, _empty, _fill_items),
    deque: Kind(_items, _empty_deque, _fill_items),
    set: Kind(_items, _empty, _fill_items, is_hashed=True),
    **dict.fromkeys((tuple, frozenset), Kind(_items, _again_of_items)),
    types.FunctionType: Kind(_function_parts, _empty_function, _fill_function),
    types.CellType: Kind(_in_cell, lambda cell, twin: types.CellType(), _fill_cell),
    types.MethodType: Kind(lambda value: [value.__func__, value.__self__], _method_again),
    **dict.fromkeys((types.BuiltinMethodType, types.MethodWrapperType), _IN_C),
    functools.partial: Kind(_partial_parts, _empty_partial, _fill_partial),
    type(functools.lru_cache(len)): Kind(_attributes, _cached_again),
    weakref.ref: Kind(_callback, _reference_again, weakly=_referent),
    **dict.fromkeys((weakref.ProxyType, weakref.CallableProxyType), _PROXY),
}
"""by `_builtin_base`; what is not here is opaque: shared, or refused where it holds what is copied"""
