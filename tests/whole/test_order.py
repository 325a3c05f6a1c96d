"""A norm stays where it stands: nobody sees its running statistics, counter or parameters before or after their time.

A norm that takes a residual runs where that is added, one that is joined with the depthwise convolution behind it where
that stands; `between` is what stands between the two places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import assert_same_step

import normpass

Between = Callable[[nn.Module, Tensor], Tensor]


def moved(change: Callable[[nn.Module], object]) -> Between:
    """What changes the norm's state, as nobody's gradient sees it."""

    def between(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            change(model.norm)
        return x.cos()

    return between


def shared(model: nn.Module, x: Tensor) -> Tensor:
    return model.norm(x.cos()).sin()


def copied(model: nn.Module, x: Tensor) -> Tensor:
    model.other.running_mean.copy_(model.norm.running_mean)
    return x.cos()


BETWEEN: dict[str, Between] = {
    "nothing": lambda model, x: x.cos(),
    "running_mean is read": lambda model, x: x * model.norm.running_mean.sum(),
    "running_var is read": lambda model, x: x * model.norm.running_var.clone().sum(),
    "a view is read": lambda model, x: x * model.norm.running_mean[:2].sum(),
    "storage is read": lambda model, x: x * model.together.sum(),
    "the counter is read": lambda model, x: x * model.norm.num_batches_tracked,
    "a checkpoint reads": lambda model, x: checkpoint(
        lambda t: t * model.norm.running_mean.sum(), x, use_reentrant=False
    ),
    "running_mean is copied": copied,
    "the norm is called": shared,
    "its statistics are used": lambda model, x: F.batch_norm(x, model.norm.running_mean, model.norm.running_var),
    "the weight is read": lambda model, x: x * model.norm.weight.sum(),
    "the bias is written": moved(lambda norm: norm.bias.add_(1)),
    "the bias is written as data": moved(lambda norm: norm.bias.data.add_(1)),
    "the weight is written": moved(lambda norm: norm.weight.data.mul_(2)),
}


class Stays(nn.Module):
    def __init__(self, between: Between, arrangement: str, channels: int = 8) -> None:
        super().__init__()
        self.between, self.arrangement = between, arrangement
        self.conv, self.norm = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)
        self.other = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.register_buffer("together", torch.zeros(2 * channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.norm(x)
        if self.arrangement == "joined":
            y = F.relu(y)
            z = self.between(self, x)
            return self.depthwise(y) + z
        if self.arrangement == "residual":
            return F.relu(y + self.between(self, x))
        y += self.between(self, x)
        return F.relu(y, inplace=True)


@pytest.mark.parametrize("arrangement", ["residual", "residual in place", "joined"])
def test_nothing_passes_it(arrangement: str) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last)
    for name, between in BETWEEN.items():
        torch.manual_seed(0)
        plain = Stays(between, arrangement).double().to(memory_format=torch.channels_last)
        optimized = normpass.optimize(copy.deepcopy(plain))
        for model in (plain, optimized):
            model.norm.running_mean = model.together[:8]
        for _ in range(2):
            try:
                assert_same_step(plain, optimized, x)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
