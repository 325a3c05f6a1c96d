"""Convolutions with kernels of ours: which, when, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import assert_same_step, collected

import normpass
from normpass.kernels.cpu.winograd import CpuWinograd
from normpass.measure import kept_bytes
from normpass.ops.depthwise_conv2d import DepthwiseConv2d
from normpass.ops.winograd_conv2d import WinogradConv2d
from normpass.optimized import state_of
from normpass.runtime.convolution import convolution_function


class Inverted(nn.Module):
    """expand, depthwise, project: the block of the mobile networks, with a kernel of 5."""

    def __init__(self, channels=6, **options):
        super().__init__()
        options = {"kernel_size": 5, "padding": 2, "groups": channels, "bias": False, **options}
        self.expand = nn.Conv2d(3, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, **options)
        self.last = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.expand(x)))
        return self.project(F.silu(self.last(self.depthwise(x))))


class Functional(Inverted):
    def forward(self, x):
        x = F.silu(self.norm(self.expand(x)))
        x = F.conv2d(x, self.depthwise.weight, None, 1, 2, groups=6)
        return self.project(F.silu(self.last(x)))


def pair(kind, memory_format=torch.contiguous_format, **options):
    torch.manual_seed(0)
    plain = kind(**options).double().to(memory_format=memory_format)
    return plain, normpass.optimize(copy.deepcopy(plain))


def has_kernels():
    return normpass.kernels.kernels_for("cpu") is not None


def ours(model, x):
    """How many convolutions of the graph may have kernels of ours."""
    (graph,) = collected(model, x).graphs
    return [n.target for n in graph.graph_module.graph.nodes].count(convolution_function)


def assert_change_is_seen(kind, change, x):
    plain, optimized = pair(kind)
    assert_same_step(plain, optimized, x)
    for model in (plain, optimized):
        torch.manual_seed(1)
        change(model)
    assert_same_step(plain, optimized, x)


@pytest.fixture
def runs(monkeypatch):
    """How often the weight's gradient was computed by the function that is tested here."""
    counted = []
    apply = DepthwiseConv2d.apply
    monkeypatch.setattr(DepthwiseConv2d, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


CASES = [
    (Inverted, torch.contiguous_format),
    (Inverted, torch.channels_last),
    (Functional, torch.channels_last),
]


@pytest.mark.parametrize("kind, memory_format", CASES, ids=str)
def test_a_step_is_the_same(kind, memory_format, runs):
    plain, optimized = pair(kind, memory_format)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_same_step(plain, optimized, x)
    assert optimized.depthwise.weight.grad.stride() == plain.depthwise.weight.grad.stride()
    is_joined = memory_format is torch.channels_last
    assert len(runs) == (has_kernels() and not is_joined)
    assert ours(plain, x) == 1


@pytest.mark.parametrize(
    "options, count",
    [
        ({"kernel_size": 4, "padding": 1}, 0),
        ({"groups": 3}, 0),
        ({"stride": 3}, 0),
        ({"groups": 1}, 0),
        ({"padding": "same"}, 1),  # what runs is decided by the call
        ({"dilation": 2}, 1),
        ({"padding_mode": "circular"}, 1),
    ],
    ids=str,
)
def test_others_run_as_they_are(options, count, runs):
    plain, optimized = pair(Inverted, **options)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_same_step(plain, optimized, x)
    assert len(runs) == (has_kernels() and "padding_mode" in options)
    assert ours(plain, x) == count


def hook(model):
    model.depthwise.register_forward_hook(lambda layer, args, y: 2 * y)


def freeze(model):
    model.depthwise.weight.requires_grad_(False)


def replace(model):
    model.depthwise = nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, dtype=torch.float64), nn.ReLU())


def evaluate(model):
    model.eval()


@pytest.mark.parametrize("change", [hook, freeze, replace, evaluate])
def test_changes_of_the_layer_are_seen(change):
    assert_change_is_seen(Inverted, change, torch.randn(2, 3, 9, 9, dtype=torch.float64))


