"""Sub-batches of any size, layout and dtype; what they keep, and how much is there at once."""

import pytest
import torch
import torch.nn.functional as F
from sub_batches import SHAPE, Serial, serial, small_resnet
from torch import nn
from training import image

from normpass import measure
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.graph.nodes import give_keys
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch

# --- dtypes, layouts, batches -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_a_batch_no_larger_than_the_sub_batch_runs_whole(batch):
    model = small_resnet("group")
    other = serial(model)
    x = image(batch, 3, 16, 16)
    y = other(x)
    assert type(y.grad_fn).__name__ != "SerialisedRegionBackward" and torch.equal(y, model(x))


def test_channels_last_stays():
    model = small_resnet("group").to(memory_format=torch.channels_last)
    body = nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1.conv1)
    x = image(5, 3, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    body[3] = nn.Conv2d(8, 4, 1).double().to(memory_format=torch.channels_last)
    other = Serial(body, x, sub_batch=2)
    y = other(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.stride() == body(x).stride()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_autocast_is_the_same_in_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(6, 3, 12, 12)
    other = Serial(model, x, sub_batch=2)
    grads = []
    for run in (model, other):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-2 * float(a.abs().max()))


def test_a_weight_shared_with_a_layer_behind_keeps_its_gradient_under_autocast():
    """Autocast remembers a weight's cast; one made while the region ran without gradients would have none."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(conv, nn.GroupNorm(2, 4))
    x = torch.randn(4, 4, 5, 5)
    other = Serial(model, x, sub_batch=2)
    with torch.autocast("cpu", torch.bfloat16):
        other(x)
        y = conv(x)
    (gradient,) = torch.autograd.grad(y.float().sum(), conv.weight)
    assert gradient.abs().max() > 0


def test_sums_of_half_precision_gradients_are_made_in_float32():
    """64 sub-batches whose gradients are equal: in bfloat16 the sum would stop growing at 256 times one of them."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.Conv2d(1, 1, 1)).bfloat16()
    x = torch.ones(1024, 1, 2, 2, dtype=torch.bfloat16)
    x[:, :, 0] = -1
    other = Serial(model, x, sub_batch=1)
    other(x).sum().backward()
    assert model[2].bias.grad == 4096


def test_gradients_are_not_written_to():
    model = small_resnet("group")
    x = image(*SHAPE, requires_grad=True)
    y = serial(model)(x)
    grad = torch.ones_like(y)
    y.backward(grad)
    assert torch.equal(grad, torch.ones_like(y))


# --- memory -----------------------------------------------------------------------------------------


def test_only_the_input_is_kept():
    model = small_resnet("group").float()
    x = torch.randn(16, 3, 32, 32)
    assert measure.kept_bytes(serial(model, *x.shape, sub_batch=2), x) <= 1024
    cut = Serial(model, x, buffer_bytes=100_000)
    boundaries = sum(16 * group.units[0].input_bytes for group in cut.found.groups[1:])
    # Between the regions: their inputs; at the end what plain layers behind the last region keep.
    assert boundaries <= measure.kept_bytes(cut, x) < 0.5 * measure.kept_bytes(model, x)


def test_the_peak_of_a_forward_and_of_a_step():
    model = small_resnet("group").float()
    x = torch.randn(32, 3, 32, 32)
    other = Serial(model, x, sub_batch=2)
    with torch.no_grad():
        assert measure.forward_peak_bytes(other, x) < 0.2 * measure.forward_peak_bytes(model, x)
    assert measure.peak_bytes(other, x) < 0.35 * measure.peak_bytes(model, x)


def test_a_channels_last_result_is_allocated_once():
    model = nn.Conv2d(3, 8, 1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)
    other = Serial(model, x, sub_batch=1)
    with torch.no_grad():
        assert measure.forward_peak_bytes(other, x) < 1.3 * other(x).numel() * 4


class Enlarges(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(F.interpolate(self.a(x), size=(x.shape[2] * 2, x.shape[3] + 1)))


def test_a_symbolic_batch():
    """The graph that Dynamo makes for a second size: numbers are inputs, and the batch is whatever comes."""
    model, programs = Enlarges().double(), []

    def backend(program, values):
        give_keys(program.graph)
        programs.append(SerializeMinibatch(sub_batch=2).apply(program.graph, facts_of(program, FakeInputs(values))))
        program.recompile()
        return program.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)
    for batch, size in ((4, 6), (5, 7), (3, 9), (1, 8)):
        x = image(batch, 3, size, size, requires_grad=True)
        y, z = model(x), compiled(x)
        expected, found = (torch.autograd.grad(r.square().sum(), [x, *model.parameters()]) for r in (y, z))
        for a, b in zip((y, *expected), (z, *found), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    assert len(programs) <= 3 and all(len(found.groups) == 1 for found in programs[:2])
    torch.compiler.reset()


def test_no_batch():
    assert serial(nn.Conv1d(3, 2, 1), 0, 3, 4).reasons == {"": "there is no batch to divide"}
