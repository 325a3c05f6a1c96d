"""Capturing neither draws random numbers nor lets those of other threads come again."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normpass


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(self.conv(x)), 0.5) + random.random()
        return y + torch.rand_like(y)


def image() -> Tensor:
    return torch.ones(2, 3, 8, 8)


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand((), dtype=torch.float64).item(),
    "python": random.random,
}


@pytest.mark.parametrize("kind", DRAWS)
def test_what_other_threads_draw_does_not_come_again(kind: str) -> None:
    draw, seen, begun, ended = DRAWS[kind], [], threading.Event(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            seen.append(draw())
            begun.set()
            ended.wait(0.0002)

    optimized = normpass.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(10)
        optimized(image())
    finally:
        ended.set()
        thread.join()
    assert len(seen) > 10 and len(set(seen)) == len(seen)


def test_capturing_draws_nothing() -> None:
    plain = Drawing()
    optimized = normpass.optimize(copy.deepcopy(plain))
    found = []
    for model in (plain, optimized):
        torch.manual_seed(0), random.seed(0)
        results = [model(image()).detach() for _ in range(2)]
        found.append((*results, torch.rand(3), torch.tensor(random.random())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert random.setstate.__self__.__class__ is random.Random  # and is what it was


def test_a_state_is_put_back_where_it_is_asked_for() -> None:
    """By the thread that has captured, too."""
    optimized, state = normpass.optimize(nn.BatchNorm2d(3)), random.getstate()
    optimized(image())  # which is captured, and leaves the state as it is
    first = random.random()
    random.setstate(state)
    assert random.random() == first
