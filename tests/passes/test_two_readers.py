"""A result with two readers is handed out twice: which results are, and that every gradient keeps its bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_kernels import PlainKernels, install
from torch import Tensor, nn
from training import captures_of, image, spread

import normpass
from normpass import kernels
from normpass.collect import captured_graphs
from normpass.measure import kept_bytes
from normpass.pipeline import Request
from normpass.recipe.recipes import Rebuilds
from normpass.runtime.functional import FunctionalBatchNorm
from normpass.runtime.two_readers import TWICE


@pytest.fixture(autouse=True)
def adding(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainKernels]:
    yield install(monkeypatch)
    torch._dynamo.reset()


ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "identity": lambda y: y}


class Block(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.norms[0](self.first(x))))
        return self.activation(self.norms[1](y) + x)


class Net(nn.Module):
    """Blocks behind one another: the stem's result and every join's but the last is read twice."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(*(Block(activation) for _ in range(depth)))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))))


class One(nn.Module):
    """One norm and its activation, and what `use` makes of the result."""

    def __init__(self, use: Callable[[One, Tensor], Any], activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.activation(self.norm(self.conv(x))))


def handed_out_twice(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, int]:
    """An optimized copy that has run once, and how many nodes of its graph have two results."""
    optimized = normpass.optimize(copy.deepcopy(model), **options)
    graphs = captures_of(optimized)
    optimized(x)
    return optimized, sum(node.target in TWICE.values() for graph in graphs for node in graph.runs.graph.nodes)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    output = model(x)
    leaves = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
    loss = torch.stack([leaf.double().square().sum() for leaf in leaves]).sum()
    return list(torch.autograd.grad(loss, (x, *model.parameters()), allow_unused=True, materialize_grads=True))


def assert_same_bits(adding: PlainKernels, model: nn.Module, x: Tensor) -> list[int]:
    """Gradients with the parts added by the kernels and by autograd; how many parts each call was given."""
    adding.calls.clear()
    apart = gradients(model, x)
    parts = adding.parts
    adding.calls.clear()
    adding.adds_gradients = False
    together = gradients(model, x)
    adding.adds_gradients = True
    assert set(adding.parts) == {1}
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    return parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_keeps_its_bits(activation, dtype, adding):
    x = image(2, 3, 8, 8, requires_grad=True).to(dtype).detach().requires_grad_()
    model, count = handed_out_twice(spread(Net(ACTIVATIONS[activation])).to(dtype), x)
    assert count == 3
    assert assert_same_bits(adding, model, x).count(2) == 3


@pytest.mark.parametrize("options", [{}, {"memory_budget": 0.9}, {"memory_budget": 0.4}], ids=str)
def test_plans_and_frozen_norms(options, adding):
    x = image(2, 3, 8, 8, requires_grad=True)
    plain_model = spread(Net())
    for frozen in (False, True):
        plain_model.blocks[1].norms.train(not frozen)
        given = {"example_inputs": x, **options} if options else {}
        model, count = handed_out_twice(plain_model, x, **given)
        assert count == 3
        assert assert_same_bits(adding, model, x).count(2) == 3
        want = gradients(plain_model, x)
        for got, wanted in zip(gradients(model, x), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_nothing_more_is_kept_or_rebuilt(adding):
    x = image(2, 3, 8, 8, requires_grad=True)
    model, _ = handed_out_twice(spread(Net()), x)
    found = []
    for adding.adds_gradients in (True, False):
        with Rebuilds() as rebuilds:
            gradients(model, x)
        found.append((kept_bytes(model, x), rebuilds.total, rebuilds.most))
    assert found[0] == found[1]
    assert found[0][2] == 1


def test_the_peak_has_both_gradients(adding):
    """Of the joins: where autograd adds them, only their sum waits."""
    x = image(2, 3, 8, 8, requires_grad=True)
    noted, peaks = [], []
    for adds in (True, False):
        adding.adds_gradients = adds
        (rewritten,) = captured_graphs(spread(Net()), ((x,), {}), Request()).graphs
        noted.append([step.key for step in rewritten.found.facts.steps if step.gradients_apart])
        peaks.append(normpass.plan(spread(Net()), x, 1.0).planned.peak)
    assert noted == [["norm", "blocks.0.norms.1", "blocks.1.norms.1"], []]
    assert peaks[0] >= peaks[1]


def test_a_gradient_of_the_gradient(adding):
    x = image(2, 3, 8, 8, requires_grad=True)
    plain_model = spread(Net(depth=2))
    found = []
    for model in (handed_out_twice(plain_model, x)[0], plain_model):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, *model.parameters()), allow_unused=True))
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def two(self: One, z: Tensor) -> Any:
    return self.left(z) + self.right(z)


