"""`checkpoint` and what changes between forward and the backward that runs a region again.

Around a model, or a slice of one, the region is torch's: it does as plain does. Inside one it is captured with the
rest: backward runs again what forward ran, where plain runs Python as it is by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from training import image, loss_of, spread

import normpass

Numbers = list[Tensor] | str


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))


class Inside(nn.Module):
    """A region of its own forward is checkpointed."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.use_reentrant = block(3), block(4), 1.0, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.region, x, use_reentrant=self.use_reentrant))

    def region(self, x: Tensor) -> Tensor:
        return self.a(x).sin() * self.scale


def around(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def around_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)


def around_a_part(model: nn.Module, x: Tensor) -> Tensor:
    return model.b(checkpoint(model.a, x, use_reentrant=False))


def outcome(model: nn.Module, run: Callable[..., Tensor], training: bool, between: Callable[..., object]) -> Numbers:
    torch.manual_seed(3)
    x = image(requires_grad=True)
    loss = loss_of(run(model.train(training), x))
    between(model)
    try:
        loss.backward()
    except CheckpointError as error:
        return str(error)
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [t for t in (*gradients, *model.buffers()) if t is not None]


def pair(use_reentrant: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = spread(Inside(use_reentrant))
    return plain, normpass.optimize(copy.deepcopy(plain))


def other_mode(model: nn.Module) -> None:
    model.train(not model.training)


def nothing(model: nn.Module) -> None:
    """All stays as it is."""


def assert_close(found: Numbers, expected: Numbers) -> None:
    assert isinstance(found, list) and isinstance(expected, list)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("run", [around, around_reentrant, around_a_part, Inside.__call__])
def test_as_plain(run: Callable[..., Tensor], training: bool) -> None:
    """Where the region is torch's, with `use_reentrant=True` inside as well."""
    plain, optimized = pair(use_reentrant=True)
    expected, found = (outcome(m, run, training, other_mode) for m in (plain, optimized))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_inside_a_model_forward_decides(training: bool) -> None:
    """Plain notices another mode, though not another number; the gradients are those of what forward computed."""
    plain, optimized = pair()
    assert isinstance(outcome(copy.deepcopy(plain), Inside.__call__, training, other_mode), str)
    expected = outcome(plain, Inside.__call__, training, nothing)
    assert_close(outcome(optimized, Inside.__call__, training, other_mode), expected)


def test_inside_a_model_an_attribute_may_change() -> None:
    plain, optimized = pair()
    expected = outcome(plain, Inside.__call__, True, nothing)
    assert_close(outcome(optimized, Inside.__call__, True, lambda model: setattr(model, "scale", 3.0)), expected)
