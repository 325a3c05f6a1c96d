"""Regions that run sub-batch by sub-batch: what they are, and that they train the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sub_batches import NORMS, SHAPE, Serial, assert_trains_alike, serial, small_resnet
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from training import assert_equal, image, train

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
