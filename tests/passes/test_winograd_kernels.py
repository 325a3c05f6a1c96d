"""3×3 convolutions by Winograd's algorithm: which, when, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convolutions import assert_change_is_seen, count_runs, evaluate, has_kernels, ours, pair
from torch import nn
from training import assert_same_step

import normpass
from normpass.kernels.cpu.winograd import CpuWinograd
from normpass.measure import kept_bytes
from normpass.ops.winograd_conv2d import WinogradConv2d


class Bottleneck(nn.Module):
    """reduce, 3×3, expand: the block of the residual networks."""

    def __init__(self, **options):
        super().__init__()
        self.reduce = nn.Conv2d(3, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.middle = nn.Conv2d(16, 20, **{"kernel_size": 3, "padding": 1, **options})
        self.last = nn.BatchNorm2d(20)
        self.expand = nn.Conv2d(20, 2, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.reduce(x)))
        return self.expand(F.relu(self.last(self.middle(x))))


class FunctionalBottleneck(Bottleneck):
    def forward(self, x):
        x = F.relu(self.norm(self.reduce(x)))
        x = F.conv2d(x, self.middle.weight, self.middle.bias, padding=(1, 1))
        return self.expand(F.relu(self.last(x)))


@pytest.fixture
def winograd_runs(monkeypatch):
    """How often a convolution ran as Winograd's, which here it does whether it pays or not."""
    monkeypatch.setattr(CpuWinograd, "pays", lambda *args: True)
    return count_runs(monkeypatch, WinogradConv2d)


def images(samples=4, size=(9, 7), **options):
    return torch.randn(samples, 3, *size, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    "kind, memory_format",
    [
        (Bottleneck, torch.contiguous_format),
        (Bottleneck, torch.channels_last),
        (FunctionalBottleneck, torch.channels_last),
    ],
    ids=str,
)
def test_a_step_of_three_by_three(kind, memory_format, winograd_runs):
    plain, optimized = pair(kind, memory_format)
    x = images().contiguous(memory_format=memory_format)
    assert_same_step(plain, optimized, x)
    assert optimized.middle.weight.grad.stride() == plain.middle.weight.grad.stride()
    assert len(winograd_runs) == has_kernels()
    with torch.no_grad():
        assert (plain.eval()(x) - optimized.eval()(x)).abs().max() < 1e-12
    assert len(winograd_runs) == 2 * has_kernels()
    assert ours(plain, x) == 1


@pytest.mark.parametrize(
    "options, count",
    [
        ({"stride": 2}, 0),
        ({"groups": 4}, 0),
        ({"padding": 3}, 0),
        ({"kernel_size": 5}, 0),
        ({"padding": "same"}, 0),
        ({"dilation": 2}, 1),  # what runs is decided by the call
    ],
    ids=str,
)
def test_other_convolutions_run_as_they_are(options, count, winograd_runs):
    plain, optimized = pair(Bottleneck, **options)
    assert_same_step(plain, optimized, images())
    assert not winograd_runs and ours(plain, images()) == count


