"""Batch norms with a cumulative average (`momentum=None`), whose layer makes a number of its counter."""

import copy

import torch
from exactness import compare
from torch import nn
from training import captures_of

import normpass
from normpass.measure import kept_bytes


class Scaled(nn.BatchNorm2d):
    """One that is called by a subclass, with another result."""

    def forward(self, x):
        return 2 * super().forward(x)


def build() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, Scaled(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 4, 3))


def inputs(step: int) -> tuple:
    return (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)) + step,)


def test_it_is_captured_and_trains_the_same():
    captures = []

    def optimize(given: nn.Module) -> nn.Module:
        optimized = normpass.optimize(given)
        x = inputs(0)[0].double()
        assert kept_bytes(optimized, x) < 0.6 * kept_bytes(given, x)
        captures.append(captures_of(optimized))
        return optimized

    result = compare(build, inputs, optimize, steps=3)
    assert result.ok, result
    assert (
        len(captures) == len(captures[0]) == 1
    )  # that of eval mode: the counter of every step is read by the graph of the first


def test_a_forward_that_somebody_put_there_is_called(monkeypatch):
    plain_forward = nn.modules.batchnorm._BatchNorm.forward
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: plain_forward(self, x) + 1)
    plain = build()
    optimized = normpass.optimize(copy.deepcopy(plain))
    torch.testing.assert_close(optimized(*inputs(0)), plain(*inputs(0)))
