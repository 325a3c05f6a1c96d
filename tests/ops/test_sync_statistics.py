"""`synced_statistics` in one process: with the norm behind it, batch norm. (Several: whole/test_sync_norm.py.)"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass import kernels
from normpass.ops.sync_statistics import ALONE, _merged, synced_statistics

EPS = 1e-5
SHAPES = ((4, 3), (3, 3, 5), (2, 3, 4, 4), (2, 3, 2, 3, 2))


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float | None = 0.1, **state) -> Tensor:
    names = ("running_mean", "running_var", "counter")
    mean, var, counter = (state.get(name) for name in names)
    same, *values = synced_statistics(x, mean, var, weight, bias, counter, momentum, EPS, ALONE)
    mean, var, weight, bias = values
    return F.batch_norm(same, mean, var, weight, bias, False, 0.0, EPS)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_batch_norm(shape: tuple[int, ...]) -> None:
    """Gradcheck, and torch's numbers, in every combination of what has a gradient."""
    x, weight, bias = leaf(*shape), leaf(3, seed=1), leaf(3, seed=2)
    assert torch.autograd.gradcheck(norm, (x, weight, bias))
    for needs in itertools.product((False, True), repeat=3):
        given = [t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needs, strict=True)]
        results = []
        for function in (norm, lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, EPS)):
            y = function(*given)
            inputs = [t for t in given if t.requires_grad]
            results.append((y, *torch.autograd.grad((y**3).sum(), inputs)) if inputs else (y,))
        torch.testing.assert_close(*results)
        assert results[0][0].requires_grad == any(needs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_kernels", [True, False])
def test_dtypes_and_layouts(dtype: torch.dtype, by_kernels: bool) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    exact = leaf(4, 3, 5, 5)
    (expected,) = torch.autograd.grad((F.batch_norm(exact, None, None, None, None, True, 0.1, EPS) ** 3).sum(), exact)
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format, expands in itertools.product(formats, (False, True)):
        x = exact.detach().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        with contextlib.nullcontext() if by_kernels else kernels.disabled():
            y = norm(x, torch.ones(3, dtype=dtype), None)
            loss = y.sum() if expands else (y.double() ** 3).sum()  # a gradient without memory of its own
            (found,) = torch.autograd.grad(loss, x)
        assert found.dtype == dtype and found.is_contiguous(memory_format=memory_format)
        wanted = torch.zeros_like(expected) if expands else expected
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=limit * float(expected.abs().max()))


def test_running_statistics() -> None:
    """By momentum, cumulative, and not by an empty batch; they do not lose what they had where there is one value."""
    for momentum in (0.1, None):
        layer, own = nn.BatchNorm2d(3, momentum=momentum).double(), nn.BatchNorm2d(3, momentum=momentum).double()
        for step, batch in enumerate((2, 3, 1)):
            x = leaf(batch, 3, 4, 4, seed=step)
            layer(x)
            own.num_batches_tracked.add_(1)
            names = {"running_mean": own.running_mean, "running_var": own.running_var}
            norm(x, None, None, momentum, counter=own.num_batches_tracked, **names)
        torch.testing.assert_close(dict(own.named_buffers()), dict(layer.named_buffers()))
        before = own.running_var.clone()
        y = norm(
            torch.zeros(0, 3, 4, 4, dtype=torch.float64),
            None,
            None,
            momentum,
            counter=layer.num_batches_tracked,
            **names,
        )
        assert y.shape == (0, 3, 4, 4) and torch.equal(own.running_var, before)
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            norm(leaf(1, 3), None, None)


def test_merged_moments() -> None:
    """Unequal and empty parts; a mean that is large beside the deviation, in float32."""
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)) + 1000
    parts = [x[:5], x[5:5], x[5:6], x[6:]]
    rows = [
        torch.cat([*(t for t in (p.mean(0), p.var(0, correction=0))), torch.full((1,), float(len(p)))])
        if len(p)
        else torch.zeros(7)
        for p in parts
    ]
    mean, var, count = _merged(torch.stack(rows), 3)
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, x.double().var(0, correction=0), rtol=1e-3, atol=0)
    assert count.tolist() == [9]


def test_a_second_derivative_is_refused() -> None:
    x = leaf(4, 3)
    (gradient,) = torch.autograd.grad((norm(x, None, None) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of a SyncBatchNorm's gradient"):
        gradient.sum().backward()
