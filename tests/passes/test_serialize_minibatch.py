"""Regions that run sub-batch by sub-batch: what they are, that they train the same, and when they are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sub_batches import NORMS, Serial, small_resnet
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from training import assert_equal, image, train

from normpass import measure
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.errors import InvalidInputError
from normpass.graph.nodes import give_keys
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch

SHAPE = 7, 3, 16, 16


def serial(model, *shape, sub_batch=3, **options):
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(5)
    return Serial(model, torch.randn(shape or SHAPE, dtype=dtype, generator=generator), sub_batch=sub_batch, **options)


def assert_trains_alike(model, x, **options):
    """Two steps of the plain model and of a copy that runs serialized; returns the latter."""
    other = Serial(copy.deepcopy(model), x, **options)
    expected = train(model, (x,))
    assert_equal(expected, train(other.model, (x,), run=lambda _, x: other(x)))
    return other


# --- the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("sub_batch", [1, 3, 6])
@pytest.mark.parametrize("kind", NORMS)
def test_trains_the_same(kind, sub_batch):
    x = image(*SHAPE, requires_grad=True)
    model = small_resnet(kind)
    other = Serial(copy.deepcopy(model), x, sub_batch=sub_batch)
    assert other.groups == [("conv1 to fc", sub_batch, -(-7 // sub_batch))] and not other.reasons
    y, z = model(x), other(x)
    weights = image(*y.shape, seed=3)
    expected = torch.autograd.grad(y, [x, *model.parameters()], weights)
    found = torch.autograd.grad(z, [x, *other.model.parameters()], weights)
    for a, b in zip((y, *expected), (z, *found), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * float(a.detach().abs().max()))


def test_trains_the_same_over_steps():
    other = assert_trains_alike(small_resnet("group"), image(*SHAPE), sub_batch=3)
    assert len(other.groups) == 1


def test_groups_follow_the_buffer():
    x = image(*SHAPE, requires_grad=True)
    other = assert_trains_alike(small_resnet("group"), x, buffer_bytes=20_000)
    assert len(other.groups) > 1
    assert [name for name, _, _ in other.groups][0].startswith("conv1")
    sizes = [size for _, size, _ in other.groups]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


class Mixed(nn.Module):
    """Concatenation, products, functional spellings, a constant operand with a gradient, one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.norm, self.prelu = nn.GroupNorm(2, 4), nn.PReLU(4)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(1, 4, 1, 1))
        self.layer_norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = F.gelu(self.a(x))
        h = torch.cat([h, self.b(h) * torch.sigmoid(F.adaptive_avg_pool2d(h, 1))], 1)
        h = self.prelu(self.norm(self.up(F.avg_pool2d(h, 2))))
        h = (h * self.gamma - self.shift).permute(0, 2, 3, 1)
        return self.linear(self.layer_norm(h)).mean((1, 2))


OPERATIONS = {
    "layouts": (lambda h: h.permute(0, 2, 3, 1).contiguous().mean((1, 2)), (4,)),
    "a permuted result": (lambda h: h.permute(0, 2, 3, 1), (6, 6, 4)),
    "flatten": (lambda h: h.flatten(-2), (4, 36)),
    "softmax": (lambda h: F.log_softmax(torch.softmax(h, -1), dim=1), (4, 6, 6)),
    "glu": (lambda h: F.glu(h, 1), (2, 6, 6)),
    "pools": (lambda h: F.max_pool2d(h, 2) + F.adaptive_max_pool2d(h, 3) - F.lp_pool2d(h + 5, 2.0, 2), (4, 3, 3)),
    "shuffles": (lambda h: F.pixel_unshuffle(F.channel_shuffle(F.pixel_shuffle(h, 2), 1), 3), (9, 4, 4)),
    "pad and interpolate": (lambda h: F.interpolate(F.pad(h, (1, 0, 2, 1), "reflect"), size=5), (4, 5, 5)),
    "in place": (lambda h: (h * 2).add_(1).mul_(0.5).clamp(-1, 2), (4, 6, 6)),
    "numbers": (lambda h: 2 - h / 3 + torch.add(h, h, alpha=3) * torch.tensor(2.0), (4, 6, 6)),
    "eval dropouts": (lambda h: F.dropout2d(F.alpha_dropout(h, 0.5, False), 0.5, False).exp(), (4, 6, 6)),
    "norms": (lambda h: F.group_norm(F.instance_norm(h), 2) + F.layer_norm(h, (6, 6)), (4, 6, 6)),
    "transposed": (lambda h: F.conv_transpose2d(h, torch.ones(4, 3, 2, 2, dtype=h.dtype), stride=2), (3, 12, 12)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_known_operation_is_of_one_sample(name):
    function, shape = OPERATIONS[name]

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return function(self.conv(x))

    model, x = Around().double(), image(5, 3, 6, 6, requires_grad=True)
    other = assert_trains_alike(model, x, sub_batch=2)
    assert not other.reasons and len(other.groups) == 1
    assert other(x).shape == (5, *shape) and other(x).stride() == model(x).stride()


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


def test_other_operations_train_the_same():
    torch.manual_seed(0)
    other = assert_trains_alike(Mixed().double(), image(*SHAPE, requires_grad=True), sub_batch=2)
    assert other.groups == [("a to mean", 2, 4)] and not other.reasons
    assert other.found.groups[0].norms == [("norm", "GroupNorm"), ("layer_norm", "LayerNorm")]


@pytest.mark.parametrize(
    "layers, shape",
    [
        (lambda: [nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool1d(2)], (5, 2, 12)),
        (lambda: [nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.ELU(inplace=True), nn.Conv3d(4, 2, 1)], (5, 2, 4, 4, 4)),
        (lambda: [nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)], (5, 6)),
        (lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Softmax(1), nn.Upsample(12)], (5, 2, 6, 6)),
    ],
    ids=["1d", "3d", "mlp", "padding"],
)
def test_other_dimensions(layers, shape):
    torch.manual_seed(0)
    other = assert_trains_alike(nn.Sequential(*layers()).double(), image(*shape, requires_grad=True), sub_batch=2)
    assert other.groups[0][1:] == (2, 3)


