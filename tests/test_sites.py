"""Which spellings are recognised as one site, and what surrounds it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normpass.capture import capture, required_arguments
from normpass.sites import find_sites


class Block(nn.Module):
    """conv → norm → `tail`, where `tail(self, y, x)` is what a test varies."""

    def __init__(self, tail, norm=None, **layers):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = norm if norm is not None else nn.BatchNorm2d(4)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.tail = tail

    def forward(self, x):
        return self.tail(self, self.norm(self.conv(x)), x)


def sites_of(module):
    return find_sites(capture(module, required_arguments(module)))


def only_site(module):
    (site,) = sites_of(module)
    return site


ACTIVATIONS = [
    (lambda m, y, x: torch.relu(y), "relu", ()),
    (lambda m, y, x: y.relu(), "relu", ()),
    (lambda m, y, x: y.relu_(), "relu", ()),
    (lambda m, y, x: F.relu(y, True), "relu", ()),
    (lambda m, y, x: F.relu_(y), "relu", ()),
    (lambda m, y, x: torch.relu_(y), "relu", ()),
    (lambda m, y, x: F.relu6(y, inplace=True), "hardtanh", (0.0, 6.0)),
    (lambda m, y, x: F.hardtanh(y, -2.0, 2.0), "hardtanh", (-2.0, 2.0)),
    (lambda m, y, x: F.hardtanh(y), "hardtanh", (-1.0, 1.0)),
    (lambda m, y, x: F.leaky_relu(y), "leaky_relu", (0.01,)),
    (lambda m, y, x: F.leaky_relu(y, 0.2, True), "leaky_relu", (0.2,)),
    (lambda m, y, x: F.elu(y, alpha=0.5), "elu", (0.5,)),
    (lambda m, y, x: F.selu(y), "selu", ()),
    (lambda m, y, x: F.celu(y, 2.0), "celu", (2.0,)),
    (lambda m, y, x: F.silu(y), "silu", ()),
    (lambda m, y, x: F.gelu(y), "gelu", ()),
    (lambda m, y, x: F.gelu(y, approximate="tanh"), "gelu_tanh", ()),
    (lambda m, y, x: F.hardswish(y), "hardswish", ()),
    (lambda m, y, x: F.hardsigmoid(y), "hardsigmoid", ()),
    (lambda m, y, x: y.sigmoid(), "sigmoid", ()),
    (lambda m, y, x: torch.tanh(y), "tanh", ()),
    (lambda m, y, x: F.softplus(y, 2.0), "softplus", (2.0, 20.0)),
    (lambda m, y, x: F.mish(y), "mish", ()),
    (lambda m, y, x: y, "identity", ()),
    (lambda m, y, x: y.clamp(min=0), "identity", ()),  # not an activation that is known: the norm alone
]


@pytest.mark.parametrize("tail, name, args", ACTIVATIONS)
def test_functional_and_method_activations(tail, name, args):
    site = only_site(Block(tail))
    assert (site.activation.name, site.activation.args) == (name, args)
    assert site.refused is None


LAYERS = [
    (nn.ReLU(inplace=True), "relu", ()),
    (nn.ReLU6(), "hardtanh", (0.0, 6.0)),
    (nn.Hardtanh(-3, 3), "hardtanh", (-3.0, 3.0)),
    (nn.LeakyReLU(0.1), "leaky_relu", (0.1,)),
    (nn.ELU(0.7), "elu", (0.7,)),
    (nn.SELU(), "selu", ()),
    (nn.CELU(1.5), "celu", (1.5,)),
    (nn.SiLU(inplace=True), "silu", ()),
    (nn.GELU(), "gelu", ()),
    (nn.GELU("tanh"), "gelu_tanh", ()),
    (nn.Hardswish(), "hardswish", ()),
    (nn.Hardsigmoid(), "hardsigmoid", ()),
    (nn.Sigmoid(), "sigmoid", ()),
    (nn.Tanh(), "tanh", ()),
    (nn.Softplus(2, 10), "softplus", (2.0, 10.0)),
    (nn.Mish(), "mish", ()),
    (nn.PReLU(), "identity", ()),  # has a parameter: stays a layer of its own
]


@pytest.mark.parametrize("layer, name, args", LAYERS, ids=lambda v: type(v).__name__)
def test_activation_layers(layer, name, args):
    site = only_site(Block(lambda m, y, x: m.act(y), act=layer))
    assert (site.activation.name, site.activation.args) == (name, args)


def test_a_subclass_of_an_activation_is_not_taken_for_it():
    class Odd(nn.ReLU):
        def forward(self, x):
            return x * 2

    assert only_site(Block(lambda m, y, x: m.act(y), act=Odd())).activation.name == "identity"


ADDITIONS = [
    lambda m, y, x: F.relu(y + x),
    lambda m, y, x: F.relu(x + y),
    lambda m, y, x: F.relu(torch.add(y, x)),
    lambda m, y, x: F.relu(y.add(x)),
    lambda m, y, x: F.relu(y.add_(x)),
    lambda m, y, x: F.relu(operator.iadd(y, x)),
]


@pytest.mark.parametrize("tail", ADDITIONS)
def test_residual_additions(tail):
    site = only_site(Block(tail))
    assert site.residual is not None and site.residual.op == "placeholder"
    assert site.pattern == "Conv2d → BatchNorm2d → add → relu"


@pytest.mark.parametrize(
    "tail",
    [
        lambda m, y, x: F.relu(torch.add(y, x, alpha=2)),
        lambda m, y, x: F.relu(y + 1.0),
        lambda m, y, x: F.relu(y + y),
        lambda m, y, x: F.relu(y + x) * y,
    ],
)
def test_additions_that_are_not_absorbed(tail):
    assert only_site(Block(tail)).residual is None


def test_of_two_norms_added_the_later_takes_the_other_as_residual():
    class Join(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))

    first, second = sites_of(Join())
    assert (first.path, first.residual, first.activation.name) == ("norm_a", None, "identity")
    assert (second.path, second.residual, second.activation.name) == ("norm_b", first.norm, "relu")


def test_activation_with_a_second_reader_of_the_norm_is_not_absorbed():
    site = only_site(Block(lambda m, y, x: F.relu(y) + y))
    assert site.activation.name == "identity" and site.written is None


def test_result_changed_in_place_later_is_noticed():
    assert only_site(Block(lambda m, y, x: F.relu(y).add_(1))).written == "add_"
    assert only_site(Block(lambda m, y, x: F.relu(y).view(-1).mul_(2))).written == "mul_"


def test_input_changed_in_place_later_refuses():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            y.add_(1)
            return z + y

    assert "changed in place later" in only_site(Late()).refused


PRODUCERS = [
    (nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),
    (nn.Conv2d(4, 4, 3, dilation=2), nn.BatchNorm2d(4)),
    (nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)),
    (nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)),
    (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    (nn.Linear(4, 4), nn.BatchNorm1d(4)),
]


@pytest.mark.parametrize("producer, norm", PRODUCERS, ids=lambda m: type(m).__name__)
def test_producers(producer, norm):
    site = only_site(nn.Sequential(producer, norm, nn.ReLU()))
    assert site.pattern == f"{type(producer).__name__} → {type(norm).__name__} → relu"


def test_functional_batch_norm():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x):
            y = F.batch_norm(self.conv(x), self.mean, self.var, self.weight, training=self.training)
            return F.relu(y)

    assert only_site(Functional()).pattern == "Conv2d → F.batch_norm → relu"


@pytest.mark.parametrize(
    "norm, reason",
    [
        (nn.GroupNorm(2, 4), "GroupNorm is not one of the norms"),
        (nn.InstanceNorm2d(4), "InstanceNorm2d is not one of the norms"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm is not supported yet"),
        (type("Mine", (nn.BatchNorm2d,), {})(4), "Mine is not one of the norms"),
    ],
)
def test_other_norms_are_refused_with_a_reason(norm, reason):
    assert reason in only_site(Block(lambda m, y, x: F.relu(y), norm=norm)).refused


def test_norm_with_a_hook_is_refused():
    block = Block(lambda m, y, x: F.relu(y))
    block.norm.register_forward_hook(lambda *a: None)
    assert only_site(block).refused == "it has hooks"


def test_norm_called_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(F.relu(self.norm(x)))

    assert [s.refused for s in sites_of(Twice())] == ["it is called 2 times in one forward"] * 2
