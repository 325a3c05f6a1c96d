"""What does not run sub-batch by sub-batch, and the reason that is given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sub_batches import SHAPE, Serial, assert_trains_alike, serial, small_resnet
from torch import nn
from training import image

from normpass.errors import InvalidInputError
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.max_pool2d(h, 2),
        lambda h: F.conv2d(h, torch.ones(4, 4, 3, 3)),
        lambda h: F.adaptive_avg_pool2d(h, 2),
        lambda h: F.pixel_shuffle(h, 1),
    ],
)
def test_what_has_no_batch_is_refused(function):
    other = serial(Without(function), 4, 6, 6, sub_batch=2)
    assert any("not known" in reason for reason in other.reasons.values())
    x = torch.randn(4, 6, 6)
    torch.testing.assert_close(other(x), other.model(x))


class Without(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(torch.tanh(x))


def chain(*inner):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), *inner, nn.Conv2d(4, 2, 1)).double()


class Forward(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.function(self, self.conv(x))


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.BatchNorm2d(4), "statistics of the whole batch"),
        (nn.Dropout(0.1), "draws random numbers"),
        (nn.Dropout2d(0.1), "draws random numbers"),
        (nn.RReLU(), "draws random numbers"),
        (nn.FractionalMaxPool2d(2, output_size=2), "draws random numbers"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "running statistics"),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), "statistics of the whole batch"),
        (nn.Softmax(0), "softmax is not known"),
        (nn.LocalResponseNorm(2), "local_response_norm is not known"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_layers_that_need_the_batch_are_left_out(layer, reason):
    other = serial(chain(layer), 5, 3, 4, 4, sub_batch=2)
    assert any(reason in words for words in other.reasons.values())
    assert [name for name, _, _ in other.groups][-1] == "3"
    y = other(image(5, 3, 4, 4))
    assert y.shape[:2] == (5, 2)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda m, h: h.view(4, -1), "not known"),
        (lambda m, h: torch.relu(h).detach(), "not known"),
        (lambda m, h: F.dropout(h, 0.5), "draws random numbers"),
        (lambda m, h: h + torch.arange(4.0).view(4, 1, 1, 1), "not known"),
        (lambda m, h: h.flatten(0, 1), "batch first"),
        (lambda m, h: h.mean(0, keepdim=True), "batch first"),
        (lambda m, h: h - torch.flip(h, (0,)), "not known"),
        (lambda m, h: torch.softmax(h, 0), "not known"),
        (lambda m, h: torch.cat([h, h]), "batch first"),
        (lambda m, h: h.chunk(2, 1)[0], "other than one tensor"),
        (lambda m, h: F.layer_norm(h, h.shape), "not known"),
        (lambda m, h: h.permute(1, 0, 2, 3).permute(1, 0, 2, 3), "not known"),
        (lambda m, h: F.conv2d(h, h), "not known"),
        (lambda m, h: h + h.mean((2, 3)), "not known"),
    ],
)
def test_operations_over_the_batch_are_refused(function, reason):
    shape = (4, 3, 4, 4)
    other = serial(Forward(function), *shape, sub_batch=1)
    assert any(reason in words for words in other.reasons.values()), other.reasons
    x = torch.randn(shape)
    torch.manual_seed(0)
    y = other(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, other.model(x))


def test_an_input_that_is_written_to_is_refused():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))
    other = serial(model, 5, 3, 4, 4, sub_batch=2)
    assert "changed in place" in other.reasons["0"]
    assert other.groups == [("1", 2, 3)]


def test_a_view_of_the_input_stays_one():
    other = serial(nn.Flatten(), 5, 3, 4)
    x = torch.randn(5, 3, 4)
    assert other.groups == [] and other(x).data_ptr() == x.data_ptr()


class Switched(Forward):
    """Grad mode is off, or autocast on, between two convolutions."""

    def forward(self, x):
        x = torch.tanh(x)
        with self.function():
            x = self.conv(x)
        return torch.tanh(x) * x


@pytest.mark.parametrize("switch", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_switch_ends_a_region(switch):
    model, x = Switched(switch), torch.randn(4, 3, 5, 5, requires_grad=True)
    other = Serial(copy.deepcopy(model), x, sub_batch=1)
    assert [name for name, _, _ in other.groups][0] == "conv" and len(other.groups) == 2
    y, z = model(x), other(x)
    assert y.requires_grad == z.requires_grad
    torch.testing.assert_close(z, y)
    if y.requires_grad:
        (a,), (b,) = (torch.autograd.grad(r.square().sum(), x) for r in (y, z))
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2)


def test_a_constant_that_is_written_to_is_refused():
    def write(model, h):
        y = h * model.conv.bias.view(4, 1, 1)
        with torch.no_grad():
            model.conv.bias.add_(1)
        return y

    model = Forward(write)
    other = serial(copy.deepcopy(model), 5, 3, 4, 4, sub_batch=2)
    assert any("changes what it reads" in reason for reason in other.reasons.values()) and not other.groups
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


class Aside(nn.Module):
    """What stands between two layers is used by something that the output does not need."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), function

    def forward(self, x):
        h = self.a(x)
        y = self.c(self.b(h))
        self.function(h)
        return y


def test_what_is_read_or_written_aside_stays_between_regions():
    read = serial(Aside(torch.sum), 5, 3, 4, 4, sub_batch=2)
    assert read.groups == [("a", 2, 3), ("b to c", 2, 3)]
    written = serial(Aside(lambda h: h.mul_(2)), 5, 3, 4, 4, sub_batch=2)
    assert written.groups == [("a", 2, 3), ("c", 2, 3)] and "`mul_`" in written.reasons["b"]
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        for other in (read, written):
            torch.testing.assert_close(other(x), other.model(x))


def test_hooks_are_layers_like_others():
    model = small_resnet("group")
    model.layer1.conv2.register_forward_hook(lambda module, args, result: result * 2)
    other = assert_trains_alike(model, image(*SHAPE), sub_batch=3)
    assert other.groups == [("conv1 to fc", 3, 3)] and not other.reasons


def test_train_mode_norms_leave_the_layers_between_alone():
    model = small_resnet("eval")
    model.layer1.bn1.train()
    other = serial(model)
    assert [name for name, _, _ in other.groups] == ["conv1 to maxpool", "layer2 to fc"]
    expected = copy.deepcopy(model)
    x = image(*SHAPE)
    torch.testing.assert_close(other(x), expected(x), rtol=0, atol=1e-12)
    for a, b in zip(expected.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    "options", [{"sub_batch": 0}, {"buffer_bytes": 0}, {"buffer_bytes": "1MB"}, {"sub_batch": 1.5}]
)
def test_options_out_of_range(options):
    with pytest.raises(InvalidInputError, match="must be a whole number of at least 1, it is"):
        SerializeMinibatch(**options)
