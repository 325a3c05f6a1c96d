"""torch.compile(backend="normpass"): the same numbers, the same kept bytes, one graph; and its options."""

import copy
import logging
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from compiled import compare, compile_with, largest_difference, quietly, train
from networks import NETWORKS, network
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

import normpass
from normpass.backend import BackendOptions, compile_graph, device_of, has_plain_norms, read_options
from normpass.graph.nodes import name_of
from normpass.measure import kept_bytes
from normpass.pipeline import Request, rewrite
from normpass.runtime.functional import split_norm_act

SIX = ("unet", "conv1d", "decoder", "functional", "grouped", "tiny_densenet")
INNER = ("aot_eager", "eager", "aot_eager", "aot_eager", "eager", "aot_eager")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("name, inner", list(zip(SIX, INNER, strict=True)))
def test_small_networks(name, inner):
    row = compare(network(name), inner)
    assert row["difference"] < 1e-9
    assert row["graphs"] == 1
    assert row["graphs of another batch"] <= 1
    assert row["kept"]["backend"] <= 1.12 * row["kept"]["optimize"]


class Shuffle(nn.Module):
    """A channel shuffle behind a concatenation: what stands between them is a view."""

    def __init__(self):
        super().__init__()
        convs = (nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(16, 8, 1, bias=False))
        self.stem, (self.a, self.b, self.last) = nn.Conv2d(3, 8, 3), convs
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        x = torch.cat((F.relu(self.norms[1](self.a(x))), F.relu(self.norms[2](self.b(x)))), 1)
        return self.last(x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2))


def test_a_view_of_what_is_made_again_is_not_kept():
    model, x = Shuffle(), torch.randn(2, 3, 18, 18)
    compiled = compile_with(copy.deepcopy(model), "aot_eager")
    assert kept_bytes(compiled, x) <= 1.02 * kept_bytes(normpass.optimize(model), x)


def test_the_six_are_among_the_networks():
    assert set(SIX) < {entry.name for entry in NETWORKS}


class Net(nn.Module):
    """A residual block, a concatenation, a gate, a dropout: one of each thing that is rebuilt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.norm_a(self.a(x)) + x)
        y = F.silu(self.norm_b(self.b(torch.cat((x, y), 1))))
        y = y * self.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        return self.head(F.dropout(y, 0.5, self.training)).mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def images(step, dtype=torch.float64):
    return (torch.randn(4, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(step)),)


def test_torch_finds_the_backend_by_its_name():
    code = """
import sys, torch
assert "normpass" not in sys.modules
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU())
compiled = torch.compile(model, backend="normpass", options={"inner": "eager"})
compiled(torch.randn(2, 1, 5, 5)).sum().backward()
assert "normpass.backend" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_inductor_trains_the_same(net):
    """The inner backend by default, in fp32, channels_last; its mode is accepted (without a GPU it changes nothing)."""
    net = net.float().to(memory_format=torch.channels_last)
    own = copy.deepcopy(net)
    compiled = torch.compile(own, backend="normpass", mode="reduce-overhead", fullgraph=True)
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with inductor_config.patch(fallback_random=True):  # eager's random numbers, for the dropout
        found = train(own, compiled, lambda step: (x + step,), torch.float32)
    assert largest_difference(found, train(net, net, lambda step: (x + step,), torch.float32)) < 1e-5
    kept = quietly(kept_bytes, compiled, x)
    assert kept <= 1.12 * kept_bytes(normpass.optimize(net), x)
    assert kept < 0.6 * kept_bytes(net, x)