def unused_gradient(self: One, z: Tensor) -> Any:
    return self.left(z), self.right(z)


USES: dict[str, tuple[Callable[[One, Tensor], Any], int]] = {
    "two readers": (two, 1),
    "two outputs": (unused_gradient, 1),
    "one reader": (lambda self, z: self.left(z), 0),
    "three readers": (lambda self, z: self.left(z) + self.right(z) + self.left(z * 2), 0),
    "one reader twice": (lambda self, z: self.left(z * z), 0),
    "a reader without a gradient": (lambda self, z: self.left(z) * z.detach().mean(), 0),
    "a reader that reads twice": (lambda self, z: self.left(z) + self.right(torch.cat([z, z])[:2]), 0),
    "returned": (lambda self, z: (self.left(z) + self.right(z), z), 0),
    "returned as a view": (lambda self, z: (self.left(z) + self.right(z), z.flatten(1)), 0),
    "returned, and read once": (lambda self, z: (self.left(z), z), 0),
    "written to": (lambda self, z: self.left(z.sigmoid() + z.mul_(2)), 0),
    "written to through a view": (lambda self, z: (z.sigmoid(), z.view(-1).mul_(2))[0].sum(), 0),
}


@pytest.mark.parametrize("use", USES)
def test_who_gets_two(use, adding):
    function, wanted = USES[use]
    activation = "identity" if use.startswith("written") else "relu"  # what has saved its result raises then
    plain_model, x = spread(One(function, activation)), image(2, 3, 8, 8, requires_grad=True)
    model, count = handed_out_twice(plain_model, x)
    assert count == wanted
    assert assert_same_bits(adding, model, x).count(2) == wanted
    for got, wanted_gradient in zip(gradients(model, x), gradients(plain_model, x), strict=True):
        torch.testing.assert_close(got, wanted_gradient, rtol=1e-9, atol=1e-9)


def test_one_gradient_of_two(adding):
    """Only one reader is differentiated: its gradient is the whole."""
    plain_model, x = spread(One(unused_gradient)), image(2, 3, 8, 8, requires_grad=True)
    model, _ = handed_out_twice(plain_model, x)
    for index in (0, 1):
        adding.calls.clear()
        (got,) = torch.autograd.grad(model(x)[index].square().sum(), x)
        (wanted,) = torch.autograd.grad(plain_model(x)[index].square().sum(), x)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        assert adding.parts == [1]


def test_without_such_kernels_or_gradients_there_is_one_tensor(adding):
    x = image(2, 3, 8, 8)
    model, count = handed_out_twice(spread(One(two)), x)
    assert count == 1
    with torch.no_grad(), kernels.disabled():
        wanted = model(x)
    with kernels.disabled():
        loss = model(x)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
        loss.sum().backward()
    assert adding.parts == []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(x).requires_grad


def test_somebody_elses_hooks_and_checkpoint(adding):
    x = image(2, 3, 8, 8, requires_grad=True)
    plain_model = spread(Net())
    model, _ = handed_out_twice(plain_model, x)
    want = gradients(plain_model, x)
    with torch.autograd.graph.save_on_cpu():
        under_hooks = gradients(model, x)
    under_checkpoint = gradients(_Checkpointed(model), x)
    for got in (under_hooks, under_checkpoint):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_a_sum_that_lies_as_its_other_term(adding):
    """As without two results: where one row is all there is, ATen lays a sum out as its first term, the residual."""
    norm = FunctionalBatchNorm(torch.zeros(4), torch.ones(4), torch.ones(4, requires_grad=True), torch.zeros(4), True)
    x = torch.randn(1, 4, 1, 3).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(1, 4, 1, 3)
    for once, twice in TWICE.items():
        for sum_into in ("", "residual +"):
            expected = F.relu(residual + norm(x) if sum_into else norm(x) + residual)
            assert once(norm, x, residual, "relu", (), sum_into).stride() == expected.stride()
            assert [z.stride() for z in twice(norm, x, residual, "relu", (), sum_into)] == [expected.stride()] * 2
