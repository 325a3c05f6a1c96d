"""Which spellings are recognized as one site, and what surrounds it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import dynamo_graph
from torch import fx, nn
from training import captures_of, collected

import normpass
from normpass.graph.activations import activation_of
from normpass.kernels.activations import clamp_of_torch
from normpass.rewrite.sites import Site


class Block(nn.Module):
    """conv → norm → `tail` → conv, where `tail(self, y, x)` is what a test varies."""

    def __init__(self, tail: Callable, norm: nn.Module | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = norm if norm is not None else nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.tail = tail

    def forward(self, x):
        return self.last(self.tail(self, self.norm(self.conv(x)), x))


X = torch.randn(2, 4, 5, 5)


def sites_of(module: nn.Module, x: torch.Tensor = X) -> list[Site]:
    return [choice.site for graph in collected(module, x).graphs for choice in graph.choices]


def only_site(module: nn.Module, x: torch.Tensor = X) -> Site:
    (site,) = sites_of(module, x)
    return site


# --- activations ----------------------------------------------------------------------------------

INF = float("inf")
ACTIVATIONS: list[tuple[Callable, str | None, tuple]] = [
    (torch.relu, "relu", ()),
    (lambda y: y.relu(), "relu", ()),
    (lambda y: y.relu_(), "relu", ()),
    (lambda y: F.relu(y, True), "relu", ()),
    (F.relu_, "relu", ()),
    (torch.relu_, "relu", ()),
    (lambda y: F.relu6(y, inplace=True), "hardtanh", (0.0, 6.0)),
    (lambda y: F.hardtanh(y, -2.0, 2.0), "hardtanh", (-2.0, 2.0)),
    (F.hardtanh, "hardtanh", (-1.0, 1.0)),
    (F.leaky_relu, "leaky_relu", (0.01,)),
    (lambda y: F.leaky_relu(y, 0.2, True), "leaky_relu", (0.2,)),
    (lambda y: F.elu(y, alpha=0.5), "elu", (0.5,)),
    (F.selu, "selu", ()),
    (lambda y: F.celu(y, 2.0), "celu", (2.0,)),
    (F.silu, "silu", ()),
    (F.gelu, "gelu", ()),
    (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh", ()),
    (F.hardswish, "hardswish", ()),
    (F.hardsigmoid, "hardsigmoid", ()),
    (lambda y: y.sigmoid(), "sigmoid", ()),
    (torch.tanh, "tanh", ()),
    (lambda y: F.softplus(y, 2.0), "softplus", (2.0, 20.0)),
    (F.mish, "mish", ()),
    (lambda y: y.clamp(min=0), clamp_of_torch(), (0.0, INF)),
    (lambda y: y.clamp(-1, 2), clamp_of_torch(), (-1.0, 2.0)),
    (lambda y: torch.clip(y, max=2), clamp_of_torch(), (-INF, 2.0)),
    (lambda y: y.clip(0.0, None), clamp_of_torch(), (0.0, INF)),
    (lambda y: torch.clamp_min(y, 0.5), clamp_of_torch(), (0.5, INF)),
    (lambda y: y.clamp_max(0.5), clamp_of_torch(), (-INF, 0.5)),
    (lambda y: y.clamp_(max=1), clamp_of_torch(), (-INF, 1.0)),
    (lambda y: y.clamp(torch.zeros(3)), None, ()),
    (F.softsign, "softsign", ()),
    (F.logsigmoid, "log_sigmoid", ()),
    (lambda y: F.hardshrink(y, 0.3), "hardshrink", (0.3,)),
    (F.softshrink, "softshrink", (0.5,)),
    (F.tanhshrink, "tanhshrink", ()),
    (lambda y: F.threshold(y, 0.1, 2.0), "threshold", (0.1, 2.0)),
    (lambda y: F.threshold(y, 0.1, 2.0, inplace=True), "threshold", (0.1, 2.0)),
    (lambda y: F.rrelu(y, 0.1, 0.3), "leaky_relu", (0.2,)),
    (lambda y: F.rrelu(y, training=True), None, ()),
    (lambda y: F.relu(y, inplace=False) if y.dim() == 3 else y.neg(), None, ()),
    # layers
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
    (nn.Softsign(), "softsign", ()),
    (nn.LogSigmoid(), "log_sigmoid", ()),
    (nn.Hardshrink(), "hardshrink", (0.5,)),
    (nn.Softshrink(0.2), "softshrink", (0.2,)),
    (nn.Tanhshrink(), "tanhshrink", ()),
    (nn.Threshold(0.1, 0.0), "threshold", (0.1, 0.0)),
    (nn.RReLU().eval(), "leaky_relu", ((1 / 8 + 1 / 3) / 2,)),
    (nn.PReLU(), None, ()),  # has a parameter: stays what it is
]


def test_activations_in_every_spelling() -> None:
    def all_of_them(*values):
        return [function(y * 1) for (function, _, _), y in zip(ACTIVATIONS, values, strict=True)]

    (graph,) = [dynamo_graph(all_of_them, *[torch.randn(2, 3, requires_grad=True) for _ in ACTIVATIONS])]
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    assert len(results) == len(ACTIVATIONS)
    for result, (function, name, args) in zip(results, ACTIVATIONS, strict=True):
        assert isinstance(result, fx.Node)
        found = activation_of(result)
        assert (None if found is None else (found.name, found.args)) == (None if name is None else (name, args)), (
            function
        )


class Odd(nn.ReLU):
    def forward(self, x):
        return x * 2


def test_an_activation_belongs_to_the_site_where_it_alone_reads_the_norm() -> None:
    site = only_site(Block(lambda m, y, x: F.leaky_relu(y, 0.2)))
    assert (site.activation.name, site.activation.args, site.refused) == ("leaky_relu", (0.2,), None)
    assert site.pattern == "conv2d → BatchNorm2d → leaky_relu"
    for tail in (lambda m, y, x: F.relu(y) + y, lambda m, y, x: m.act(y)):
        site = only_site(Block(tail, act=Odd()))
        assert site.activation.name == "identity" and site.written is None and site.refused is None


# --- residual additions ---------------------------------------------------------------------------

ADDITIONS: dict[str, tuple[Callable, str]] = {
    "+": (lambda m, y, x: F.relu(y + x), "x"),
    "reversed": (lambda m, y, x: F.relu(x + y), "x"),
    "torch.add": (lambda m, y, x: F.relu(torch.add(y, x)), "x"),
    "add": (lambda m, y, x: F.relu(y.add(x)), "x"),
    "add_": (lambda m, y, x: F.relu(y.add_(x)), "x"),
    "iadd": (lambda m, y, x: F.relu(operator.iadd(y, x)), "x"),
    "alpha": (lambda m, y, x: F.relu(torch.add(y, x, alpha=2)), ""),
    "number": (lambda m, y, x: F.relu(y + 1.0), ""),
    "itself": (lambda m, y, x: F.relu(y + y), ""),
    "two readers": (lambda m, y, x: F.relu(y + x) * y, ""),
    "into the input": (lambda m, y, x: F.relu(x.clone().add_(y)), ""),
    "written later": (lambda m, y, x: (F.relu(y + (z := x * 2)), z.add_(1))[0], ""),
}


@pytest.mark.parametrize("tail, residual", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_residual_additions(tail: Callable, residual: str) -> None:
    site = only_site(Block(tail))
    if not residual:
        assert site.residual is None and site.add is None
        return
    assert site.residual is not None and site.residual.op == "placeholder"
    assert site.pattern == "conv2d → BatchNorm2d → add → relu"


def test_a_residual_that_nobody_keeps_is_none() -> None:
    """The sum is what is kept then: taking the residual as well would be more."""
    site = only_site(Block(lambda m, y, x: F.relu(y + m.other(x)), other=nn.Conv2d(4, 4, 1)))
    assert site.residual is None and site.activation.name == "identity"
    layers = {"other": nn.Conv2d(4, 4, 1), "third": nn.Conv2d(4, 4, 1)}
    site = only_site(Block(lambda m, y, x: F.relu(y + (h := m.other(x))) + m.third(h), **layers))
    assert site.residual is not None


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x))))


def test_of_two_norms_added_the_later_takes_the_other_as_residual() -> None:
    first, second = sites_of(Join())
    assert (first.path, first.residual, first.activation.name) == ("norm_a", None, "identity")
    assert (second.path, second.residual, second.activation.name) == ("norm_b", first.norm, "relu")


# --- writes ---------------------------------------------------------------------------------------

AFTERWARDS: dict[str, tuple[Callable, str]] = {
    "method": (lambda m, y, x: F.silu(y).add_(1), "add_"),
    "view": (lambda m, y, x: F.silu(y).view(-1).mul_(2).view(y.shape), "mul_"),
    "item": (lambda m, y, x: m.write(F.silu(y)), "setitem"),
    "foreach": (lambda m, y, x: m.foreach(F.silu(y)), "_foreach_mul_"),
    "read": (lambda m, y, x: F.silu(y).add(1), ""),
}


class Writing(Block):
    def write(self, z):
        z[:, 0] = 0.0
        return z

    def foreach(self, z):
        torch._foreach_mul_([z[0], z[1]], 2.0)
        return z


@pytest.mark.parametrize("tail, name", AFTERWARDS.values(), ids=AFTERWARDS.keys())
def test_a_result_that_is_changed_later_is_noticed(tail: Callable, name: str) -> None:
    written = only_site(Writing(tail)).written
    assert (None if written is None else getattr(written.target, "__name__", written.target)) == (name or None)


def test_an_activation_whose_saved_result_is_changed_later_is_left_to_autograd() -> None:
    """ReLU saves its result, so that plain's backward raises: it must see the change."""
    site = only_site(Block(lambda m, y, x: F.relu(y).add_(1)))
    assert site.activation.name == "identity" and site.written is None


