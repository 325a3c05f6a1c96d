"""NumPy in forward is NumPy: what it draws, gives and is, and that numbers of it do not break graphs."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import image, norms, spread

import normpass
from normpass.optimized import state_of


class Net(nn.Module):
    def __init__(self, use: Callable, number: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.use, self.number = [use], number

    def forward(self, x):
        return self.use[0](self.body(x), self.number)


def describe(output: Any) -> Any:
    if isinstance(output, tuple):
        return [describe(item) for item in output]
    if isinstance(output, torch.Tensor):
        return [round(value, 8) for value in output.flatten().tolist()]
    return type(output), output.tolist() if isinstance(output, np.ndarray) else output


def calls(model: nn.Module, numbers: tuple) -> list:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    found = []
    for number in numbers:
        model.number = number
        found.append(describe(model(image())))
    return [found, torch.rand(3).tolist(), np.random.rand(3).tolist()]


USES = {
    "normal": lambda y, n: y * np.random.normal(0, 1) * float(np.random.randn(3).sum()),
    "seed": lambda y, n: (np.random.seed(3), y * np.random.rand())[1],
    "percentile": lambda y, n: y * float(np.percentile(y.detach().numpy(), 30)),
    "median": lambda y, n: y * float(np.median(y.detach().numpy())),
    "scalar": lambda y, n: (y, y.detach().numpy().astype(int).max(), np.round(2.5), np.float32(3) * 1.5),
    "class": lambda y, n: y * (2 if isinstance(y.detach().numpy().mean(), np.floating) else 3),
    "tensor of an array": lambda y, n: y * torch.tensor(np.linspace(0, 1, 4))[:, None, None],
    "sum of bytes": lambda y, n: y * int((np.array([200], np.uint8) + np.array([100], np.uint8))[0]),
}
NUMBERS = {
    "probability": lambda y, n: F.dropout(y, n / 10),
    "is a float": lambda y, n: y * (2 if isinstance(n, float) else 3) * (5 if isinstance(n, np.generic) else 7),
    "is an int": lambda y, n: y * (2 if isinstance(n, int) else 3),
    "truth": lambda y, n: y if n else y * 2,
    "factor": lambda y, n: y * n * math.sqrt(abs(n)),
    "of a range": lambda y, n: (y, torch.arange(3) * n),
    "what it is": lambda y, n: (y, n, type(n).__name__, n.dtype.name, n.item()),
    "narrow sum": lambda y, n: y * float(n + n),
}
CHANGING = (np.float64(3.5), np.float64(2.0), np.float64(1.5), np.float64(0.0))
OTHERS = (np.int64(2), np.float32(0.1), np.uint8(200), np.bool_(False), np.bool_(True), np.float64(0.25))


def assert_same(use: Callable, numbers: tuple) -> None:
    model = spread(Net(use))
    expected = calls(copy.deepcopy(model), numbers)
    assert calls(normpass.optimize(model), numbers) == expected


@pytest.mark.parametrize("name", USES)
def test_functions(name: str) -> None:
    assert_same(USES[name], (None, None))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:The (given|input)")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    assert_same(NUMBERS[name], CHANGING)
    if name != "probability":
        assert_same(NUMBERS[name], OTHERS)


def test_an_array_is_refused_as_plain_torch_refuses_it() -> None:
    model = spread(Net(lambda y, n: y))
    for run in (model, normpass.optimize(model)):
        with pytest.raises(TypeError, match="invalid combination of arguments"):
            run(np.ones((2, 3, 8, 8)))


def test_numbers_do_not_break_graphs() -> None:
    model = normpass.optimize(spread(Net(lambda y, n: F.relu(y / np.sqrt(2) * np.prod((2, 3)) * n * np.log2(8)))))
    for number in (np.float64(0.5), np.float64(2.0), np.float64(3.0), np.float64(4.0)):
        model.number = number
        model(image())
    assert state_of(model).captures == 2  # the second makes the number an input of the graph
    assert norms(spread(Net(lambda y, n: y * np.sqrt(2))))["body.1"].rewrite == "split_bn"
