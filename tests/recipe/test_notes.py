"""Notes: when they are taken, and what keeps a recipe from being wrong."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rebuilt import C, ResidualChain, block, make, optimized_net, values_held
from torch import nn
from training import ConvNet, assert_equal, image, loss_of, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.recipe import notes
from normpass.recipe import recipes as recipe
from normpass.recipe.notes import Notes, recording, tag
from normpass.recipe.recipes import Rebuilds, Recipe, View

# --- when notes are taken -------------------------------------------------------------------------


def noted(call: Callable) -> list[str]:
    """The functions of the recipes that are noted."""
    functions: list[str] = []
    with notes.observed_tags(lambda function, args, kwargs: functions.append(function.__name__)):
        call()
    return functions


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_noted_without_gradients(context: Callable) -> None:
    optimized = optimized_net(ResidualChain)
    with context():
        assert noted(lambda: optimized(image())) == []
    assert len(noted(lambda: optimized(image()))) >= 7


def test_nothing_is_noted_where_nothing_needs_a_gradient() -> None:
    model = make(ResidualChain)
    model.requires_grad_(False)
    model.last.requires_grad_(True)
    optimized = normpass.optimize(model)
    with Rebuilds() as rebuilds:
        loss_of(optimized(image())).backward()
    assert rebuilds.total <= 1  # what `last` reads
    assert kept_bytes(optimized, image()) <= kept_bytes(model, image())


def test_the_hooks_of_somebody_else_are_in_charge() -> None:
    optimized = optimized_net(ResidualChain)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        assert noted(lambda: optimized(image())) == []
        out = optimized(image())
    assert len(packed) > 20
    with Rebuilds() as rebuilds:
        loss_of(out).backward()
    assert rebuilds.total == 0


# --- changes in place -----------------------------------------------------------------------------


class Chain(nn.Module):
    """conv → norm → activation → conv, and what lies before the norm."""

    def __init__(self, activation: Callable = F.relu, write: Callable | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 2, 1)
        self.activation, self.write = activation, write

    def forward(self, x):
        h = self.conv(x)
        z = self.activation(self.bn(h))
        if self.write is not None:
            z = self.write(z)
        return self.last(z), h


def test_what_recipes_read_is_compared_with_the_version_it_had() -> None:
    model = spread(Chain())
    optimized = normpass.optimize(copy.deepcopy(model))
    changes = {
        "input": lambda m, h: h.mul_(2),
        "weight": lambda m, h: m.bn.weight.add_(1),
        "last": lambda m, h: m.last.weight.add_(1),
    }
    for change in changes.values():
        messages = []
        for m in (model, optimized):
            out, h = m(image(requires_grad=True))
            with torch.no_grad():
                change(m, h)
            with pytest.raises(RuntimeError, match="has been modified by an inplace operation") as caught:
                loss_of(out).backward()
            messages.append(str(caught.value).partition(": [")[2].partition("]]")[0])
        assert messages[0] == messages[1] and messages[0].startswith("torch.DoubleTensor")


def test_what_plain_does_not_keep_may_change_before_backward() -> None:
    """A recipe has copies of vectors as they were."""
    model = spread(nn.Sequential(block(3), nn.SiLU(), block(), nn.ReLU(), nn.Conv2d(C, 2, 1)))
    numbers = []
    for m in (model, normpass.optimize(copy.deepcopy(model))):
        out = m(image())
        with torch.no_grad():
            for layers in (m[0], m[2]):
                layers[0].bias.add_(1)
                layers[1].bias.add_(1)
        loss_of(out).backward()
        numbers.append({name: p.grad for name, p in m.named_parameters()})
    assert_equal(*numbers)


WRITES: dict[str, tuple[Callable, Callable]] = {
    "before it is kept": (F.silu, lambda z: z.mul_(2)),
    "through a view": (F.silu, lambda z: (z[:, :2].add_(1), z)[1]),
    "of a view": (F.silu, lambda z: z.view(2, C, -1).tanh_().view(z.shape)),
    "several times": (F.softplus, lambda z: z.mul_(2).add_(1).sigmoid_()),
    "without gradients": (F.silu, lambda z: (torch.no_grad()(z.detach().mul_)(2), z)[1]),
}


@pytest.mark.parametrize("activation, write", WRITES.values(), ids=WRITES.keys())
def test_a_note_holds_for_one_version(activation: Callable, write: Callable) -> None:
    """What is written to before it is kept is kept itself or made again with the write: plain's numbers, or error."""
    model = spread(Chain(activation, write))
    found = []
    for m in (model, normpass.optimize(copy.deepcopy(model))):
        try:
            found.append(train(m, (image(requires_grad=True),)))
        except RuntimeError as error:
            found.append(str(error).partition(":")[0])
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert_equal(*found)


# --- storages -------------------------------------------------------------------------------------


def test_a_view_of_a_noted_storage_is_kept_as_its_recipe() -> None:
    x = image(2, 4, 6, requires_grad=True)
    with recording():
        y = x * 1
        z = notes.call_rebuilt(torch.sigmoid, (), y)
        weight = image(2, 4, 1, 6, seed=1, requires_grad=True)
        out = (z.unsqueeze(2) * weight).sum() + (z[:, 1:3].transpose(1, 2) * weight[:, 1:3, 0].transpose(1, 2)).sum()
        address = weakref.ref(z)
        del z
        assert address() is None
    with Rebuilds() as rebuilds:
        out.backward()
    assert rebuilds.total == 1
    a = torch.sigmoid(x.detach())
    expected = a.unsqueeze(2).clone()
    expected[:, 1:3, 0] += a[:, 1:3]
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=0)


