"""No rewrite crosses a switch of grad mode or autocast: something would get a gradient, or lose its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normpass
from normpass import passes


class Net(nn.Module):
    """Two convolutions with norms, and in `forward` a switch of grad mode or autocast in one place."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def without_gradient(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*args)


def with_gradient(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with torch.enable_grad():
        return function(*args)


def narrow(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args)


def behind(m: nn.Module, y: Tensor) -> Tensor:
    return m.last(m.depthwise(y))


def _in_no_grad_first(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.norm(m.conv(x))
    return behind(m, F.relu(y)) + x.mean()


def _cat_without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    whole = without_gradient(torch.cat, [y[:, :4].contiguous(), y[:, 4:] * 2], 1)
    return F.relu(m.norm(whole)) + y


FORWARDS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "activation": lambda m, x: without_gradient(F.relu, m.norm(m.conv(x))) * x.mean(),
    "residual": lambda m, x: F.relu(without_gradient(torch.add, m.norm(m.conv(x)), m.conv(x))) * x.mean(),
    "sum, then activation": lambda m, x: behind(m, without_gradient(F.relu, m.norm(m.conv(x)) + m.conv(x))),
    "norm": _in_no_grad_first,
    "depthwise": lambda m, x: without_gradient(m.depthwise, F.relu(m.norm(m.conv(x)))) * x.mean(),
    "norm before depthwise": lambda m, x: behind(m, without_gradient(lambda y: F.relu(m.norm(y)), m.conv(x))),
    "concatenation": _cat_without_gradient,
    "and back": lambda m, x: behind(m, F.relu(with_gradient(without_gradient, m.norm, m.conv(x)))),
    "autocast": lambda m, x: behind(m, narrow(F.softplus, m.norm(m.conv(x)))),
    "autocast of the convolution": lambda m, x: m.last(narrow(m.depthwise, F.relu(m.norm(m.conv(x))))),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("serialize", [False, passes.SerializeNorms(1000, ("depthwise",))], ids=["", "blocks"])
def test_gradients_go_where_they_went(name, serialize):
    torch.manual_seed(0)
    dtype = torch.float32 if name.startswith("autocast") else torch.float64
    plain = Net(FORWARDS[name]).to(dtype)
    optimized = normpass.optimize(copy.deepcopy(plain), serialize=serialize)
    x = torch.randn(3, 4, 6, 6, dtype=dtype, requires_grad=True)
    found = []
    for model in (plain, optimized):
        y = model(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()], allow_unused=True)
        found.append([y.detach(), *grads])
    largest = max(float(a.abs().max()) for a in found[0][1:] if a is not None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            if dtype == torch.float64 or a is found[0][0]:
                torch.testing.assert_close(a, b)
            else:  # bfloat16 rounds to 8 bits; a bias before a norm has gradient zero
                assert float((a - b).abs().max()) <= 0.02 * max(float(a.abs().max()), 0.1 * largest)


def test_a_forward_that_begins_without_gradients():
    """Concatenations and moments of what the caller gave, in a forward that switches gradients on."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return F.relu(m.norm(torch.cat([x, x * 2], 1)))

    torch.manual_seed(0)
    plain = Net(run).double()
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model in (plain, optimized):
        with torch.no_grad():
            y = model(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, *model.norm.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