def test_frozen_parameters_and_inputs_get_no_gradient():
    model = small_resnet("group")
    for name, p in model.named_parameters():
        p.requires_grad_("layer2" in name)
    other = assert_trains_alike(model, image(*SHAPE), sub_batch=3)
    frozen = [name for name, p in other.model.named_parameters() if p.grad is None]
    assert any("layer1" in name for name in frozen)


def test_a_layer_in_two_places_sums_its_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)
            self.same = self.conv

        def forward(self, x):
            return self.same(self.norm(self.conv(self.conv(x))))

    assert_trains_alike(Twice().double(), image(5, 3, 6, 6, requires_grad=True), sub_batch=2)


def test_second_derivatives():
    def penalty(run, x, parameters):
        (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
    x = image(5, 3, 6, 6, requires_grad=True)
    other = Serial(model, x, sub_batch=2)
    parameters = list(model.parameters())
    for a, b in zip(penalty(model, x, parameters), penalty(other, x, parameters), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_an_expanded_gradient_and_a_frozen_input():
    model = small_resnet("eval")
    x = image(*SHAPE)
    other = Serial(model, x, sub_batch=2)
    for run in (model, other):
        model.zero_grad()
        run(x).sum().backward()
        if run is model:
            expected = [p.grad.clone() for p in model.parameters()]
    for a, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=0, atol=1e-10 * float(a.detach().abs().max()))


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


# --- several results --------------------------------------------------------------------------------


class Heads(nn.Module):
    """A body, what it returns, and two heads behind it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU())
        self.left = nn.Sequential(nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4))
        self.right = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x):
        h = self.body(x)
        return self.left(h), h, self.right(h)


def test_each_result_ends_a_chain():
    torch.manual_seed(0)
    other = assert_trains_alike(Heads().double(), image(5, 3, 6, 6, requires_grad=True), sub_batch=2)
    assert other.groups == [("body", 2, 3), ("left", 2, 3), ("right to right.2", 2, 3)] and not other.reasons


def test_a_result_in_the_middle_of_a_chain():
    class Inner(Heads):
        def forward(self, x):
            h = self.body[0](x)
            return self.body[1:](h), h

    other = assert_trains_alike(Inner().double(), image(5, 3, 6, 6, requires_grad=True), sub_batch=2)
    assert other.groups == [("body.0", 2, 3), ("body", 2, 3)] and not other.reasons


def test_a_result_inside_a_block_keeps_it_whole():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            h = self.a(x)
            inner = self.b(h)
            return self.c(inner) + h, inner

    other = assert_trains_alike(Inside().double(), image(5, 3, 4, 4, requires_grad=True), sub_batch=2)
    assert other.groups == [("a", 2, 3), ("b", 2, 3)] and "`b` is read outside" in other.reasons.values()


def test_results_of_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.c(torch.relu(self.a(x) + self.b(y))), self.b(y)

    model, x, y = Two().double(), image(5, 3, requires_grad=True), image(5, 3, seed=1, requires_grad=True)
    other = Serial(copy.deepcopy(model), x, y, sub_batch=2)
    assert [name for name, _, _ in other.groups] == ["relu to c", "b"]
    assert_equal(train(model, (x, y)), train(other.model, (x, y), run=lambda _, *inputs: other(*inputs)))


# --- what is refused --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "options", [{"sub_batch": 0}, {"buffer_bytes": 0}, {"buffer_bytes": "1MB"}, {"sub_batch": 1.5}]
)
def test_options_out_of_range(options):
    with pytest.raises(InvalidInputError, match="must be a whole number of at least 1, it is"):
        SerializeMinibatch(**options)


# --- other ways to run ------------------------------------------------------------------------------


def test_a_changed_weight_between_forward_and_backward_is_noticed():
    model = small_resnet("group")
    y = serial(model)(image(*SHAPE))
    with torch.no_grad():
        model.layer1.conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_checkpoint_and_func():
    model = small_resnet("group")
    x = image(*SHAPE, requires_grad=True)
    other = serial(model)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    (found,) = torch.autograd.grad(checkpoint(other, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found = torch.func.grad(lambda x: other(x).sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_traces_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    x = image(5, 3, 4, 4, requires_grad=True)
    other = Serial(model, x, sub_batch=2)
    y = torch.compile(other, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=1e-12)
    traced = make_fx(other, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert sum("convolution" in str(node.target) for node in traced.graph.nodes) == 2
    torch.compiler.reset()
