"""Recipes: what is rebuilt how often, and what frees it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from rebuilt import NETS, C, ResidualChain, block, make, optimized_net, values_held
from torch import nn
from training import assert_trains_alike, image, loss_of, spread

import normpass
from normpass.measure import kept_bytes
from normpass.recipe import recipes as recipe
from normpass.recipe.notes import Notes
from normpass.recipe.recipes import Rebuilds, Recipe, View


@pytest.mark.parametrize("cls", NETS)
def test_each_tensor_is_rebuilt_once_a_backward(cls: type[nn.Module]) -> None:
    optimized = optimized_net(cls)
    loss = loss_of(optimized(image(requires_grad=True)))
    with Rebuilds() as none:
        optimized(image())
    assert none.total == 0
    for _ in range(2):
        with Rebuilds() as rebuilds:
            loss.backward(retain_graph=True)
        assert rebuilds.most == 1
        assert rebuilds.total > 0
        assert not values_held()


@pytest.mark.parametrize("cls", NETS)
def test_what_is_rebuilt_gives_plains_numbers(cls: type[nn.Module]) -> None:
    assert_trains_alike(make(cls), image(requires_grad=True))


def test_a_chain_is_rebuilt_in_linear_time() -> None:
    totals = []
    for length in (4, 8):
        optimized = normpass.optimize(spread(ResidualChain(length)))
        optimized(image())
        with Rebuilds() as rebuilds:
            loss_of(optimized(image())).backward()
        totals.append(rebuilds.total)
    assert totals[1] - totals[0] == 4 and totals[0] > 0


@pytest.mark.parametrize("cls", NETS)
def test_a_partial_backward_rebuilds_once_and_holds_nothing(cls: type[nn.Module]) -> None:
    optimized = optimized_net(cls)
    loss = loss_of(optimized(image()))
    first, *_, last = optimized.parameters()
    for parameters in ([last], [first], [last], list(optimized.parameters())):
        with Rebuilds() as rebuilds:
            torch.autograd.grad(loss, parameters, retain_graph=True)
        assert rebuilds.most <= 1
        assert not values_held()


def test_a_backward_that_fails_leaves_no_wrong_count() -> None:
    optimized = optimized_net(ResidualChain)
    optimized.zero_grad()
    loss = loss_of(optimized(image()))

    def fail(gradient):
        raise ValueError("stop")

    handle = optimized.blocks[2][0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        loss.backward(retain_graph=True)
    handle.remove()
    for _ in range(2):
        with Rebuilds() as rebuilds:
            loss.backward(retain_graph=True)
        assert rebuilds.most == 1
        assert not values_held()


def test_a_backward_inside_a_backward() -> None:
    """A hook that trains another model meanwhile: two tasks, each with its own cache."""
    one, other = optimized_net(ResidualChain), normpass.optimize(make(ResidualChain))
    one.zero_grad()
    one.load_state_dict(other.state_dict())
    loss = loss_of(one(image()))
    inner = []

    def train_the_other(gradient):
        with torch.enable_grad():
            inner.append(loss_of(other(image())).backward())

    handle = one.blocks[2][0].weight.register_hook(train_the_other)
    with Rebuilds() as rebuilds:
        loss.backward(retain_graph=True)
    handle.remove()
    assert len(inner) == 1 and rebuilds.most == 1 and not values_held() and not recipe._unfinished
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_backward_of_the_same_graph_inside_its_backward() -> None:
    optimized = optimized_net(ResidualChain)
    optimized.zero_grad()
    loss = loss_of(optimized(image()))
    weight = optimized.stem[0].weight
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    inner = []

    def again(gradient):
        if not inner:
            inner.append(None)
            inner[0] = torch.autograd.grad(loss, weight, retain_graph=True)[0]

    handle = optimized.blocks[2][0].weight.register_hook(again)
    loss.backward(retain_graph=True)
    handle.remove()  # it holds the graph, which holds the hook
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(inner[0], expected)
    assert not values_held()


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("backward", [False, True])
def test_no_reference_cycles(cls: type[nn.Module], backward: bool) -> None:
    """Without the garbage collector the graph of a forward dies with its output.

    What is asked for is what this forward made: another thread may be collecting what the tests before have left, and
    then `gc.collect` returns at once.
    """
    optimized = optimized_net(cls)
    optimized(image(requires_grad=True) * 1)
    gc.collect()
    gc.disable()
    try:
        before = held_for_backward()
        x = image(requires_grad=True) * 1
        out = optimized(x)
        loss = loss_of(out)
        if backward:
            loss.backward(retain_graph=True)
        made = [weakref.ref(o) for o in held_for_backward() if type(o) is Recipe and not any(o is b for b in before)]
        assert made
        x = weakref.ref(x)
        del out, loss
        assert x() is None, referrers(x())
        left = [o for o in held_for_backward() if not any(o is b for b in before)]
        assert not left, referrers(left[0])
        assert not any(reference() is not None for reference in made)
    finally:
        gc.enable()


def held_for_backward() -> list[object]:
    kinds = Recipe, recipe.Kept, recipe.Moving, recipe.Copied, recipe.Unread, View, Notes
    return [o for o in gc.get_objects() if type(o) in kinds]


def referrers(value: object) -> str:
    """Who holds `value`, for a failure that may not come again."""
    return f"{type(value).__name__}, held by " + ", ".join(repr(r)[:300] for r in gc.get_referrers(value))


def test_a_backward_frees_as_plain_does() -> None:
    out = optimized_net(ResidualChain)(image())
    loss_of(out).backward()
    assert not [o for o in gc.get_objects() if type(o) is Recipe]
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(out).backward()


def test_memory_goes_back_after_a_retained_backward() -> None:
    optimized = optimized_net(ResidualChain)
    x = image()

    def retained(x):
        out = optimized(x)
        parameters = list(optimized.parameters())
        torch.autograd.grad(loss_of(out), parameters, retain_graph=True)
        return out

    wrapped = Call(optimized, retained)
    assert kept_bytes(wrapped, x) <= kept_bytes(optimized, x) + 4096


class Call(nn.Module):
    def __init__(self, inner: nn.Module, function) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(x)


class Holds(nn.Module):
    """Keeps what lies between, and returns it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last, self.held = block(3), block(), nn.Conv2d(C, 2, 1), {}

    def forward(self, x):
        z = F.silu(self.a(x))
        self.held["z"] = z
        y = F.silu(self.b(z))
        return {"y": [y, (torch.cat([y, y], 1), y[:, :2])], "out": self.last(y)}


def test_what_somebody_holds_of_a_tensor_holds_no_chain() -> None:
    optimized = normpass.optimize(make(Holds))
    hooked: list[torch.Tensor] = []
    optimized.last.register_forward_pre_hook(lambda module, args: hooked.append(args[0].detach()))
    found = torch.utils._pytree.tree_leaves(optimized(image()))
    held = [*found, optimized.held["z"], *hooked]
    assert len(held) == 6 and all(t.requires_grad for t in held[:5]) and not any(vars(t) for t in held)
    held = [t.detach() for t in held]
    del found, hooked[:]
    optimized.held.clear()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Recipe, recipe.Kept, View, Notes)]
    assert all(t.isfinite().all() for t in held)
