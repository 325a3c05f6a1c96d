"""What may be given to `optimize`, `plan` and `explain`, and what goes together: each says it before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normpass
from normpass import kernels, measure
from normpass.nn import as_plain_norms
from normpass.passes import Kalman, LeakyReLU, SerializeMinibatch, SerializeNorms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *block, nn.Conv2d(8, 8, 1))


class NeverRuns(nn.Module):
    """Whoever runs it before the options were checked is found out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it ran")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "budget and regions": ({"memory_budget": 0.5, "serialize": True}, "either `serialize` or `memory_budget`"),
    "budget": ({"memory_budget": "much"}, "`memory_budget='much'`: give a fraction such as 0.5"),
    "regions": ({"serialize": 3}, "a SerializeMinibatch or a SerializeNorms, not 3"),
    "tune": ({"tune": True}, "`tune=True` measures for a plan: give a `memory_budget` as well"),
    "lossy": ({"allow_lossy": "no"}, "`allow_lossy` must be True or False, it is 'no'"),
    "winograd": ({"winograd": "no"}, "`winograd` must be True or False, it is 'no'"),
    "changes are none": ({"changes": None}, "`changes` is a sequence of names or option objects, not None"),
    "changes are a number": ({"changes": 3}, "`changes` is a sequence of names or option objects, not 3"),
    "two norms": ({"changes": ("kalman", "sparse_switchable")}, "SparseSwitchable.* both replace batch norms"),
    "one norm twice": ({"changes": (LeakyReLU(0.1), LeakyReLU(0.2))}, "0.1.* and .*0.2.* both replace ReLUs"),
    "no such path": ({"serialize": SerializeNorms(paths=("nothere",))}, "`serialize`: `nothere` is in no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    options, message = REFUSED[name]
    for function in (normpass.optimize, normpass.explain):
        with pytest.raises(normpass.InvalidInputError, match=message):
            function(NeverRuns(), X, **options)


def test_a_budget_and_changes_are_planned_and_explained_alike() -> None:
    report = normpass.explain(network(), X, memory_budget=0.5, changes=("leaky_relu",))
    assert report.plan is not None and report.memory is not None
    assert "leaky_relu" in str(report) and "plan for a budget of 0.5" in str(report)
    optimized = normpass.optimize(network(), X, memory_budget=0.5, changes=("leaky_relu",))
    assert measure.kept_bytes(optimized, X) == report.memory.kept_after == report.plan.planned.kept
    again = normpass.optimize(network(), X, plan=report.plan, changes=("leaky_relu",))
    assert measure.kept_bytes(again, X) == report.plan.planned.kept
    with pytest.raises(normpass.InvalidInputError, match="give them with the budget, to `normpass.optimize`"):
        normpass.plan(network(), X, 0.5, changes=("leaky_relu",))


BARE: dict[str, Callable[[], object]] = {
    "a slope of text": lambda: LeakyReLU(negative_slope="a"),  # type: ignore[arg-type]
    "a slope below 0": lambda: LeakyReLU(negative_slope=-1),
    "a weight above 1": lambda: Kalman(prediction_weight=7),
    "a buffer of text": lambda: SerializeMinibatch(buffer_bytes="1MB"),  # type: ignore[arg-type]
    "other kernels": lambda: kernels.disabled("foo").__enter__(),
    "a number to convert to": lambda: normpass.convert(network(), 3, X),  # type: ignore[arg-type]
    "an opset of text": lambda: normpass.convert(network(), "net.onnx", X, opset="a"),  # type: ignore[arg-type]
    "a number to save at": lambda: normpass.plan(network(), X, 0.9).save(3),  # type: ignore[arg-type]
    "no model to measure": lambda: measure.kept_bytes(3, X),  # type: ignore[arg-type]
    "no model's peak": lambda: measure.peak_bytes(3, X),  # type: ignore[arg-type]
    "no model with norms": lambda: as_plain_norms(3),  # type: ignore[arg-type]
    "one model to time": lambda: measure.step_time(network(), X),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BARE)
def test_errors_are_ours(name: str) -> None:
    with pytest.raises((normpass.InvalidInputError, normpass.InvalidModelError)) as raised:
        BARE[name]()
    assert "`" in str(raised.value)
