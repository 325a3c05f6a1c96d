"""Functions that backward runs again: the same gradients, and nothing kept but their argument."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normpass.measure import kept_bytes
from normpass.recipe.notes import recording
from normpass.recipe.recipes import Rebuilds
from normpass.recipe.replay import call_replayed


def distinct(*shape: int) -> torch.Tensor:
    """Values far enough apart for finite differences of a maximum."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order.double() / 10).reshape(shape).requires_grad_()


def pooled(x: torch.Tensor) -> torch.Tensor:
    with recording():
        return call_replayed(F.max_pool2d, x, 3, stride=2, padding=1)


def test_first_and_second_derivatives():
    x = distinct(2, 3, 5, 5)
    assert torch.autograd.gradcheck(pooled, x)
    assert torch.autograd.gradgradcheck(lambda t: pooled(t).square(), x)


def test_the_same_as_plain():
    x = distinct(2, 3, 6, 6)
    with recording():
        y = call_replayed(F.max_pool2d, x, 2)
    expected = F.max_pool2d(x, 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    weight = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((t * weight).sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Net(nn.Module):
    def __init__(self, is_replayed: bool):
        super().__init__()
        self.conv, self.is_replayed = nn.Conv2d(3, 8, 3), is_replayed

    def forward(self, x):
        x = self.conv(x)
        with recording():
            return (call_replayed(F.max_pool2d, x, 2) if self.is_replayed else F.max_pool2d(x, 2)).mean()


def test_indices_are_not_kept():
    x = torch.randn(2, 3, 18, 18)
    plain, again = (kept_bytes(Net(r), x) for r in (False, True))
    assert plain - again == 2 * 8 * 8 * 8 * 8  # int64 indices of a 2×8×8×8 result


def test_its_result_may_be_rebuilt_as_well():
    x, found = distinct(2, 3, 6, 6), []
    for is_rebuilt in (False, True):
        with recording():
            y = call_replayed(F.max_pool2d, x, 2, is_rebuilt=is_rebuilt)
            loss = (y * y).sum()
        with Rebuilds() as rebuilds:
            found.append(torch.autograd.grad(loss, x)[0])
        assert rebuilds.total == is_rebuilt
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_without_recording_or_gradients_it_is_the_plain_call():
    x = distinct(1, 1, 4, 4)
    assert "Replay" not in type(call_replayed(F.max_pool2d, x, 2).grad_fn).__name__
    with recording():
        assert "Replay" in type(call_replayed(F.max_pool2d, x, 2).grad_fn).__name__
        assert call_replayed(F.max_pool2d, x.detach(), 2).grad_fn is None
    with recording(), torch.no_grad():
        assert call_replayed(F.max_pool2d, x, 2).grad_fn is None


def test_what_it_reads_must_not_change_before_backward():
    x = distinct(1, 1, 4, 4)
    with recording():
        h = x * 1
        y = call_replayed(F.max_pool2d, h, 2)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_is_that_of_forward():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(2, 2, 1, 1)
    with recording(), torch.autocast("cpu", torch.bfloat16):
        y = call_replayed(F.conv2d, x, weight)
        expected = F.conv2d(x, weight)
    found, wanted = (torch.autograd.grad(t.float().square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
