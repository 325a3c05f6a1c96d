"""One spelling for each thing, the same numbers: dropout, activations in place, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import captured
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from training import captures_of, step

import normpass
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.graph.nodes import name_of
from normpass.measure import kept_bytes
from normpass.passes.graph.normal_form import SpellPlainly, WriteOutOfPlace, as_first, dropout, run_checkpoint
from normpass.recipe.notes import recording
from normpass.recipe.recipes import Rebuilds

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def normal_form(function: Callable, *inputs: Any) -> tuple[fx.GraphModule, list[Any], int]:
    """The graph in its normal form, its inputs, and how many operations are out of place now."""
    graph_module, real = captured(function, *inputs)
    SpellPlainly().apply(graph_module.graph)
    changed = len(WriteOutOfPlace().apply(graph_module.graph, facts_of(graph_module, FakeInputs(real))))
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, real, changed


def names(graph_module: fx.GraphModule) -> list[str]:
    return [name_of(n.target) for n in graph_module.graph.nodes if n.op in ("call_function", "call_method")]


# --- dropout --------------------------------------------------------------------------------------

DROPOUTS: dict[str, tuple[Callable, list[str]]] = {
    "zero": (lambda x: F.dropout(x, 0.0).exp(), ["exp"]),
    "eval": (lambda x: F.dropout(x, 0.5, training=False).exp(), ["exp"]),
    "layer in eval mode": (nn.Sequential(nn.Dropout(0.5), nn.Softplus()).eval(), ["softplus"]),
    "layer of zero": (nn.Sequential(nn.Dropout(0.0), nn.Softplus()), ["softplus"]),
    "training": (lambda x: F.dropout(x, 0.5).exp(), ["dropout", "exp"]),
    "all": (lambda x: F.dropout(x, 1.0).exp(), ["dropout", "exp"]),
    "in place": (lambda x: F.dropout(x * 1, 0.5, inplace=True).exp(), ["mul", "dropout", "exp"]),
    "channels": (lambda x: F.dropout2d(x, 0.5).exp(), ["dropout2d", "exp"]),
}


@pytest.mark.parametrize("function, expected", DROPOUTS.values(), ids=DROPOUTS.keys())
def test_dropout(function: Callable, expected: list[str]) -> None:
    graph_module, inputs, _ = normal_form(function, X)
    assert names(graph_module) == expected
    is_ours = any(n.target is dropout for n in graph_module.graph.nodes)
    assert is_ours == (function is DROPOUTS["training"][0])
    results = []
    for call in (function, lambda x: graph_module(*inputs)[0]):
        torch.manual_seed(3)
        results.append(call(X))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_our_dropout_draws_and_computes_what_torchs_does(dtype: torch.dtype, p: float) -> None:
    x = X.to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [x.clone(memory_format=memory_format).requires_grad_() for _ in range(2)]
        found = []
        for call, t in zip((F.dropout, dropout), given, strict=True):
            torch.manual_seed(5)
            y = call(t, p)
            y.square().sum().backward()
            found.append((y.detach(), t.grad, torch.rand(())))
            assert y.stride() == t.stride()
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_who_saves_a_dropped_result_keeps_the_mask_alone() -> None:
    x = X.clone().requires_grad_()
    with recording():
        y = dropout(x * 1, 0.5)
        loss = (y * y).sum()
    expected = 2 * y.detach()
    with torch.no_grad():
        scale = (y != 0) * 2.0
    del y
    with Rebuilds() as rebuilds:
        loss.backward()
    assert rebuilds.total == 1
    torch.testing.assert_close(x.grad, expected * scale, rtol=1e-15, atol=0)
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


class Dropped(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.p = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), p

    def forward(self, x):
        return self.last(F.relu(F.dropout(self.norm(self.conv(x)), self.p, self.training)))


def test_dropout_of_nothing_stands_between_no_norm_and_its_activation() -> None:
    model, other = Dropped(0.0).double(), Dropped(0.5).double()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    without = nn.Sequential(model.conv, model.norm, nn.ReLU(), model.last)
    kept = kept_bytes(normpass.optimize(model), x)
    assert kept == kept_bytes(normpass.optimize(without), x)
    value = 2 * 4 * 24 * 24 * 8
    assert kept < kept_bytes(normpass.optimize(other), x) <= kept + value + 1024 < kept_bytes(other, x)


# --- in place -------------------------------------------------------------------------------------

IN_PLACE: dict[str, tuple[Callable, int]] = {
    "silu": (lambda y: F.silu(y, inplace=True).sin(), 1),
    "hardswish": (lambda y: F.hardswish(y, True).sin(), 1),
    "mish": (lambda y: F.mish(y, inplace=True).sin(), 1),
    "mul": (lambda y: y.mul_(y.detach() + 1).sin(), 0),
    "pow": (lambda y: y.pow_(2).sin(), 1),
    "sin": (lambda y: y.sin_().exp(), 1),
    "relu": (lambda y: F.relu(y, inplace=True).sin(), 0),  # saves its result: no copy
    "add": (lambda y: y.add_(1).sin(), 0),
    "with gaps": (lambda y: y[:, ::2].sin_().exp(), 0),  # which the result has as well
    "seen through a view": (lambda y: ((v := y.view(-1)), F.silu(y, inplace=True), v.sin())[2], 0),
    "seen by its own name": (lambda y: (F.silu(y, inplace=True), y.sin())[1], 0),
    "returned": (lambda y: (y, F.silu(y, inplace=True).sin())[::-1], 0),
}
ACTIVATIONS = {"silu", "hardswish", "mish"}
"""which are looked for by their names, and have the dtype of their argument anyway"""


@pytest.mark.parametrize("function, count", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_what_autograd_would_copy_is_written_elsewhere(function: Callable, count: int) -> None:
    x = torch.randn(2, 3, dtype=torch.float64).abs().requires_grad_()

    def run(x: Tensor) -> Any:
        return function(x * 2)

    graph_module, inputs, changed = normal_form(run, x)
    assert changed == count
    assert ("as_first" in "".join(names(graph_module))) == (count > 0 and not ACTIVATIONS & set(names(graph_module)))
    found = []
    for call in (run, lambda x: graph_module(*inputs)):
        (leaf,) = [t for t in (x,)]
        y = call(leaf)
        y = y if isinstance(y, Tensor) else y[0]
        found.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_result_has_the_first_arguments_dtype() -> None:
    a, b = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    assert as_first(torch.add, a, b).dtype == torch.bfloat16
    assert as_first(torch.mul, b, a).dtype == torch.float32


# --- checkpoint -----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.3))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(checkpoint(self.inside, self.before(x), use_reentrant=False))


def test_the_region_of_a_checkpoint_is_the_users() -> None:
    model = Checkpointed().double()
    optimized = normpass.optimize(copy.deepcopy(model))
    graphs = captures_of(optimized)
    found = []
    for net in (model, optimized):
        torch.manual_seed(0)
        found.append(step(net, X))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    (graph,) = graphs
    assert run_checkpoint in [n.target for n in graph.runs.graph.nodes]
    assert [choice.site.path for choice in graph.choices] == ["before.1"]
    assert int(optimized.inside[1].num_batches_tracked) == int(model.inside[1].num_batches_tracked)
