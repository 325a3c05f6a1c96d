"""The check that runs after a rewrite finds what it is there to find."""

import copy

import pytest
from torch import nn

from normpass.errors import VerificationError
from normpass.rewrite.verify import verify_state


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_state_that_differs() -> None:
    model = net()
    verify_state(model, model)
    verify_state(model, nn.Sequential(*model))
    with pytest.raises(VerificationError, match="`0.weight` is no longer the given model's tensor"):
        verify_state(model, copy.deepcopy(model))
    with pytest.raises(VerificationError, match="keys changed"):
        verify_state(model, nn.Sequential(*list(model)[:-1]))


def test_what_a_change_may_add() -> None:
    model = net()
    other = nn.Sequential(*model)
    other[1] = nn.GroupNorm(2, 4)  # has no running statistics
    other[1].weight, other[1].bias = model[1].weight, model[1].bias
    other[2].register_parameter("slope", nn.Parameter(model[1].bias.detach().clone()))
    verify_state(model, other, may_add=True)
    with pytest.raises(VerificationError, match="keys changed"):
        verify_state(model, other)
    other[1].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(VerificationError, match="`1.weight` is no longer"):
        verify_state(model, other, may_add=True)
