"""Depthwise convolutions whose weight's gradient is computed here: which, when, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normpass
from normpass.convolution import convolution_function, convolution_layer
from normpass.measure import kept_bytes
from normpass.module import part_of
from normpass.ops.depthwise_conv2d import DepthwiseConv2d


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


def targets(model):
    return [n.target for n in part_of(model).programs[0][1].graph.nodes]


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_same_step(plain, other, x, tolerance=1e-12):
    before, after = step(plain, x), step(other, x)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max()))


@pytest.fixture
def runs(monkeypatch):
    """How often the weight's gradient was computed by the function that is tested here."""
    counted = []
    apply = DepthwiseConv2d.apply
    monkeypatch.setattr(DepthwiseConv2d, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


@pytest.mark.parametrize("kind, function", [(Inverted, convolution_layer), (Functional, convolution_function)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_step_is_the_same(kind, function, memory_format, runs):
    torch.manual_seed(0)
    plain = kind().double().to(memory_format=memory_format)
    optimised = normpass.optimize(copy.deepcopy(plain))
    assert function in targets(optimised)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_same_step(plain, optimised, x)
    assert optimised.depthwise.weight.grad.stride() == plain.depthwise.weight.grad.stride()
    if normpass.kernels.kernels_for("cpu") is not None:
        assert len(runs) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"groups": 3},
        {"stride": 3},
        {"groups": 1},
    ],
    ids=str,
)
def test_others_are_left_alone(options):
    optimised = normpass.optimize(Inverted(**options).double())
    assert "depthwise" in targets(optimised) and convolution_layer not in targets(optimised)
    assert_same_step(copy.deepcopy(optimised), optimised, torch.randn(2, 3, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_what_only_the_layer_can_do(options, runs):
    plain = Inverted(**options).double()
    optimised = normpass.optimize(copy.deepcopy(plain))
    assert_same_step(plain, optimised, torch.randn(2, 3, 9, 9, dtype=torch.float64))
    assert not runs


def hook(model):
    model.depthwise.register_forward_hook(lambda layer, args, y: 2 * y)


def freeze(model):
    model.depthwise.weight.requires_grad_(False)


def replace(model):
    model.depthwise = nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, dtype=torch.float64), nn.ReLU())


def evaluate(model):
    model.eval()


@pytest.mark.parametrize("change", [hook, freeze, replace, evaluate])
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_of_the_layer_are_seen(change, when):
    torch.manual_seed(0)
    plain = Inverted().double()
    optimised = copy.deepcopy(plain)
    if when == "before":
        torch.manual_seed(1)
        change(optimised)
    optimised = normpass.optimize(optimised)
    torch.manual_seed(1)
    change(plain)
    if when == "after":
        torch.manual_seed(1)
        change(optimised)
    assert_same_step(plain, optimised, torch.randn(2, 3, 9, 9, dtype=torch.float64))


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
    optimised, exact = normpass.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = torch.randn(8, 3, 9, 9)
    exact(x.double()).square().mean().backward()
    exact = [p.grad for p in exact.parameters()]
    before, after = (gradient_errors(model, exact, x) for model in (plain, optimised))
    assert all(own <= 2 * other + 1e-2 for own, other in zip(after, before, strict=True))
    if normpass.kernels.kernels_for("cpu") is not None:
        assert len(runs) == 1
    assert kept_bytes(optimised, x) < kept_bytes(plain, x)


def test_sixteen_bits_and_a_mixture():
    torch.manual_seed(0)
    plain = Inverted()
    optimised = normpass.optimize(copy.deepcopy(plain))
    x = torch.randn(2, 3, 9, 9)
    assert_same_step(plain.bfloat16(), optimised.bfloat16(), x.bfloat16(), 5e-2)
    optimised.depthwise.float()
    with pytest.raises(RuntimeError, match="type"):
        optimised(x.bfloat16())


def test_a_convolution_that_runs_again():
    plain = Inverted().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plan = normpass.StepPlan.from_json({"version": 1, "decisions": {"rebuilt": ["depthwise"]}})
    optimised = normpass.optimize(copy.deepcopy(plain), plan=plan)
    assert "derived_convolution_layer" in [getattr(t, "__name__", "") for t in targets(optimised)]
    assert_same_step(plain, optimised, x)
    assert kept_bytes(optimised, x) < kept_bytes(normpass.optimize(copy.deepcopy(plain)), x)


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
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend="normpass", options={"inner": inner}, fullgraph=True)
    assert_same_step(plain, compiled, x)
    torch.compiler.reset()
    optimised = torch.compile(normpass.optimize(copy.deepcopy(plain)), backend=inner, fullgraph=True)
    assert_same_step(plain, optimised, x)


def test_the_report_counts_them():
    report = normpass.explain(Inverted())
    assert report.convolutions == report.to_json()["convolutions"] == 1
    assert "convolutions with kernels of normpass on the CPU: 1" in str(report)
