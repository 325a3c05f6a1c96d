"""A plain model and its optimized twin, for the tests that change both alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import ConvNet, spread

import normpass


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return spread(ConvNet())


@pytest.fixture
def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A plain model and an optimized one that share nothing."""
    return model, normpass.optimize(copy.deepcopy(model))