def test_eval_mode_and_frozen_norms(net):
    net.norm_a.eval()
    own = copy.deepcopy(net)
    compiled = compile_with(own, "aot_eager")
    assert (
        largest_difference(train(own, compiled, images, torch.float64), train(net, net, images, torch.float64)) < 1e-12
    )
    x = images(5)[0]
    torch.testing.assert_close(compiled.eval()(x), net.eval()(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=1e-12)


def test_autocast(net):
    net = net.float()
    own = copy.deepcopy(net)

    class UnderAutocast(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x).float()

    plain, optimized = UnderAutocast(net), UnderAutocast(normpass.optimize(copy.deepcopy(net)))
    compiled = compile_with(UnderAutocast(own), "aot_eager")
    expected = train(net, plain, images, torch.float32)
    assert largest_difference(train(own, compiled, images, torch.float32), expected) < 2e-2
    x = torch.randn(4, 3, 64, 64)
    assert quietly(kept_bytes, compiled, x) <= 1.12 * kept_bytes(optimized, x)


def test_dynamic_batch(net):
    own = copy.deepcopy(net)
    compiled = torch.compile(own, backend="normpass", options={"inner": "aot_eager"}, fullgraph=True, dynamic=True)
    for batch in (3, 5, 2):
        x = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
        torch.manual_seed(0)
        expected = net(x)
        torch.manual_seed(0)
        torch.testing.assert_close(quietly(compiled, x), expected, rtol=0, atol=1e-12)


def test_channels_last_survives(net):
    block = net.stem.to(memory_format=torch.channels_last)
    x = images(0)[0].to(memory_format=torch.channels_last)
    for inner in ("eager", "aot_eager"):
        assert compile_with(block, inner)(x).is_contiguous(memory_format=torch.channels_last)


def test_the_users_own_checkpoint_stays_in_charge(net, caplog):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    own, plain = Checkpointed(), copy.deepcopy(net)
    compiled = torch.compile(own, backend="normpass", options={"inner": "aot_eager"})
    caplog.set_level(logging.INFO, "normpass.backend")
    found, expected = train(own, compiled, images, torch.float64), train(plain, plain, images, torch.float64)
    del found["buffers"], expected["buffers"]  # a checkpoint moves running statistics twice, with or without us
    assert largest_difference(found, expected) < 1e-12
    assert "3 norms left alone, inside a region of its own" in caplog.text


# --- what is done to the graph --------------------------------------------------------------------


def test_the_graph_has_our_sites_and_says_so(net, caplog):
    found = []

    def backend(graph_module, example_inputs):
        found.append(rewrite(graph_module, example_inputs, Request()))
        return graph_module.forward

    torch.compile(net, backend=backend, fullgraph=True)(*images(0))
    (rewritten,) = found
    assert [choice.rewrite for choice in rewritten.choices] == ["split_bn"] * 3
    assert [(choice.site.path, choice.site.pattern) for choice in rewritten.choices] == [
        ("stem.1", "conv2d → BatchNorm2d → relu"),
        ("norm_a", "conv2d → BatchNorm2d → add → relu"),
        ("norm_b", "conv2d → BatchNorm2d → silu"),
    ]
    facts, maker = rewritten.found.facts, rewritten.found.maker
    again = sorted(name_of(facts.steps[maker[value]].target) for value in rewritten.again)
    assert again == ["cat", "dropout", "mul"] + ["split_norm_act"] * 3
    assert sum(node.target is split_norm_act for node in rewritten.graph_module.graph.nodes) == 3
    with caplog.at_level(logging.INFO, "normpass.backend"):
        quietly(compile_with(net, "aot_eager"), *images(0))
    assert "norm_b (conv2d → BatchNorm2d → silu): split_bn" in caplog.text
    assert f"3 norms, {len(again)} results made again" in caplog.text


def test_a_norm_that_is_left_alone_is_named(caplog):
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            x = x + 1
            y = self.norm(x)
            x.mul_(2.0)
            return x + y

    with caplog.at_level(logging.INFO, "normpass.backend"):
        quietly(compile_with(Overwritten(), "eager"), torch.randn(2, 3, 4, 4))
    assert "norm (add → BatchNorm2d): left alone; " in caplog.text
    assert "its input is changed in place later, by `mul_`" in caplog.text


def test_without_gradients_the_graph_stays(net):
    seen = []
    inner = compile_graph.__globals__["lookup_backend"]

    def backend(graph_module, example_inputs):
        seen.append([str(node) for node in graph_module.graph.nodes])
        run = compile_graph(graph_module, example_inputs, options={"inner": "aot_eager"})
        seen.append([str(node) for node in graph_module.graph.nodes])
        return run

    assert callable(inner("aot_eager"))
    with torch.no_grad():
        torch.compile(net, backend=backend, fullgraph=True)(*images(0))
    assert seen[0] == seen[1]


# --- options --------------------------------------------------------------------------------------


def test_options():
    assert read_options(None) == BackendOptions("inductor", None, winograd=True)
    assert read_options({"winograd": False}) == BackendOptions(winograd=False)
    assert read_options({"inner": "eager"}) == BackendOptions("eager", None)


def test_norms_are_plain_operators_for_inductor_on_cuda():
    with FakeTensorMode():
        inputs = [torch.tensor(1), torch.empty(2, 3, device="cuda"), torch.empty(2)]
    assert (device_of(inputs), device_of([3, torch.empty(2, 3)])) == ("cuda", "cpu")
    for options, device, is_plain in (
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"inner": "aot_eager"}, "cuda", False),
        ({"kernels": True}, "cuda", False),
        ({"inner": "aot_eager", "kernels": False}, "cpu", True),
    ):
        assert has_plain_norms(read_options(options), device) is is_plain, (options, device)


