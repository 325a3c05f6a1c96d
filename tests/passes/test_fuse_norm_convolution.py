"""A norm, its activation and a depthwise convolution as one: when, and the same numbers."""

import copy

import convolutions
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import assert_same_step, step

import normpass
from normpass import kernels as library
from normpass.measure import kept_bytes, peak_bytes
from normpass.ops.norm_act_depthwise import NormActDepthwise
from normpass.recipe.recipes import Rebuilds

pytestmark = pytest.mark.skipif(library.kernels_for("cpu") is None, reason="there are no kernels that could join them")

LAST = torch.channels_last


class Inverted(convolutions.Inverted):
    channels, kernel_size, activation = 8, 3, staticmethod(F.relu6)


class Twice(Inverted):
    """Another layer reads what the norm makes as well."""

    def forward(self, x):
        x = F.relu6(self.norm(self.expand(x)))
        return self.project(F.relu6(self.last(self.depthwise(x)))) + x.mean()


class Joined(Inverted):
    """A residual is added before the activation."""

    def forward(self, x):
        x = self.expand(x)
        x = F.relu6(self.norm(x) + x)
        return self.project(F.relu6(self.last(self.depthwise(x))))


@pytest.fixture
def runs(monkeypatch):
    """How often both ran as one."""
    return convolutions.count_runs(monkeypatch, NormActDepthwise)


def images(samples=4, size=(9, 7), dtype=torch.float64, **options):
    torch.manual_seed(5)
    return torch.randn(samples, 3, *size, dtype=dtype).contiguous(memory_format=LAST)


def pair(kind=Inverted, **options):
    return convolutions.pair(kind, LAST, **options)


@pytest.mark.parametrize("size, stride, bias", [(3, 1, False), (3, 2, True), (5, 1, True), (5, 2, False), (7, 2, True)])
def test_a_step_is_the_same(size, stride, bias, runs):
    plain, optimized = pair(kernel_size=size, padding=size // 2, stride=stride, bias=bias)
    for _ in range(2):
        assert_same_step(plain, optimized, images())
    assert len(runs) == 2
    assert optimized.depthwise.weight.grad.stride() == plain.depthwise.weight.grad.stride()


def test_nothing_is_rebuilt_and_less_is_kept(runs):
    plain, optimized = pair(stride=2)
    x = images(size=(32, 32))
    with Rebuilds() as rebuilds:
        step(optimized, x)
    assert rebuilds.total == 1 and len(runs) == 1  # the result of the last norm, for `project`
    assert kept_bytes(optimized, x) < 0.7 * kept_bytes(plain, x)
    apart = copy.deepcopy(optimized)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normpass.runtime.convolution, "_joined_steps", lambda *args: None)
        assert kept_bytes(apart, x) == kept_bytes(optimized, x)
        peak = peak_bytes(apart, x)
    assert peak_bytes(optimized, x) < peak


@pytest.mark.parametrize(
    "kind, options",
    [
        (Twice, {}),
        (Joined, {}),
        (Inverted, {"groups": 4}),
        (Inverted, {"dilation": 2}),
        (Inverted, {"padding": "same"}),
    ],
    ids=str,
)
def test_others_stay_apart(kind, options, runs):
    plain, optimized = pair(kind, **options)
    assert_same_step(plain, optimized, images())
    assert not runs


def test_in_planes_they_stay_apart(runs):
    plain = Inverted().double()
    optimized = normpass.optimize(copy.deepcopy(plain))
    assert_same_step(plain, optimized, images().contiguous())
    assert not runs


def freeze_norm(model):
    model.norm.eval()


def hook_norm(model):
    model.norm.register_forward_hook(lambda layer, args, y: 2 * y)


def replace_convolution(model):
    model.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64), nn.Tanh())


def replace_norm(model):
    model.norm = nn.InstanceNorm2d(8, affine=True, dtype=torch.float64)


