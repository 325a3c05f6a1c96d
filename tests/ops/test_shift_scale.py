import pytest
import torch

from normpass.ops import shift_scale

SHAPES = [(5, 3), (5, 3, 7), (2, 3, 4, 5), (2, 3, 4, 5, 6), (1, 3, 2, 2)]


def operands(shape, rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = shape[0] if rows == "N" else 1
    mean, scale = (torch.randn(rows, shape[1], dtype=wide, generator=generator).requires_grad_() for _ in range(2))
    return x, mean, scale, torch.randn(shape[1], dtype=wide, generator=generator).requires_grad_()


def formula(x, mean, scale, bias):
    spatial = (..., *[None] * (x.dim() - 2))
    y = (x - mean[spatial]) * scale[spatial]
    return y if bias is None else y + bias[spatial]


@pytest.mark.parametrize("rows", ["N", 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, rows):
    args = operands(shape, rows)
    torch.testing.assert_close(shift_scale(*args), formula(*args), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(shift_scale, args)
    assert torch.autograd.gradgradcheck(shift_scale, args)


def test_without_bias_and_with_an_expanded_gradient():
    x, mean, scale, _ = operands((2, 3, 4, 5), "N")
    found = torch.autograd.grad(shift_scale(x, mean, scale, None).sum(), (x, mean, scale))
    expected = torch.autograd.grad(formula(x, mean, scale, None).sum(), (x, mean, scale))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_round_once(dtype):
    args = operands((2, 3, 4, 5), 1, dtype)
    y = shift_scale(*args)
    exact = formula(*(a.double() for a in args))
    assert y.dtype == dtype
    assert ((y.double() - exact) / (1 + exact.abs())).abs().max() < torch.finfo(dtype).eps
    grads = torch.autograd.grad(y.sum(), args)
    assert [g.dtype for g in grads] == [a.dtype for a in args]


def test_layout_and_kept(saved_sizes):
    x, mean, scale, bias = operands((2, 3, 8, 8), "N", torch.float32)
    wide = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert shift_scale(wide, mean, scale, bias).is_contiguous(memory_format=torch.channels_last)
    _, kept = saved_sizes(lambda: shift_scale(x, mean, scale, bias))
    assert sorted(kept.values()) == sorted(t.numel() for t in (x, mean, scale))


@pytest.mark.parametrize("rows", ["N", 1])
def test_opcheck(rows, opcheck):
    opcheck(torch.ops.normpass.shift_scale.default, operands((2, 3, 4, 5), rows, torch.float32))


def test_refuses_other_shapes():
    x, mean, scale, bias = operands((4, 3, 2, 2), "N")
    with pytest.raises(ValueError, match=r"`mean` must have shape \(4 or 1, 3\) for `x` \(4, 3, 2, 2\), got \(2, 3\)"):
        shift_scale(x, mean[:2], scale, bias)