def test_what_an_operator_saves_of_its_own_result_is_exchanged() -> None:
    x = image(2, 4, 6, requires_grad=True)
    with recording():
        y = notes.call_rebuilt(torch.exp, (), x * 1)
        z = notes.call_rebuilt(torch.relu, (), y - 1)
        loss = (z * z).sum()
        del y, z
    with Rebuilds() as rebuilds:
        loss.backward()
    assert rebuilds.total == 2  # exp for its own backward, and relu for its own and that of the product
    e = x.detach().exp()
    torch.testing.assert_close(x.grad, 2 * (e - 1).relu() * e, rtol=1e-14, atol=1e-14)


def test_notes_tell_storages_versions_and_dtypes_apart() -> None:
    taken = Notes()
    x = torch.arange(6.0)
    z = x.exp()
    taken.note(z, Recipe(taken.source, z, torch.exp, (x,), {}, None))
    assert type(taken.pack(z)) is Recipe and type(taken.pack(z[2:])) is View
    assert type(taken.pack(z.view(torch.int32))) is recipe.Kept
    assert type(taken.pack(z.clone())) is recipe.Kept and type(taken.pack(z.to_sparse())) is recipe.Kept
    torch.testing.assert_close(taken.pack(z.view(2, 3).T).read(), z.view(2, 3).T, rtol=0, atol=0)
    assert taken.recipe_of(z[1:]) is not None
    z.add_(1)
    assert taken.recipe_of(z) is None and type(taken.pack(z)) is recipe.Kept
    taken.note(z, Recipe(taken.source, z, torch.exp, (x,), {}, None))
    taken.forget(z)
    assert type(taken.pack(z)) is recipe.Kept
    address = z.untyped_storage()._cdata
    taken.note(z, Recipe(taken.source, z, torch.exp, (x,), {}, None))
    del z
    assert all(torch.empty(6).untyped_storage()._cdata != address for _ in range(100))


def test_functions_of_several_results_and_functions_in_place() -> None:
    x = image(2, 4, 6, requires_grad=True)
    with recording():
        a, b = notes.call_rebuilt(torch.var_mean, (), (x * 1).exp(), 2)
        y = notes.call_rebuilt(torch.sigmoid, (), x * 1)
        notes.call_rebuilt_in_place(torch.Tensor.mul_, 0, (), y, 3.0)
        kept = notes.call_kept(torch.tanh, x * 1)
        assert notes.notes_now().recipe_of(y) is not None and notes.notes_now().recipe_of(kept) is None
        loss = (a * b).sum() + (y * y).sum() + (kept * kept).sum()
        del a, b, y, kept
    loss.backward()
    t = x.detach().clone().requires_grad_()
    a, b = torch.var_mean(t.exp(), 2)
    ((a * b).sum() + (3 * t.sigmoid()).square().sum() + t.tanh().square().sum()).backward()
    torch.testing.assert_close(x.grad, t.grad, rtol=1e-13, atol=1e-13)


def test_under_hooks_inside_ours_nothing_is_noted() -> None:
    x = image(2, 4, requires_grad=True)
    with recording():
        assert notes.is_recording()
        with torch.autograd.graph.save_on_cpu():
            assert not notes.is_recording()
            y = (x * 1).exp()
            tag(y, torch.exp, (x,))
            assert notes.notes_now() is None
        assert notes.is_recording() and notes.notes_now().recipe_of(y) is None
    assert not notes.is_recording()


def test_autocast_is_that_of_forward() -> None:
    model = spread(ConvNet()).float()
    optimized = normpass.optimize(model)
    gradients = []
    for m in (model, optimized):
        m.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(image().float())
        with torch.autocast("cpu", dtype=torch.float16):  # of the surroundings, not of the model
            out.float().sum().backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()) + 1e-3)


def test_a_reader_on_another_stream_makes_its_own(monkeypatch) -> None:
    """Nothing makes one CUDA stream wait for what another has made: each gets a value of its own, in any order."""
    now: list[int | None] = [None]
    monkeypatch.setattr(recipe, "_stream_of", lambda tensor: now[0])
    made_on: list[int | None] = []

    def made(x):
        made_on.append(now[0])
        return x.exp()

    for streams, expected in (([7, 9, 9, 7, 7], [7, 9, 7]), ([0, 0, 7], [7, 0]), ([None] * 3, [None])):
        made_on.clear()
        x = torch.randn(4)
        weights = [torch.randn(4, requires_grad=True) for _ in streams]
        with recording():
            y = x.exp()
            tag(y, made, (x,))
            products = [y * w for w in weights]
        for product, stream in zip(products, streams, strict=True):
            product.register_hook(lambda grad, stream=stream: now.__setitem__(0, stream))
        for found in torch.autograd.grad(sum(p.sum() for p in products), weights):
            assert torch.equal(found, x.exp())
        assert made_on == expected and not values_held()  # backward comes to the last product first
