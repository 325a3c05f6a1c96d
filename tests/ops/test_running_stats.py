import pytest
import torch
from torch import nn

from normpass.ops import moments, updated_running_stats

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
def test_two_steps_are_batch_norms(momentum, make_site, error):
    norm = nn.BatchNorm2d(3, momentum=momentum).double()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for step in (1, 2):
        x = make_site(seed=step).x.detach()
        norm(x)
        share = 1 / step if momentum is None else momentum
        mean, var = updated_running_stats(mean, var, *moments(x), share, x.numel() // 3)
    assert error(mean, norm.running_mean) < 1e-14
    assert error(var, norm.running_var) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_buffers_keep_their_dtype_and_are_not_written(dtype, error):
    old_mean, old_var = torch.tensor([1.0, 2.0]).to(dtype), torch.tensor([3.0, 4.0]).to(dtype)
    kept = old_mean.clone(), old_var.clone()
    mean, var = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 8.0])
    new_mean, new_var = updated_running_stats(old_mean, old_var, mean, var, 0.25, 5)
    assert new_mean.dtype == new_var.dtype == dtype
    assert error(new_mean, torch.tensor([0.875, 1.25])) < 2**-8
    assert error(new_var, torch.tensor([2.875, 5.5])) < 2**-8
    assert torch.equal(old_mean, kept[0]) and torch.equal(old_var, kept[1])


def test_no_gradient_reaches_the_buffers(make_site):
    mean, var = moments(make_site().x)
    new_mean, new_var = updated_running_stats(torch.zeros_like(mean), torch.ones_like(var), mean, var, 0.1, 9)
    assert mean.requires_grad and not new_mean.requires_grad and not new_var.requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, opcheck):
    a, b, c, d = (torch.rand(3) for _ in range(4))
    args = (a, b, c.requires_grad_(requires_grad), d, 0.1, 12)
    opcheck(torch.ops.normpass.updated_running_stats.default, args)


def test_one_value_per_channel_and_wrong_shapes_are_refused():
    three = torch.ones(3)
    with pytest.raises(ValueError, match="`count` must be at least 2.*got 1"):
        updated_running_stats(three, three, three, three, 0.1, 1)
    with pytest.raises(ValueError, match=r"`running_var` must have the shape of `mean`, \(3,\), got \(4,\)"):
        updated_running_stats(three, torch.ones(4), three, three, 0.1, 8)
