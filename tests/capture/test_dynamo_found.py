"""Generators, bounded deques and histories of tensors that forward finds: the same at every call as in plain Python."""

from __future__ import annotations

import collections
import copy
import itertools
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from training import image, spread

import normpass
from normpass.optimized import state_of


class Net(nn.Module):
    def __init__(self, use: Callable, found: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.use, self.found = [use], [found()]

    def forward(self, x):
        return self.body(x) * self.use[0](self, x, self.found[0])


def counting() -> Iterator[int]:
    yield from itertools.count(1)


def adding() -> Iterator[int]:
    total = 0
    while True:
        total += (yield total) or 1


def appended(model: nn.Module, x: Tensor, found: collections.deque) -> int:
    found.append(found[-1] + 1)
    return len(found) * sum(found)


def pushed(model: nn.Module, x: Tensor, found: collections.deque) -> int:
    found.appendleft(found[0] + 2)
    found.extend([1, 2])
    found.rotate(1)
    return found[0] + 3 * found[-1]


def to_a_deque(model: nn.Module, x: Tensor, found: collections.deque) -> int:
    return collections.deque(range(9), found.maxlen)[0] + 2 * (found.maxlen or 0)


def first_even(model: nn.Module, x: Tensor, found: Iterator[int]) -> int:
    return next(i for i in found if i % 2 == 0)


FOUND = {
    "generator": (lambda m, x, found: next(found), counting),
    "generator with a default": (lambda m, x, found: next(found, 10), lambda: iter(i for i in range(1, 3))),
    "generator sent to": (lambda m, x, found: next(found) + found.send(3), adding),
    "generator in a loop": (first_even, counting),
    "generator that is summed": (lambda m, x, found: 1 + sum(found), lambda: (i for i in range(5))),
    "deque": (appended, lambda: collections.deque([1], maxlen=2)),
    "deque from the left": (pushed, lambda: collections.deque([7, 8, 9], maxlen=4)),
    "deque without a bound": (appended, lambda: collections.deque([1])),
}


def sums(model: nn.Module, calls: int = 4) -> list[float]:
    with torch.no_grad():
        return [round(float(model(image()).sum()), 9) for _ in range(calls)]


@pytest.mark.parametrize("name", FOUND)
def test_it_goes_on_from_call_to_call(name: str) -> None:
    optimized = normpass.optimize(spread(Net(*FOUND[name])))
    assert sums(optimized) == sums(spread(Net(*FOUND[name])))
    assert state_of(optimized).captures > 0


def test_a_bound_that_changes() -> None:
    found = []
    for optimize in (copy.deepcopy, normpass.optimize):
        model = optimize(spread(Net(to_a_deque, lambda: collections.deque([1, 2], maxlen=5))))
        of_model = sums(model, 1)
        for bound in (3, None):
            model.found[0] = collections.deque([1, 2], maxlen=bound)
            of_model += sums(model, 1)
        found.append(of_model)
    assert found[0] == found[1]


def called_with(**options: float) -> float:
    return sum(options.values())


NAMES = {
    "keywords": lambda m, x, found: called_with(**vars(found)),
    "how many": lambda m, x, found: len(vars(found)),
    "whether": lambda m, x, found: 2 if "later" in found.__dict__ else 3,
    "or else": lambda m, x, found: vars(found).get("later", 5.0),
    "names": lambda m, x, found: len("".join(found.__dict__)),
    "of the class": lambda m, x, found: len([name for name in vars(type(found)) if name == "later"]) + 1,
}


class Config:
    def __init__(self) -> None:
        self.scale = 2.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [lambda: type("Case", (Config,), {})(), lambda: types.SimpleNamespace(scale=2.0)])
def test_names_that_come_later_and_go(name: str, kind: Callable) -> None:
    found = []
    for optimize in (copy.deepcopy, normpass.optimize):
        model = optimize(spread(Net(NAMES[name], kind)))
        of_model, config = sums(model, 1), model.found[0]
        for change in (lambda c: setattr(c, "later", 3.0), lambda c: delattr(c, "scale"), lambda c: vars(c).clear()):
            change(config)
            of_model += sums(model, 1)
        if type(config) is not types.SimpleNamespace:
            type(config).later = 1
        found.append([*of_model, *sums(model, 1)])
    assert found[0] == found[1]


HISTORIES = {
    "is_leaf": lambda m, x, found: 2 if x.is_leaf else 3,
    "grad_fn": lambda m, x, found: 2 if x.grad_fn is None else 3,
    "_base": lambda m, x, found: 2 if x._base is None else 3,
    "getattr": lambda m, x, found: 2 if getattr(x, "is_leaf") else 3,  # noqa: B009
}


@pytest.mark.parametrize("name", HISTORIES)
def test_where_an_input_comes_from(name: str) -> None:
    leaf = image(2, 3, 6, 6, requires_grad=True)
    inputs = (leaf, leaf * 2, image(2, 3, 6, 6), image(3, 3, 6, 6)[1:], leaf.view(2, 3, 6, 6), leaf)
    model = spread(Net(HISTORIES[name], int))
    optimized = normpass.optimize(copy.deepcopy(model))
    for x in inputs:
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-12, atol=1e-12)
