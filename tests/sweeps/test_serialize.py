"""Whole networks whose norms look at one sample, run sub-batch by sub-batch: the same numbers, and the peak."""

import copy

import pytest
import torch
from networks import scatter_norms
from sub_batches import Serial
from torch import nn
from torchvision.models import densenet121, resnet50
from torchvision.ops import FrozenBatchNorm2d

from normpass import measure

pytestmark = pytest.mark.nets

MIB = 2**20


def group_norm():
    return resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels))


def frozen_norm():
    return resnet50(norm_layer=FrozenBatchNorm2d)


def eval_densenet():
    return densenet121(memory_efficient=False).eval()


def build(make):
    torch.manual_seed(0)
    model = make()
    scatter_norms(model, torch.Generator().manual_seed(1))
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("options", [{"sub_batch": 2}, {"buffer_bytes": 4 * MIB}], ids=["sub_batch", "buffer"])
@pytest.mark.parametrize("make", [group_norm, frozen_norm, eval_densenet], ids=lambda f: f.__name__)
def test_the_same_numbers(make, options, results):
    """fp64: outputs and every gradient within 1e-9 of the largest of their kind."""
    model = build(make).double()
    x = torch.randn(5, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    other = Serial(copy.deepcopy(model), x, **options)
    assert sum(g.iterations > 1 for g in other.found.groups) >= (1 if "sub_batch" in options else 2)
    y, z = model(x), other(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(y, [x, *model.parameters()], grad)
    found = torch.autograd.grad(z, [x, *other.model.parameters()], grad)
    differences = {"output": relative([y], [z]), "input": relative(expected[:1], found[:1])}
    differences["parameters"] = relative(expected[1:], found[1:])
    results.add("serialized", {"network": make.__name__, **options, "groups": other.groups, "apart": differences})
    assert max(differences.values()) < 1e-9, differences


def relative(plain, other):
    """The largest difference, as a fraction of the largest magnitude."""
    apart = max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(plain, other, strict=True))
    return apart / max(float(a.detach().abs().max()) for a in plain)


@pytest.mark.parametrize("make", [group_norm, frozen_norm], ids=lambda f: f.__name__)
def test_the_peak_of_a_forward(make, results):
    """Batch 64, 224×224, float32, a buffer of 32 MiB: at most 0.35 of plain's beyond parameters and kept tensors."""
    model = build(make)
    x = torch.randn(64, 3, 224, 224)
    other = Serial(model, x, buffer_bytes=32 * MIB)
    with torch.no_grad():
        plain, ours = measure.forward_peak_bytes(model, x), measure.forward_peak_bytes(other, x)
    row = {"network": make.__name__, "input": "64x3x224x224", "groups": other.groups, "forward_peak": [plain, ours]}
    results.add("serialized", row)
    assert ours <= 0.35 * plain, row
