"""What each rewrite makes of a site (golden graphs), when it refuses, and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_same_step, captures_of, collected, step

import normpass
from normpass.graph.nodes import name_of
from normpass.measure import kept_bytes
from normpass.passes import InplaceABN, LeakyReLU, SplitBN
from normpass.pipeline import Rewritten
from normpass.rewrite.contract import Match, Refusal
from normpass.rewrite.sites import Site
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, inplace_abn, split_norm_act


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def chain(activation: Callable[[], nn.Module], depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), activation()]
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 1)).double()


def optimized_and_graphs(model: nn.Module, **options: Any) -> tuple[nn.Module, list[Rewritten]]:
    """An optimized copy, and the graphs that it will have captured."""
    optimized = normpass.optimize(copy.deepcopy(model), **options)
    return optimized, captures_of(optimized)


def targets(graph: Rewritten) -> list[Any]:
    """What is called, without the counters of norms."""
    calls = [n.target for n in graph.runs.graph.nodes if n.op in ("call_function", "call_method")]
    return [target for target in calls if target not in ("add_", FunctionalBatchNorm)]


def first_site(module: nn.Module) -> Site:
    return collected(module, images()).graphs[0].choices[0].site


def test_split_bn_is_the_default() -> None:
    model = chain(nn.ReLU)
    optimized, graphs = optimized_and_graphs(model)
    assert_same_step(model, optimized, images())
    (graph,) = graphs
    names = [name_of(target) for target in targets(graph)]
    assert names == ["conv2d", "split_norm_act", "conv2d", "split_norm_act", "conv2d"]
    nodes = [n for n in graph.runs.graph.nodes if n.target is split_norm_act]
    assert [node.args[3:5] for node in nodes] == [("relu", ()), ("relu", ())]
    assert [node.meta["key"] for node in nodes] == ["1", "4"]


class Late(nn.Module):
    """Something is written to what the norm and its activation make."""

    def __init__(self, activation: Callable, write: Callable) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.activation, self.write = activation, write

    def forward(self, x):
        z = self.activation(self.norm(self.conv(x)))
        self.write(z)
        return self.last(z)


@pytest.mark.parametrize("write", [lambda z: z.mul_(2.0), lambda z: z[:, :1].tanh_()], ids=["whole", "view"])
def test_a_result_that_is_changed_later_trains_the_same(write: Callable) -> None:
    model = Late(F.silu, write).double()
    optimized, graphs = optimized_and_graphs(model)
    for _ in range(2):
        assert_same_step(model, optimized, images())
    assert split_norm_act in targets(graphs[0]) or fused_norm_act in targets(graphs[0])
    assert kept_bytes(optimized, images()) <= kept_bytes(model, images())


def test_a_saved_result_that_is_changed_later_is_refused_as_plain_refuses_it() -> None:
    model = Late(F.relu, lambda z: z.mul_(2.0)).double()
    for net in (model, normpass.optimize(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(net, images())


# --- in-place activated batch norm ----------------------------------------------------------------


def test_inplace_abn_only_where_lossy_is_allowed() -> None:
    model = chain(lambda: nn.LeakyReLU(0.1))
    assert all(inplace_abn not in targets(graph) for graph in collected(model, images()).graphs)
    optimized, graphs = optimized_and_graphs(model, allow_lossy=True)
    assert_same_step(model, optimized, images(), tolerance=1e-10)
    assert targets(graphs[0]).count(inplace_abn) == 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.double()

    def forward(self, x):
        return self.last(F.leaky_relu(self.norm(self.conv(x)) + x))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: chain(nn.ReLU, 1), "relu has no inverse"),
        (lambda: chain(nn.SiLU, 1), "silu has no inverse"),
        (Residual, "a residual is added before the activation"),
        (lambda: Late(F.elu, lambda z: z.detach().mul_(2)).double(), "changed in place later, by `mul_`"),
    ],
)
def test_inplace_abn_refuses(make: Callable, reason: str) -> None:
    site = first_site(make())
    result = InplaceABN().match(site)
    assert isinstance(result, Refusal) and reason in result.reason
    assert isinstance(SplitBN().match(site), Match)


def test_inplace_abn_refuses_tiny_gamma() -> None:
    model = chain(nn.ELU, 1)
    with torch.no_grad():
        model[1].weight[1] = 0.0
    site = first_site(model)
    result = InplaceABN().match(site)
    assert isinstance(result, Refusal) and "smallest |gamma| is 0" in result.reason
    with torch.no_grad():
        model[1].weight[1] = -1.0  # negative is fine
    assert isinstance(InplaceABN().match(site), Match)


# --- changes=("leaky_relu",) ----------------------------------------------------------------------


class Mixed(nn.Module):
    """ReLU as a layer, a function, a method."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.act = nn.ReLU() if relu else nn.LeakyReLU(0.01)
        self.relu = F.relu if relu else F.leaky_relu

    def forward(self, x):
        x = self.act(self.norms[0](self.convs[0](x)))
        x = self.relu(self.norms[1](self.convs[1](x)))
        return self.norms[2](self.convs[2](x))