class Masked(nn.Module):
    """Causal, as in PixelCNN: no result depends on a later pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        with torch.no_grad():
            self.conv.weight[:, :, 1, 2:] = self.conv.weight[:, :, 2] = 0

    def forward(self, x):
        return self.conv(x)


def test_a_masked_convolution_stays_causal():
    model = normpass.optimize(Masked())
    x = torch.randn(8, 64, 28, 28, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, :, 11, 11] *= 1e6
    before = [model(v).flatten(2)[:, :, : 11 * 28 + 11] for v in (x, later)]
    assert torch.equal(*before)


def test_without_winograd(winograd_runs):
    """Asked for when optimized, or where it runs; a copy and a budget keep to it."""
    plain = Bottleneck().double()
    models = [normpass.optimize(copy.deepcopy(plain), winograd=False)]
    models.append(copy.deepcopy(models[0]))
    models.append(normpass.optimize(copy.deepcopy(plain), images(), memory_budget=0.9, winograd=False))
    for model in models:
        assert_same_step(copy.deepcopy(plain), model, images())
    assert not normpass.explain(plain, images(), winograd=False).convolutions
    with normpass.kernels.disabled("winograd"):
        assert_same_step(copy.deepcopy(plain), normpass.optimize(copy.deepcopy(plain)), images())
    assert not winograd_runs


def test_a_three_by_three_of_what_was_padded(winograd_runs):
    plain, optimized = pair(Bottleneck, padding_mode="reflect")
    assert_same_step(plain, optimized, images())
    assert len(winograd_runs) == has_kernels()


def test_it_runs_only_where_it_pays(monkeypatch):
    torch.manual_seed(0)
    plain = Bottleneck()
    optimized = normpass.optimize(copy.deepcopy(plain))
    counted = count_runs(monkeypatch, WinogradConv2d)
    assert_same_step(plain, optimized, images().float(), 1e-5)
    assert not counted


@pytest.mark.parametrize(
    "samples, inside, outside, size, channels_last, expected",
    [
        (16, 64, 64, 56, True, (True, True)),
        (16, 128, 32, 28, True, (True, True)),
        (16, 128, 32, 7, True, (False, False)),  # transforms take longer than the products save
        (2, 512, 512, 7, True, (False, True)),  # and transforming the weight
        (2, 64, 64, 56, False, (True, True)),
        (64, 8, 8, 56, True, (False, False)),  # less than a vector of channels
        (1, 16, 16, 28, True, (False, False)),  # too small for a call from Python
    ],
)
def test_where_it_pays(samples, inside, outside, size, channels_last, expected):
    kernels = normpass.kernels.kernels_for("cpu")
    if kernels is None or not kernels.winograd._has_fma:
        pytest.skip("there are no kernels that could pay")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(samples, inside, size, size).contiguous(memory_format=memory_format)
    assert tuple(kernels.winograd.pays(x, outside, (size, size), of_weight) for of_weight in (False, True)) == expected


def freeze_middle(model):
    model.middle.weight.requires_grad_(False)


def hook_middle(model):
    model.middle.register_forward_hook(lambda layer, args, y: 2 * y)


def replace_middle(model):
    model.middle = nn.Sequential(nn.Conv2d(16, 20, 3, padding=1, dtype=torch.float64), nn.ReLU())


@pytest.mark.parametrize("change", [hook_middle, freeze_middle, replace_middle, evaluate])
def test_changes_of_the_three_by_three_are_seen(change, winograd_runs):
    assert_change_is_seen(Bottleneck, change, images())


def test_a_three_by_three_that_runs_again(winograd_runs):
    plain = Bottleneck().double()
    plan = normpass.StepPlan.from_json({"version": 2, "decisions": {"rebuilt": ["middle"]}})
    optimized = normpass.optimize(copy.deepcopy(plain), plan=plan)
    assert_same_step(plain, optimized, images())
    assert kept_bytes(optimized, images()) < kept_bytes(normpass.optimize(copy.deepcopy(plain)), images())


def test_autocast_takes_the_vendors(winograd_runs):
    plain = Bottleneck()
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), optimized(x)
    assert a.dtype == b.dtype and (a - b).abs().max() < 5e-2 * a.abs().max() and not winograd_runs


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
def test_other_derivatives_take_the_vendors(winograd_runs):
    model = normpass.optimize(Bottleneck().double()).eval()
    x = images()
    _, along = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert along.shape == model(x).shape
    inside = torch.func.vmap(lambda one: model(one[None])[0])(x)
    assert (inside - model(x)).abs().max() < 1e-12


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_three_by_three_under_torch_compile(inner, winograd_runs):
    plain = Bottleneck().double()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend="normpass", options={"inner": inner}, fullgraph=True)
    assert_same_step(plain, compiled, images())
    assert_same_step(plain, compiled, images(7))  # another batch
