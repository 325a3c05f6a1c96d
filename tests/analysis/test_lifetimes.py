"""When what is made again is freed: the peak of a U-Net, and the same numbers whichever way backward is run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import image, loss_of, spread

import normpass
from normpass.analysis.facts import Facts, Step
from normpass.analysis.lifetimes import Lifetimes
from normpass.analysis.liveness import Walker
from normpass.measure import peak_bytes
from normpass.passes.graph.release_values import ReleaseValues
from normpass.recipe.recipes import Rebuilds

C, SHAPE = 8, (2, 3, 32, 32)


def block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU())


class UNet(nn.Module):
    """Two levels: the skip is read by the strided convolution and by the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, C), block(C, C)
        self.down, self.low = nn.Conv2d(C, 2 * C, 2, stride=2), block(2 * C, 2 * C)
        self.up, self.third = nn.ConvTranspose2d(2 * C, C, 2, stride=2), block(2 * C, C)
        self.last = nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.second(self.first(x))
        low = self.up(self.low(self.down(skip)))
        return self.last(self.third(torch.cat([low, skip], 1)))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = spread(UNet())
    return plain, normpass.optimize(copy.deepcopy(plain))


def test_a_skip_is_made_for_each_of_its_readers_and_what_is_concatenated_goes_early(pair, monkeypatch) -> None:
    x = image(*SHAPE)
    plain, optimized = pair
    with Rebuilds() as rebuilds:
        loss_of(optimized(x)).backward()
    assert rebuilds.most == 2
    low = peak_bytes(optimized, x)
    monkeypatch.setattr(ReleaseValues, "__init__", lambda self, lifetimes: self.__dict__.update(lifetimes=Lifetimes()))
    high = peak_bytes(normpass.optimize(copy.deepcopy(plain)), x)
    one = 2 * C * 32 * 32 * x.element_size()
    assert high - low >= 2 * one, "the skip, and what is concatenated with it"


def once(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def twice(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    return *first, *torch.autograd.grad(loss, inputs)


def part_by_part(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.autograd.grad(loss, [t], retain_graph=True)[0] for t in inputs)


def of_a_gradient(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), inputs, allow_unused=True)


def of_a_gradient_that_frees_the_first_graph(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, create_graph=True, retain_graph=False)


def after_one_that_raised(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    def refuse(grad: Tensor) -> None:
        raise KeyError("in the middle")

    handle = inputs[0].register_hook(refuse)
    with pytest.raises(KeyError):
        torch.autograd.grad(loss, inputs, retain_graph=True)
    handle.remove()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    "way",
    [once, twice, part_by_part, of_a_gradient, of_a_gradient_that_frees_the_first_graph, after_one_that_raised],
    ids=lambda f: f.__name__,
)
def test_every_backward_gives_plains_gradients(pair, way: Callable) -> None:
    found = []
    for model in pair:
        x = image(*SHAPE, requires_grad=True)
        found.append(way(loss_of(model(x)), [x, *model.parameters()]))
    largest = max(
        float(t.detach().abs().max()) for t in found[0] if t is not None
    )  # a bias before a norm has a gradient of rounding alone
    torch.testing.assert_close(*found, rtol=0, atol=1e-12 * largest)


def test_both_readers_in_one_node() -> None:
    """z and sigmoid(z), which is made from it, are saved by one product: made apart, z is there twice."""
    facts = Facts(sizes=[100, 100, 100, 100], outputs=frozenset({3}))
    for key, makes, reads, saves in (
        ("x", 0, (), ()),
        ("z", 1, (0,), (0,)),
        ("s", 2, (1,), ()),
        ("m", 3, (1, 2), (1, 2)),
    ):
        facts.steps.append(Step(None, key, (makes,), reads, (100,) * len(reads), saves=saves, differentiable=True))
    walker = Walker(facts, lambda step, facts: 1.0)
    together, apart = (walker.walk({1, 2}, made_apart=frozenset(values)) for values in ((), (1,)))
    assert (apart.peak, apart.seconds) == (together.peak, together.seconds + 1)
    assert apart.timeline[-1] == together.timeline[-1] == 100


def test_a_second_backward_is_refused_in_plains_words(pair) -> None:
    for model in pair:
        loss = loss_of(model(image(*SHAPE)))
        loss.backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            loss.backward()


def test_two_losses_of_one_forward(pair) -> None:
    """Each backward reads a part: what is made from it is there for the other."""
    found = []
    for model in pair:
        x = image(*SHAPE, requires_grad=True)
        skip = model.second(model.first(x))
        low = model.up(model.low(model.down(skip)))
        joined = model.third(torch.cat([low, skip], 1))
        gradients = torch.autograd.grad(F.relu(joined).sum(), [x], retain_graph=True)
        found.append((*gradients, *torch.autograd.grad(model.last(joined).square().sum(), [x])))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