def test_leaky_relu_replaces_layers_and_functions() -> None:
    model = Mixed(relu=True).double()
    expected = Mixed(relu=False).double()
    expected.load_state_dict(model.state_dict())
    optimized, _ = optimized_and_graphs(model, changes=("leaky_relu",))
    assert_same_step(expected, optimized, images())
    assert type(model.act) is nn.ReLU and type(optimized.act) is nn.LeakyReLU
    assert type(normpass.restore(optimized).act) is nn.ReLU


def test_leaky_relu_option_object() -> None:
    optimized = normpass.optimize(chain(nn.ReLU), changes=(LeakyReLU(negative_slope=0.2),))
    assert optimized[2].negative_slope == 0.2
    with pytest.raises(ValueError, match="negative_slope"):
        LeakyReLU(negative_slope=0.0)


# --- what reads a norm's result is made again as well ---------------------------------------------


class Consumers(nn.Module):
    """conv → norm → relu → `consume` → conv."""

    def __init__(self, consume: Callable, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.gate = nn.Conv2d(3, 3, 1)
        self.other = nn.GroupNorm(3, 3)
        self.last = nn.Conv2d(channels, 2, 1)
        self.consume = consume

    def forward(self, x):
        z = F.relu(self.norm(self.conv(x)))
        return self.last(self.consume(self, z)).square()


CONSUMERS: dict[str, tuple[int, Callable]] = {
    "cat": (6, lambda m, z: torch.cat((z, z.flip(0)), 1)),
    "mul": (3, lambda m, z: z * m.gate(F.adaptive_avg_pool2d(z, 1)).sigmoid()),
    "pad": (3, lambda m, z: F.pad(z, (1, 1, 1, 1))),
    "interpolate": (3, lambda m, z: F.interpolate(z, scale_factor=2)),
    "max_pool2d": (3, lambda m, z: F.max_pool2d(z, 3, 1, 1)),
    "getitem": (2, lambda m, z: z[:, 1:]),
    "chunk": (1, lambda m, z: z.chunk(3, 1)[1]),
    "silu": (3, lambda m, z: F.silu(z)),
    "relu": (3, lambda m, z: F.relu(z + z)),
    "group_norm": (3, lambda m, z: m.other(z)),
    "hardswish": (3, lambda m, z: F.hardswish(z + 1, inplace=True)),
    "mul_": (6, lambda m, z: torch.cat((z, z.flip(0)), 1).mul_(2)),
    "softmax": (3, lambda m, z: z.softmax(1)),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_consumers_are_made_again(name: str) -> None:
    channels, consume = CONSUMERS[name]
    torch.manual_seed(0)
    model = Consumers(consume, channels).double()
    optimized, graphs = optimized_and_graphs(model)
    x = images(2, 3, 12, 12)
    assert_same_step(model, optimized, x)
    (graph,) = graphs
    assert "split_norm_act" in graph.rebuilt.values() and len(graph.rebuilt) >= (name not in ("getitem", "chunk")) + 1
    assert kept_bytes(optimized, x) < kept_bytes(model, x)


# --- random numbers -------------------------------------------------------------------------------


class Depth(nn.Module):
    """Stochastic depth before a residual addition, dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.drop = pytest.importorskip("torchvision.ops").StochasticDepth(0.5, "row")
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        result = self.drop(self.norm(self.conv(x)))
        result += x
        return self.last(F.dropout(F.relu(result), 0.5, self.training))


def test_random_functions_draw_once_and_the_same() -> None:
    model = Depth().double()
    optimized, graphs = optimized_and_graphs(model)
    x = images(8, 3, 8, 8)
    for seed in range(3):
        found = []
        for net in (model, optimized):
            torch.manual_seed(seed)
            found.append(step(net, x))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert not {"bernoulli_", "rand", "empty"} & set(graphs[0].rebuilt.values())
    plain, ours = (net.eval()(x) for net in (model, optimized))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