class Late(nn.Module):
    def __init__(self, write: Callable) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.write = write

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        self.write(y)
        return self.last(F.relu(z + y))


def test_an_input_that_is_changed_later_refuses() -> None:
    for write, name in ((lambda y: y.add_(1), "add_"), (lambda y: y.ravel()[0].zero_(), "zero_")):
        site = only_site(Late(write))
        assert site.refused == f"its input is changed in place later, by `{name}`" and site.refused_at == (name,)


# --- norms ----------------------------------------------------------------------------------------

PRODUCERS: list[tuple[nn.Module, nn.Module, tuple, str]] = [
    (nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), (2, 4, 9), "conv1d"),
    (nn.Conv2d(4, 4, 3, dilation=2), nn.BatchNorm2d(4), (2, 4, 9, 9), "conv2d"),
    (nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4), (2, 4, 3, 3, 3), "conv3d"),
    (nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), (2, 4, 3, 3), "conv_transpose2d"),
    (nn.Linear(4, 4), nn.BatchNorm1d(4), (3, 4), "linear"),
    (nn.Identity(), nn.BatchNorm1d(4), (3, 4), "input"),
]


@pytest.mark.parametrize("producer, norm, shape, name", PRODUCERS, ids=[p[-1] for p in PRODUCERS])
def test_producers(producer: nn.Module, norm: nn.Module, shape: tuple, name: str) -> None:
    site = only_site(nn.Sequential(producer, norm, nn.ReLU()), torch.randn(shape, requires_grad=True))
    assert site.pattern == f"{name} → {type(norm).__name__} → relu" and site.path == "1"


