"""What leads to a module, by whatever object, leads in the copy to the module's copy."""

from __future__ import annotations

import functools
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shared_copies import Net, assert_same_numbers, checked_copy, image
from torch import nn

Two = namedtuple("Two", "module number")


@dataclass(frozen=True)
class Frozen:
    module: nn.Module
    number: int = 1


class Slotted:
    __slots__ = ("module", "unset", "__weakref__")

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Strict:
    """Sets, reads, copies and compares in its own way."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "module", module)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __deepcopy__(self, memo: dict) -> Strict:
        raise TypeError("no")

    def __hash__(self) -> int:
        return hash(self.module)

    def __eq__(self, other: object) -> bool:
        return type(other) is Strict and other.module is self.module


class OwnList(list):
    def append(self, item: Any) -> None:
        raise TypeError("no")

    extend = __iter__ = append  # type: ignore[assignment]


class OwnDict(OrderedDict):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("no")


def own_dict(module: nn.Module) -> OwnDict:
    new = OwnDict()
    OrderedDict.__setitem__(new, "a", module)
    return new


HOLDERS = {
    "list": (lambda m: [m], lambda h: h[0]),
    "tuple": (lambda m: (1, (m,)), lambda h: h[1][0]),
    "namedtuple": (lambda m: Two(m, 1), lambda h: h.module),
    "dict": (lambda m: {"a": {"b": m}}, lambda h: h["a"]["b"]),
    "key": (lambda m: {m: 1}, lambda h: next(k for k in h if h[k] == 1)),
    "ordered": (lambda m: OrderedDict(a=m), lambda h: h["a"]),
    "defaultdict": (lambda m: defaultdict(list, a=[m]), lambda h: h["a"][0]),
    "counter": (lambda m: Counter({m: 2}), lambda h: next(k for k in h if h[k] == 2)),
    "set": (lambda m: {m}, lambda h: next(m for m in h if m in h)),
    "frozenset": (lambda m: frozenset({m}), lambda h: next(m for m in h if m in h)),
    "deque": (lambda m: deque([m], 3), lambda h: h[0] if h.maxlen == 3 else None),
    "frozen_dataclass": (Frozen, lambda h: h.module),
    "slots": (Slotted, lambda h: h.module),
    "strict": (Strict, lambda h: h.module),
    "strict_key": (lambda m: {Strict(m): 1}, lambda h: next(k for k in h if h[k] == 1).module),
    "own_list": (lambda m: OwnList([m]), lambda h: h[0]),
    "own_dict": (own_dict, lambda h: h["a"]),
    "namespace": (lambda m: types.SimpleNamespace(m=m), lambda h: h.m),
    "partial": (lambda m: functools.partial(isinstance, m), lambda h: h.args[0]),
    "partial_keyword": (lambda m: functools.partial(dict, m=m), lambda h: h()["m"]),
    "method": (lambda m: m.forward, lambda h: h.__self__),
    "method_of_c": (lambda m: [m].copy, lambda h: h()[0]),
    "closure": (lambda m: lambda: m, lambda h: h()),
    "default": (lambda m: types.FunctionType((lambda m: m).__code__, {}, "f", (m,)), lambda h: h()),
    "keyword_default": (lambda m: (lambda f: f)(lambda *, given=m: given), lambda h: h()),
    "function_attribute": (lambda m: with_attribute(m), lambda h: h.module),
    "cached": (lambda m: functools.lru_cache(lambda: m), lambda h: h()),
    "weakref": (weakref.ref, lambda h: h()),
    "weak_method": (lambda m: weakref.WeakMethod(m.forward), lambda h: h().__self__),
    "proxy": (lambda m: {"p": weakref.proxy(m)}, lambda h: h["p"].forward.__self__),
    "weak_keys": (lambda m: weakref.WeakKeyDictionary({m: 1}), lambda h: next(k for k in h if h[k] == 1)),
    "weak_values": (lambda m: weakref.WeakValueDictionary(a=m), lambda h: h["a"]),
    "weak_set": (lambda m: weakref.WeakSet([m]), lambda h: next(m for m in h if m in h)),
}


def with_attribute(module: nn.Module) -> Any:
    def function() -> None:
        """What it says."""

    function.module = module  # type: ignore[attr-defined]
    return function


@pytest.mark.parametrize("name", HOLDERS)
def test_what_leads_to_a_module_leads_to_its_copy(name: str) -> None:
    make, read = HOLDERS[name]
    model = Net()
    model.holder = make(model.norm)
    copied = checked_copy(model)
    assert type(copied.holder) is type(model.holder) and copied.holder is not model.holder
    assert read(copied.holder) is copied.norm
    assert read(model.holder) is model.norm
    assert not isinstance(model.holder, types.FunctionType) or model.holder.__doc__ == copied.holder.__doc__


def test_cycles_and_one_object_twice() -> None:
    model = Net()
    model.__dict__["parent"] = model
    model.ring = [model.norm]
    model.ring += [model.ring, (model.ring,)]
    model.conv.same = model.ring
    first, second = shared_closures(model)
    model.first, model.second = first, second
    copied = checked_copy(model)
    assert copied.parent is copied and copied.ring[1] is copied.ring is copied.conv.same is copied.ring[2][0]
    assert copied.ring[0] is copied.norm
    copied.first()
    assert copied.second() == (copied, 1) and model.second() == (model, 1)


def shared_closures(module: nn.Module) -> tuple[Any, Any]:
    count = 0

    def add() -> nn.Module:
        nonlocal count
        count += 1
        return module

    return add, lambda: (module, count)


def test_hooks_and_their_handles() -> None:
    model, calls = Net().double(), []
    model.watch = types.MethodType(lambda self, module, *_: calls.append((self, module)), model)
    model.handle = model.norm.register_forward_hook(model.watch)
    model.other = model.conv.register_forward_pre_hook(lambda module, *_: calls.append((model, module)))
    copied = checked_copy(model)
    copied(image())
    assert calls == [(copied, copied.conv), (copied, copied.norm)]
    copied.handle.remove()
    copied.other.remove()
    assert not copied.norm._forward_hooks and not copied.conv._forward_pre_hooks
    assert model.norm._forward_hooks and model.conv._forward_pre_hooks


def test_hooks_of_state_dicts() -> None:
    model, seen = Net(), []
    model.note = seen
    model.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_state_dict_post_hook(lambda module, *_: seen.append(module))
    copied = checked_copy(model)
    seen.clear()
    copied.load_state_dict(copied.state_dict())
    assert [module is copied for module in seen] == [True, True]


def test_forward_wrapped_on_the_instance() -> None:
    model = Net().double()
    original = model.forward
    model.forward = lambda *arguments: original(*arguments)
    copied = checked_copy(model)
    assert_same_numbers(model, copied, image())
    copied.norm = nn.Identity()
    assert not torch.equal(model(image()), copied(image()))


def test_a_trainer_that_knows_the_model() -> None:
    trainer = types.SimpleNamespace(log=[], settings=object())
    model = Net(trainer=trainer)
    trainer.model = model
    copied = checked_copy(model)
    assert copied.trainer is not trainer and copied.trainer.model is copied
    assert copied.trainer.log is trainer.log and copied.trainer.settings is trainer.settings
