"""Models whose forward is a function, run plain and optimized from one start: the same numbers, or the same error."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from nested import leaves
from torch import Tensor, nn
from training import captures_of, image, loss_of, spread

import normpass
from normpass.pipeline import Rewritten

C = 4
TOLERANCE = 1e-11


def block(inputs: int = C, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, C, 3, padding=1), nn.BatchNorm2d(C), activation())


class Net(nn.Module):
    """conv → norm → ReLU → conv; what a case does stands in its `forward`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.body, self.last = block(3), nn.Conv2d(C, C, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.last(self.body(x))


def net(forward: Callable = Net.forward, **attributes: Any) -> Callable[[], nn.Module]:
    """A factory of a `Net` with this forward; every call has a class and attributes of its own."""

    def make() -> nn.Module:
        return type("Case", (Net,), {"forward": forward})(**copy.deepcopy(attributes))

    return make


def images(*shape: int, seed: int = 0) -> Tensor:
    return image(*(shape or (2, 3, 6, 6)), seed=seed)


def steps(model: Callable, *args: Any, count: int = 2) -> list[Tensor]:
    """Outputs and gradients of steps without an optimizer, and the buffers afterwards."""
    numbers: list[Tensor] = []
    for _ in range(count):
        model.zero_grad()
        output = model(*(args or (images(),)))
        loss_of(output).backward()
        numbers += [t.detach().clone() for _, t in leaves(output)]
        numbers += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return numbers + [b.clone() for b in model.buffers()]


def then(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], list[Tensor]]:
    """A step, a change, a step."""

    def run(model: nn.Module) -> list[Tensor]:
        first = steps(model, count=1)
        change(model)
        return first + steps(model, count=1)

    return run


STATE = types.SimpleNamespace()
"""what forward reads and writes outside its module"""


def outcome(make: Callable[[], nn.Module], run: Callable, optimize: Callable) -> list[Tensor]:
    STATE.__dict__.update(factor=1.0, log=[], object=None)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = optimize(spread(make()))
    return [torch.as_tensor(n).double() for n in run(model)]


def assert_equal(plain: Iterable[Tensor], ours: Iterable[Tensor]) -> None:
    plain, ours = list(plain), list(ours)
    assert len(plain) == len(ours)
    for a, b in zip(plain, ours, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(a.nan_to_num().abs().max()) if a.numel() else 0.0)
        torch.testing.assert_close(b, a, rtol=0, atol=scale * TOLERANCE, equal_nan=True)


def assert_same(make: Callable[[], nn.Module], run: Callable = steps, norms: int = 1) -> int:
    """Plain and optimized give the same; at least so many norms were rewritten. Returns the number of graphs."""
    captures: list[list[Rewritten]] = []

    def optimize(model: nn.Module) -> nn.Module:
        optimized = normpass.optimize(model)
        captures.append(captures_of(optimized))
        return optimized

    assert_equal(outcome(make, run, lambda model: model), outcome(make, run, optimize))
    (graphs,) = captures
    assert sum(choice.rewrite is not None for graph in graphs for choice in graph.choices) >= norms
    return len(graphs)


def cases(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def multiplied(factor: Callable) -> Callable:
    return lambda self, x: self.last(self.body(x)) * factor(self)