def gradient_errors(model, exact, x):
    """How far a step's gradients are from `exact`, as fractions of the largest value of each."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    found = [p.grad for p in model.parameters()]
    assert all(g.dtype == p.dtype for g, p in zip(found, model.parameters(), strict=True))
    return [float((g - e).abs().max() / e.abs().max()) for g, e in zip(found, exact, strict=True)]


def test_autocast(runs):
    torch.manual_seed(0)
    plain = Inverted()
    optimized, exact = normpass.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = torch.randn(8, 3, 9, 9)
    exact(x.double()).square().mean().backward()
    exact = [p.grad for p in exact.parameters()]
    before, after = (gradient_errors(model, exact, x) for model in (plain, optimized))
    assert all(own <= 2 * other + 1e-2 for own, other in zip(after, before, strict=True))
    assert len(runs) == has_kernels()
    assert kept_bytes(optimized, x) < kept_bytes(plain, x)


def test_sixteen_bits_and_a_mixture():
    torch.manual_seed(0)
    plain = Inverted()
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = torch.randn(2, 3, 9, 9)
    assert_same_step(plain.bfloat16(), optimized.bfloat16(), x.bfloat16(), 5e-2)
    optimized.depthwise.float()
    with pytest.raises(RuntimeError, match="type"):
        optimized(x.bfloat16())


def test_a_convolution_that_runs_again():
    plain = Inverted().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plan = normpass.StepPlan.from_json({"version": 2, "decisions": {"rebuilt": ["depthwise"]}})
    optimized = normpass.optimize(copy.deepcopy(plain), plan=plan)
    graphs = []
    state_of(optimized).observers.append(lambda rewritten, inputs: graphs.append(rewritten))
    assert_same_step(plain, optimized, x)
    assert "convolution_function" in graphs[0].rebuilt.values()
    assert kept_bytes(optimized, x) < kept_bytes(normpass.optimize(copy.deepcopy(plain)), x)


def test_a_weight_that_changes_before_backward_is_found_out():
    plain = Inverted().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for model in (plain, normpass.optimize(copy.deepcopy(plain))):
        y = model(x).sum()
        with torch.no_grad():
            model.depthwise.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation|changed in place"):
            y.backward()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_under_torch_compile(inner):
    plain = Inverted().double()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend="normpass", options={"inner": inner}, fullgraph=True)
    assert_same_step(plain, compiled, torch.randn(2, 3, 9, 9, dtype=torch.float64))


def test_the_report_counts_them():
    report = normpass.explain(Inverted(), torch.randn(2, 3, 9, 9))
    assert report.convolutions == report.to_json()["convolutions"] == 1
    assert "convolutions that run kernels of normpass on the CPU: 1" in str(report)


@pytest.mark.skipif(not has_kernels(), reason="no C++ kernels were built")
@pytest.mark.parametrize("size, dtype, count", [(32, torch.float32, 1), (32, torch.bfloat16, 0), (1, torch.float32, 0)])
def test_the_report_counts_what_runs_at_these_shapes_and_dtypes(size, dtype, count):
    model, x = nn.Conv2d(64, 64, 3, padding=1).to(dtype), torch.randn(2, 64, size, size, dtype=dtype)
    assert normpass.explain(nn.Sequential(model), x).convolutions == count


# --- 3×3 ------------------------------------------------------------------------------------------


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
    counted = []
    apply = WinogradConv2d.apply
    monkeypatch.setattr(CpuWinograd, "pays", lambda *args: True)
    monkeypatch.setattr(WinogradConv2d, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


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


def test_it_runs_only_where_it_pays():
    torch.manual_seed(0)
    counted = []
    plain = Bottleneck()
    optimized = normpass.optimize(copy.deepcopy(plain))
    apply = WinogradConv2d.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WinogradConv2d, "apply", lambda *args: counted.append(1) or apply(*args))
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