@pytest.mark.parametrize("inner, frozen", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_norms_as_plain_operators(net, inner, frozen, monkeypatch):
    """What CUDA gets by default: the same numbers, running statistics too, and kept bytes; no op of ours."""
    monkeypatch.setattr("normpass.backend.device_of", lambda inputs: "cuda")
    net.norm_a.train(not frozen)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    net.to(
        memory_format=torch.channels_last
    ).training = False  # without dropout, whose random numbers Inductor draws otherwise in float64
    own = copy.deepcopy(net)
    options = {"inner": inner} if inner == "inductor" else {"inner": inner, "kernels": False}
    compiled = torch.compile(own, backend="normpass", options=options, fullgraph=True, dynamic=False)
    with inductor_config.patch(fallback_random=True), ops_that_run() as ran:
        got = train(own, compiled, lambda step: (x + step,), torch.float64)
    wanted = train(net, net, lambda step: (x + step,), torch.float64)
    assert largest_difference(got, wanted) < 1e-11
    assert not any("norm_act" in name for name in ran), ran
    assert quietly(kept_bytes, compiled, x) <= 1.12 * kept_bytes(normpass.optimize(copy.deepcopy(net)), x)


@contextmanager
def ops_that_run():
    """Names of this package's operators that are called inside."""
    names: set[str] = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield names
    names.update(event.key for event in profile.key_averages() if event.key.startswith("normpass::"))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kernels": "ours"}, normpass.InvalidInputError, "`kernels` is 'ours', it must be True, False or None"),
        ({"winograd": "no"}, normpass.InvalidInputError, "`winograd` is 'no', it must be True or False"),
        ({"inner": "eager", "kernels": False}, normpass.InvalidInputError, "`kernels=False` is for a compiler"),
        (
            {"iner": "eager"},
            normpass.InvalidInputError,
            "no option `iner`; there are inner, memory_budget, winograd, kernels",
        ),
        ({"inner": "tvm"}, normpass.InvalidInputError, "choose from inductor, aot_eager, eager"),
        ({"memory_budget": "much"}, normpass.InvalidInputError, "give a fraction such as 0.5"),
    ],
)
def test_bad_options(net, options, error, words):
    with pytest.raises(error, match=words):
        read_options(options)
    with pytest.raises(BackendCompilerFailed, match=words):
        torch.compile(net, backend="normpass", options=options)(*images(0))


def test_a_budget_that_cannot_be_kept(net):
    with pytest.raises(BackendCompilerFailed, match="no plan keeps fewer than"):
        torch.compile(net, backend="normpass", options={"inner": "eager", "memory_budget": 1e-6})(*images(0))


@pytest.mark.parametrize("inner, budget", [("eager", 0.6), ("aot_eager", 0.35)])
def test_a_memory_budget_is_kept_and_changes_no_number(net, inner, budget):
    own = copy.deepcopy(net)
    options = {"inner": inner, "memory_budget": budget}
    compiled = torch.compile(own, backend="normpass", options=options, fullgraph=True)
    found = train(own, compiled, images, torch.float64)
    assert largest_difference(found, train(net, net, images, torch.float64)) < 1e-12
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    plain = kept_bytes(net, x)
    torch.compiler.reset()
    kept = quietly(kept_bytes, torch.compile(own, backend="normpass", options=options, dynamic=False), x)
    print(f"{inner}: kept {kept / plain:.3f} for a budget of {budget}")
    assert kept <= 1.02 * budget * plain


def test_a_mode_is_inductors(net):
    with pytest.raises(BackendCompilerFailed, match="leave it out, or set inner"):
        compiled = torch.compile(net, backend=compile_graph, options={"inner": "eager"}, mode=None)
        compiled = torch.compile(
            net,
            backend=lambda gm, inputs: compile_graph(gm, inputs, mode="reduce-overhead", options={"inner": "eager"}),
        )
        compiled(*images(0))