def no_gradients(model):
    model.requires_grad_(False)


def cumulative_average(model):
    model.norm.momentum = None


@pytest.mark.parametrize(
    "change, joined",
    [
        (freeze_norm, True),
        (convolutions.freeze, True),
        (convolutions.evaluate, True),
        (cumulative_average, True),
        (hook_norm, False),
        (convolutions.hook, True),
        (replace_convolution, False),
        (replace_norm, False),
        (no_gradients, True),
    ],
)
def test_changes_after_the_rewrite_are_seen(change, joined, runs):
    plain, optimized = pair()
    assert_same_step(plain, optimized, images())
    assert len(runs) == 1
    for model in (plain, optimized):
        torch.manual_seed(1)
        change(model)
    for _ in range(2):
        assert_same_step(plain, optimized, images())
    assert len(runs) == (3 if joined else 1)


def test_without_gradients():
    plain, optimized = pair()
    with torch.no_grad():
        for mode in (True, False):
            a, b = plain.train(mode)(images()), optimized.train(mode)(images())
            assert (a - b).abs().max() < 1e-12
    for a, b in zip(plain.buffers(), optimized.buffers(), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("changed", ["weight", "norm", "input"])
def test_what_changes_before_backward_is_found_out(changed):
    _, optimized = pair()
    seen = []
    optimized.expand.register_forward_hook(lambda layer, args, y: seen.append(y))
    y = optimized(images()).sum()
    with torch.no_grad():
        {"weight": optimized.depthwise.weight, "norm": optimized.norm.weight, "input": seen[0]}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_backward_twice():
    plain, optimized = pair()
    found = []
    for model in (plain, optimized):
        y = model(images()).square().mean()
        y.backward(retain_graph=True)
        y.backward()
        found.append([p.grad for p in model.parameters()])
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_gradients_of_gradients():
    found = []
    for model in pair():
        x = images(2, (5, 5)).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.abs().max()))


def test_autocast_keeps_them_apart(runs):
    plain, optimized = (model.float() for model in pair())
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), optimized(x)
    assert a.dtype == b.dtype and (a - b).abs().max() < 5e-2 * a.abs().max() and not runs


def test_empty_batches():
    plain, optimized = pair()
    for model in (plain, optimized):
        model.eval()
    assert plain(images(0)).shape == optimized(images(0)).shape
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        optimized.train()(images(1, (1, 1)))


def test_the_layer_complains_about_an_image_that_is_too_small():
    plain, optimized = pair(kernel_size=5, padding=0)
    for model in (plain, optimized):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            model(images(4, (3, 3)))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_under_torch_compile(inner, runs):
    plain, _ = pair()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend="normpass", options={"inner": inner}, fullgraph=True)
    assert_same_step(plain, compiled, images())
    assert len(runs) == (inner == "eager")


def test_kernels_switched_off(runs):
    plain, optimized = pair()
    with library.disabled():
        assert_same_step(plain, optimized, images())
    assert not runs


def test_what_a_plan_keeps_is_joined_all_the_same(runs):
    plain, optimized = pair()
    plan = normpass.StepPlan.from_json({"version": 2, "decisions": {"kept": ["norm"]}})
    planned = normpass.optimize(copy.deepcopy(plain), plan=plan)
    assert_same_step(plain, planned, images())
    assert len(runs) == 1
    assert kept_bytes(planned, images()) == kept_bytes(optimized, images())
    with library.disabled():  # apart, as planned
        assert kept_bytes(planned, images()) > kept_bytes(optimized, images())


def test_what_is_planned_is_the_graph_before():
    _, optimized = pair()
    report = normpass.explain(optimized, images())
    assert report.convolutions == 1
    plain, _ = pair()
    for budget in (0.9, 0.6):
        planned = normpass.optimize(copy.deepcopy(plain), images(), memory_budget=budget)
        assert_same_step(copy.deepcopy(plain), planned, images())
