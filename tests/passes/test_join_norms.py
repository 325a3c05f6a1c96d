"""A join whose residual is a norm's result: which are joined, and that every number keeps its bits."""

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
from normpass.measure import kept_bytes
from normpass.recipe.recipes import Rebuilds
from normpass.runtime.joins import JOINED, PREPARED, TWICE_JOINED


@pytest.fixture(autouse=True)
def joining(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainKernels]:
    yield install(monkeypatch)
    torch._dynamo.reset()


class Net(nn.Module):
    """Two blocks with a convolution and a norm in the shortcut; the first join is read twice."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.head, self.activation = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), activation
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=bias) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for i in (0, 2):
            shortcut = self.norms[i + 1](self.convs[i + 1](z))
            z = self.activation(self.norms[i](self.convs[i](z)) + shortcut)
        return self.head(z)


def optimized_and_count(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, int]:
    """An optimized copy that has run once, and how many of its joins have a prepared residual."""
    optimized = normpass.optimize(copy.deepcopy(model), **options)
    graphs = captures_of(optimized)
    optimized(x)
    targets = [node.target for graph in graphs for node in graph.runs.graph.nodes]
    joins = sum(target in (*JOINED.values(), *TWICE_JOINED.values()) for target in targets)
    assert joins == sum(target in PREPARED.values() for target in targets)
    return optimized, joins


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients, running statistics."""
    model = copy.deepcopy(model)
    z = model(x)
    found = torch.autograd.grad(z.double().square().sum(), (x, *model.parameters()))
    return [z.detach(), *found, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"memory_budget": 0.9}, {"memory_budget": 0.4}], ids=str)
def test_every_number_keeps_its_bits(options, dtype, joining):
    x = image(2, 3, 8, 8).to(dtype).requires_grad_()
    for last in (False, True):
        x = x.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        x.requires_grad_()
        model = spread(Net()).to(dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        given = {"example_inputs": x, **options} if options else {}
        optimized, count = optimized_and_count(model, x, **given)
        assert count == 2
        joining.calls.clear()
        joined = step(optimized, x)
        of_residuals = ["of_residual" in there for name, there in joining.calls if name == "norm_act"]
        assert sum(of_residuals) >= 2 and joining.parts.count(2) == 1
        joining.normalizes_residuals = False
        apart = step(optimized, x)
        joining.normalizes_residuals = True
        assert all(torch.equal(a, b) for a, b in zip(joined, apart, strict=True))


@pytest.mark.parametrize("frozen", [(1,), (0,), (0, 1, 2, 3)], ids=str)
def test_frozen_norms_train_as_plain(frozen, joining):
    x = image(2, 3, 8, 8, requires_grad=True)
    model = spread(Net(F.leaky_relu))
    for index in frozen:
        model.norms[index].eval()
    model.norms[3].weight.requires_grad_(False)
    optimized, count = optimized_and_count(model, x)
    assert count == 2
    z, wanted = optimized(x), model(x)
    for parameters in ([x, *(p for p in model.parameters() if p.requires_grad)],):
        want = torch.autograd.grad(wanted.square().sum(), parameters)
        own = [x, *(p for p in optimized.parameters() if p.requires_grad)]
        for a, b in zip(torch.autograd.grad(z.square().sum(), own), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_is_kept_and_rebuilt(joining):
    """No more than apart; z is made again once, its residual not at all."""
    x = image(2, 3, 8, 8, requires_grad=True)
    model, _ = optimized_and_count(spread(Net()), x)
    found = []
    for joining.normalizes_residuals in (True, False):
        with Rebuilds() as rebuilds:
            step(model, x)
        assert rebuilds.most == 1
        found.append((kept_bytes(model, x), rebuilds.total))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1]
    assert normpass.plan(spread(Net()), x, 1.0).default.kept == found[0][0]


def test_a_gradient_of_the_gradient(joining):
    x = image(2, 3, 8, 8, requires_grad=True)
    model = spread(Net())
    found = []
    for candidate in (optimized_and_count(model, x)[0], model):
        (first,) = torch.autograd.grad(candidate(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, *candidate.parameters()), allow_unused=True))
    for got, wanted in zip(*found, strict=True):
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


class One(nn.Module):
    def __init__(self, use: Callable[[One, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head, self.use = nn.Conv2d(4, 2, 1), use

    def forward(self, x: Tensor) -> Any:
        before = self.convs[1](x)
        return self.use(self, self.norms[0](self.convs[0](x)), self.norms[1](before), before)


USES: dict[str, tuple[Callable[[One, Tensor, Tensor, Tensor], Any], int]] = {
    "joined": (lambda self, y, r, x: self.head(F.relu(y + r)), 1),
    "in place": (lambda self, y, r, x: self.head(F.relu(y.add_(r), inplace=True)), 1),
    "without a mask": (lambda self, y, r, x: self.head(F.silu(y + r)), 0),
    "no activation": (lambda self, y, r, x: self.head(y + r), 1),  # and made after all, when it runs
    "read elsewhere": (lambda self, y, r, x: self.head(F.relu(y + r)) + r.mean(), 0),
    "returned": (lambda self, y, r, x: (self.head(F.relu(y + r)), r), 0),
    "returned join": (lambda self, y, r, x: F.relu(y + r), 0),  # the residual's norm is left alone: nothing to save
    "written behind autograd": (lambda self, y, r, x: (x.data.zero_(), self.head(F.relu(y + r)))[1], 0),
}


@pytest.mark.parametrize("use", USES)
def test_which_are_joined(use, joining):
    function, wanted = USES[use]
    model, x = spread(One(function)), image(2, 3, 8, 8, requires_grad=True)
    optimized, count = optimized_and_count(model, x)
    assert count == wanted
    model(x)  # as the copy has
    for got, plain in zip(outputs(optimized, x), outputs(model, x), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    model = copy.deepcopy(model)
    found = model(x)
    leaves = list(found) if isinstance(found, tuple) else [found]
    loss = torch.stack([t.square().sum() for t in leaves]).sum()
    wanted = (x, *model.parameters())
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*leaves, *found, *model.buffers()]


def test_without_gradients_or_kernels_nothing_is_joined(joining):
    x, plain = image(2, 3, 8, 8), spread(Net())
    model, _ = optimized_and_count(plain, x)
    plain(x)  # as the copy has
    joining.calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    with kernels.disabled():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    for channels in (1, 4):  # maps of one value lie in both formats: which one is ATen's to say
        z = image(2, 3, channels, 1)
        torch.testing.assert_close(model(z), plain(z), rtol=1e-9, atol=1e-9)
    assert not any("of_residual" in there for _, there in joining.calls)


def test_somebody_elses_checkpoint(joining):
    x = image(2, 3, 8, 8, requires_grad=True)
    plain = spread(Net())
    model, _ = optimized_and_count(plain, x)
    z = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    got = torch.autograd.grad(z.square().sum(), (x, *model.parameters()))
    for a, b in zip(got, torch.autograd.grad(plain(x).square().sum(), (x, *plain.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
