import pytest
import torch

from normpass.ops import instance_moments, merged_moments

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(5, 3), (5, 3, 7), (2, 3, 4, 5), (2, 3, 4, 5, 6), (4, 3, 1, 1)]


def exact(x):
    flat = x.double().reshape(*x.shape[:2], -1)
    return flat.mean(2), flat.var(2, correction=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype, error):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mean, var = instance_moments(x)
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, expected in zip((mean, var), exact(x), strict=True):
        assert (found.double() - expected).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(instance_moments, x)
    assert torch.autograd.gradgradcheck(instance_moments, x)


def test_merged_moments_are_those_of_the_union_far_from_zero():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000.0
    moments = instance_moments(x)
    for dim, dims in ((0, [0, 2, 3]), (1, [1, 2, 3])):
        mean, var = merged_moments(*moments, dim)
        expected_var, expected_mean = torch.var_mean(x.double(), dims, correction=0)
        assert ((mean.squeeze(dim) - expected_mean) / expected_mean).abs().max() < 1e-6
        assert ((var.squeeze(dim) - expected_var) / expected_var).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (5, 3)], ids=str)
def test_opcheck(shape, opcheck):
    opcheck(torch.ops.normpass.instance_moments.default, (torch.randn(shape, requires_grad=True),))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 3, 0), "must have at least one spatial position"),
        (torch.zeros(3), r"instance_moments: `x` must have shape \(N, C, \*\)"),
    ],
)
def test_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        instance_moments(x)
