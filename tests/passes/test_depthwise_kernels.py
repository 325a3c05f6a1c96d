"""Depthwise convolutions with kernels of ours: which, when, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convolutions import Inverted, assert_change_is_seen, count_runs, evaluate, freeze, has_kernels, hook, ours, pair
from torch import nn
from training import assert_same_step, captures_of

import normpass
from normpass.measure import kept_bytes
from normpass.ops.depthwise_conv2d import DepthwiseConv2d


class Functional(Inverted):
    def forward(self, x):
        x = F.silu(self.norm(self.expand(x)))
        x = F.conv2d(x, self.depthwise.weight, None, 1, 2, groups=6)
        return self.project(F.silu(self.last(x)))


@pytest.fixture
def runs(monkeypatch):
    """How often the weight's gradient was computed by the function that is tested here."""
    return count_runs(monkeypatch, DepthwiseConv2d)


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


def replace(model):
    model.depthwise = nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, dtype=torch.float64), nn.ReLU())


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
    graphs = captures_of(optimized)
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