class Functional(nn.Module):
    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.call = call

    def forward(self, x):
        return F.relu(self.call(self, self.conv(x)))


def test_batch_norm_as_a_function() -> None:
    def call(m: Any, y: Any) -> Any:
        return F.batch_norm(y, m.mean, m.var, m.weight, training=m.training)

    site = only_site(Functional(call))
    assert (site.pattern, site.path, site.refused) == ("conv2d → batch_norm → relu", "batch_norm", None)
    assert site.gamma is not None and site.gamma.shape == (4,)


def test_instance_norm_with_running_statistics_is_refused() -> None:
    site = only_site(Functional(lambda m, y: F.instance_norm(y, m.mean, m.var, use_input_stats=False)))
    assert site.refused == "it is not called with its input's own statistics"


OTHERS: dict[str, tuple[nn.Module, str | None]] = {
    "group": (nn.GroupNorm(2, 4), None),
    "instance": (nn.InstanceNorm2d(4), None),
    "layer": (nn.LayerNorm((4, 5, 5)), None),
    "local response": (nn.LocalResponseNorm(2), "local_response_norm is not rewritten"),
    "subclass": (type("Mine", (nn.BatchNorm2d,), {})(4), None),
}


@pytest.mark.parametrize("norm, reason", OTHERS.values(), ids=OTHERS.keys())
def test_other_norms_are_refused_with_a_reason(norm: nn.Module, reason: str | None) -> None:
    site = only_site(Block(lambda m, y, x: F.relu(y), norm=norm))
    assert (site.refused, site.path, site.kind) == (reason, "norm", type(norm).__name__)


def test_norms_with_hooks_and_norms_called_twice_are_sites_all_the_same() -> None:
    first, second = sites_of(Block(lambda m, y, x: F.relu(m.norm(y))))
    assert (first.path, second.path) == ("norm", "norm.batch_norm")
    assert (first.refused, second.refused) == (None, None) and second.producer == "batch_norm"
    hooked = Block(lambda m, y, x: F.relu(y))
    hooked.norm.register_forward_hook(lambda layer, args, y: y * 2)
    site = only_site(hooked)
    assert site.refused is None and site.activation.name == "identity"


def test_numbers_that_change_between_calls_refuse_nothing() -> None:
    block = Block(lambda m, y, x: F.relu(y))
    optimized = normpass.optimize(block)
    graphs = captures_of(optimized)
    for eps in (1e-5, 1e-3, 1e-2):
        optimized.norm.eps = optimized.norm.momentum = eps
        optimized(X)
    assert [choice.rewrite for graph in graphs for choice in graph.choices] == ["split_bn"] * 3
