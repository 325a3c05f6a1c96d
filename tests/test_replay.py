"""Functions that backward runs again: the same gradients, and nothing kept but their argument."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normpass.measure import kept_bytes
from normpass.recipe import recording
from normpass.replay import replayed, replayed_function


def distinct(*shape: int) -> torch.Tensor:
    """Values far enough apart for finite differences of a maximum."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order.double() / 10).reshape(shape).requires_grad_()


def pooled(x: torch.Tensor) -> torch.Tensor:
    with recording():
        return replayed(F.max_pool2d, x, 3, stride=2, padding=1)


def test_first_and_second_derivatives():
    x = distinct(2, 3, 5, 5)
    assert torch.autograd.gradcheck(pooled, x)
    assert torch.autograd.gradgradcheck(lambda t: pooled(t).square(), x)


@pytest.mark.parametrize("function", [nn.MaxPool2d(2), F.max_pool2d])
def test_the_same_as_plain(function):
    x = distinct(2, 3, 6, 6)
    args = () if isinstance(function, nn.Module) else (2,)
    with recording():
        y = replayed(function, x, *args) if args == () else replayed_function(function)(x, *args)
    expected = function(x, *args)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    weight = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((t * weight).sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Net(nn.Module):
    def __init__(self, is_replayed: bool):
        super().__init__()
        self.conv, self.pool, self.is_replayed = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), is_replayed

    def forward(self, x):
        x = self.conv(x)
        with recording():
            return (replayed(self.pool, x) if self.is_replayed else self.pool(x)).mean()


def test_indices_are_not_kept():
    x = torch.randn(2, 3, 18, 18)
    plain, again = (kept_bytes(Net(r), x) for r in (False, True))
    assert plain - again == 2 * 8 * 8 * 8 * 8  # int64 indices of a 2×8×8×8 result


def test_without_recording_or_gradients_it_is_the_plain_call():
    x = distinct(1, 1, 4, 4)
    assert "Replay" not in type(replayed(F.max_pool2d, x, 2).grad_fn).__name__
    with recording(), torch.no_grad():
        assert replayed(F.max_pool2d, x, 2).grad_fn is None
    pool = nn.MaxPool2d(2)
    pool.register_forward_hook(lambda *_: None)
    with recording():
        assert "Replay" not in type(replayed(pool, x).grad_fn).__name__


def test_autocast_is_that_of_forward():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(2, 2, 1, 1)
    with recording(), torch.autocast("cpu", torch.bfloat16):
        y = replayed(F.conv2d, x, weight)
        expected = F.conv2d(x, weight)
    found, wanted = (torch.autograd.grad(t.float().square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
