"""Batches and numbers that are odd or wrong: the plain model's numbers, or its error."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import C, conv, small, trains_alike_by
from torch import Tensor, nn
from training import assert_equal, image, loss_of, train

import normpass
from normpass.measure import kept_bytes


def test_an_empty_batch_and_one_with_nan() -> None:
    trains_alike_by(small(nn.BatchNorm2d(C), nn.ReLU()), image(0, 3, 8, 8))
    x = image()
    x[0, 0, 0, 0] = float("nan")
    x[1, 1, 1, 1] = float("inf")
    trains_alike_by(small(nn.BatchNorm2d(C), nn.ReLU()), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_values(layout) -> None:
    """Up to where a variance overflows, a norm's gradient has its part through the statistics."""
    norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]).double()
    for scale in (1e100, 1e120, 1e150):
        x = (image(2, 8, 4, 4) * scale).contiguous(memory_format=layout).requires_grad_()
        found = []
        for optimize in (copy.deepcopy, normpass.optimize):
            model = optimize(LargeValues(norms))
            found.append([g * scale for g in torch.autograd.grad(loss_of(model(x)), x)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


class LargeValues(nn.Module):
    """A norm by itself, and one of a concatenation."""

    def __init__(self, norms: nn.ModuleList) -> None:
        super().__init__()
        self.norms = norms

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return self.norms[0](x), F.relu(self.norms[1](torch.cat([second, first], 1)))


def test_one_value_per_channel() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()).double()
    optimized = normpass.optimize(model)
    for m in (model, optimized):
        for _ in range(2):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
                m(image(1, 3))
            assert type(error.value) is ValueError
    torch.testing.assert_close(optimized.eval()(image(1, 3)), model.eval()(image(1, 3)))
    assert_equal(*(train(copy.deepcopy(m).train(), (image(3, 3),)) for m in (model, optimized)))


def error_of(model: nn.Module, x: torch.Tensor) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        model(x)
    return type(error.value), str(error.value)


def test_a_wrong_shape_raises_what_plain_raises() -> None:
    """Before anything was captured and afterwards; then a right one runs, and keeps what it should."""
    model = small(nn.BatchNorm2d(C), nn.ReLU())
    optimized = normpass.optimize(copy.deepcopy(model))
    for _ in range(2):
        for shape in ((2, 8, 8), (8, 8), (2, 3, 4, 8, 8), (2, 5, 8, 8)):
            assert error_of(optimized, image(*shape)) == error_of(model, image(*shape))
        torch.testing.assert_close(optimized(image()), model(image()))
    assert kept_bytes(optimized, image()) < 0.8 * kept_bytes(model, image())


def test_models_that_raise_what_plain_raises() -> None:
    """A norm of another width; mixed dtypes; complex input; a negative eps."""
    mixed = small(nn.BatchNorm2d(C), nn.ReLU()).float()
    mixed[1].double()
    negative = small(nn.BatchNorm2d(C, eps=-1.0), nn.ReLU())
    complex_conv = nn.Sequential(nn.Conv2d(3, C, 1, dtype=torch.complex64), nn.BatchNorm2d(C), nn.ReLU())
    for model, x in [
        (small(nn.BatchNorm2d(C + 1), nn.ReLU()), image()),
        (mixed, image().float()),
        (complex_conv, image().to(torch.complex64)),
        (negative, image()),
    ]:
        assert error_of(normpass.optimize(model), x) == error_of(model, x)


class Joined(nn.Module):
    """A norm before an addition, one of a concatenation, one before a depthwise convolution."""

    def __init__(self, eps: Any) -> None:
        super().__init__()
        self.first, self.depthwise = conv(), nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)
        self.a, self.b, self.c = (
            nn.BatchNorm2d(C, eps=eps),
            nn.BatchNorm2d(2 * C, eps=eps),
            nn.BatchNorm2d(2 * C, eps=eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        z = self.b(torch.cat([F.relu(self.a(x) + x), x], 1))
        return self.depthwise(F.silu(self.c(F.leaky_relu(z, 0.1))))


@pytest.mark.parametrize("eps", [1, 10**6, 0, 0.0, -1, -1e-5, math.nan, math.inf, True], ids=str)
@pytest.mark.parametrize("lossy", [False, True])
def test_odd_eps(eps: Any, lossy: bool) -> None:
    """The numbers or the error of plain, in train and eval mode."""
    torch.manual_seed(0)
    model = Joined(eps).double()
    optimized = normpass.optimize(copy.deepcopy(model), allow_lossy=lossy)
    for training in (True, False):
        model.train(training), optimized.train(training)
        try:
            copy.deepcopy(model)(image())  # its running statistics are another's
        except ValueError:
            assert error_of(optimized, image()) == error_of(model, image())
            continue
        results = []
        for m in (model, optimized):
            x = image(requires_grad=True)
            y = m(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, equal_nan=True)
