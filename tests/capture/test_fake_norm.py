"""BatchNorm of fake tensors returns what it returns of real ones, laid out the same."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._decomp import decompositions
from torch._subclasses.fake_tensor import FakeTensorMode

from normpass.capture import fake_norm

INPUTS = {
    "1d": lambda: torch.randn(4, 3),
    "2d": lambda: torch.randn(4, 3, 5, 6),
    "channels_last": lambda: torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last),
    "3d channels_last": lambda: torch.randn(4, 3, 2, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "one pixel": lambda: torch.randn(4, 3, 1, 1),
    "one channel": lambda: torch.randn(4, 1, 5, 6),
    "a slice": lambda: torch.randn(4, 8, 5, 6)[:, 2:5],
    "a slice of channels_last": lambda: torch.randn(4, 8, 5, 6).contiguous(memory_format=torch.channels_last)[:, 2:5],
    "transposed": lambda: torch.randn(4, 3, 5, 6).transpose(2, 3),
    "empty": lambda: torch.randn(0, 3, 5, 6),
}


def described(values: tuple) -> list:
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in values if isinstance(t, Tensor)]


def results(x: Tensor, training: bool, running: bool) -> list:
    """Outputs and what autograd saves of them."""
    weight, bias = (torch.ones(x.shape[1], requires_grad=True) for _ in range(2))
    mean, var = (torch.ones(x.shape[1]) for _ in range(2)) if running else (None, None)
    values = torch.native_batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5)
    return described((*values, mean, var))


def faked(x: Tensor, *options: bool) -> list:
    with FakeTensorMode() as mode:
        return results(mode.from_tensor(x), *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_same_as_torch(kind: str, dtype: torch.dtype) -> None:
    x = INPUTS[kind]().to(dtype)
    for options in ((True, True), (True, False), (False, True)):
        expected = faked(x, *options)
        with mock.patch.object(decompositions, fake_norm.NAME, fake_norm.quick_batch_norm()):
            assert faked(x, *options) == expected


def test_it_takes_fewer_operators() -> None:
    def operators() -> int:
        with FakeTensorMode() as mode:
            x, w = mode.from_tensor(torch.randn(7, 11, 3, 3)), torch.ones(11)
            with mock.patch.object(torch, "var_mean", side_effect=torch.var_mean) as var_mean:
                torch.native_batch_norm(x, w, w, w.clone(), w.clone(), True, 0.1, 1e-5)
        return var_mean.call_count

    assert operators() == 1
    with mock.patch.object(decompositions, fake_norm.NAME, fake_norm.quick_batch_norm()):
        assert operators() == 0
