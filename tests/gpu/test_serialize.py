"""Serialized regions on a GPU give the numbers of the plain layers. Times: `normpass bench serialized`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from normpass.bench.serialized import SerialisedModel, as_function
from normpass.measure import peak_bytes
from normpass.runtime.norm_blocks import norm_act_with_moments, serial_norm_act_conv


def chain():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 16, 1)]
    return nn.Sequential(*layers).cuda().double()


@pytest.mark.parametrize("channels_last", [False, True])
def test_deep_regions(channels_last):
    model, x = chain(), torch.randn(10, 3, 32, 32, device="cuda", dtype=torch.float64)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    other = SerialisedModel(copy.deepcopy(model), x, buffer_bytes=10**6)
    assert other.found.groups
    y, z = model(x), other(x)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *model.parameters()], grad)
    found = torch.autograd.grad(z, [x, *other.model.parameters()], grad)
    for a, b in zip((y, *expected), (z, *found), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * float(a.detach().abs().max()))


def test_deep_regions_have_a_lower_peak():
    model, x = chain().float(), torch.randn(64, 3, 64, 64, device="cuda")
    other = SerialisedModel(model, x, buffer_bytes=4 * 2**20)
    assert peak_bytes(other, x) < 0.5 * peak_bytes(model, x)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_exact_regions(kernel, dtype, bound):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.BatchNorm2d(32), nn.Conv2d(32, 64, kernel, padding=kernel // 2), nn.BatchNorm2d(64)])
    layers = layers.cuda().to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(12, 32, 20, 20, device="cuda", dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    other = copy.deepcopy(layers)
    y = torch.relu(layers[2](layers[1](torch.relu(layers[0](x)))))
    conv = other[1].weight, other[1].bias, other[1].stride, other[1].padding
    c, moments = serial_norm_act_conv(as_function(other[0]), x, None, "relu", [], 2**20, *conv)
    assert moments is not None
    z = norm_act_with_moments(as_function(other[2]), c, moments, None, "relu", [], "")
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *layers.parameters()], grad)
    found = torch.autograd.grad(z, [x, *other.parameters()], grad)
    scale = max(float(a.abs().max()) for a in expected)
    for a, b in zip((y, *expected), (z, *found), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=bound * scale)
