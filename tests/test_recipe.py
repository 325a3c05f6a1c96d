"""Recipes: what is rebuilt how often, what frees it, and what keeps it from being wrong."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import ConvNet, assert_trains_alike, image, loss_of, spread

import normpass
from normpass import recipe
from normpass.measure import kept_bytes
from normpass.recipe import Rebuilds

C = 4


def block(inputs: int = C, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


class ResidualChain(nn.Module):
    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.stem, self.blocks = block(3), nn.ModuleList([block() for _ in range(length)])
        self.last = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        z = F.relu(self.stem(x))
        for layers in self.blocks:
            z = F.relu(layers(z) + z)
        return self.last(z)


class DenseBlock(nn.Module):
    def __init__(self, length: int = 4) -> None:
        super().__init__()
        self.stem = block(3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(C * (k + 1)) for k in range(length)])
        self.convs = nn.ModuleList([nn.Conv2d(C * (k + 1), C, 3, padding=1) for k in range(length)])
        self.last = nn.Conv2d(C * (length + 1), 2, 1)

    def forward(self, x):
        features = [F.relu(self.stem(x))]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.last(torch.cat(features, 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3), block()
        self.down, self.up = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        self.last = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        z = F.silu(self.b(F.silu(self.a(x))))
        gate = self.up(F.silu(self.down(z.mean((2, 3), keepdim=True)))).sigmoid()
        return self.last(z * gate)


class SharedResult(nn.Module):
    """One activation, read by five."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3)
        self.readers = nn.ModuleList([nn.Conv2d(C, 2, 1) for _ in range(4)])

    def forward(self, x):
        z = F.silu(self.a(x))
        return sum(reader(z) for reader in self.readers) + F.max_pool2d(z, 3, 1, 1)[:, :2]


NETS = [ResidualChain, DenseBlock, SqueezeExcite, SharedResult]


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls())


def values_held() -> list[recipe.Recipe]:
    return [o for o in gc.get_objects() if type(o) is recipe.Recipe and o.value is not None]


@pytest.mark.parametrize("cls", NETS)
def test_each_tensor_is_rebuilt_once_a_backward(cls: type[nn.Module]) -> None:
    optimised = normpass.optimize(make(cls))
    loss = loss_of(optimised(image(requires_grad=True)))
    with Rebuilds() as none:
        optimised(image())
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
        optimised = normpass.optimize(spread(ResidualChain(length)))
        with Rebuilds() as rebuilds:
            loss_of(optimised(image())).backward()
        totals.append(rebuilds.total)
    assert totals[1] - totals[0] == 4


@pytest.mark.parametrize("cls", NETS)
def test_a_partial_backward_rebuilds_once_and_holds_nothing(cls: type[nn.Module]) -> None:
    optimised = normpass.optimize(make(cls))
    loss = loss_of(optimised(image()))
    first, *_, last = optimised.parameters()
    for parameters in ([last], [first], [last], list(optimised.parameters())):
        with Rebuilds() as rebuilds:
            torch.autograd.grad(loss, parameters, retain_graph=True)
        assert rebuilds.most <= 1
        assert not values_held()


def test_a_backward_that_fails_leaves_no_wrong_count() -> None:
    optimised = normpass.optimize(make(ResidualChain))
    loss = loss_of(optimised(image()))

    def fail(gradient):
        raise ValueError("stop")

    handle = optimised.blocks[2][0].weight.register_hook(fail)
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
    one, other = normpass.optimize(make(ResidualChain)), normpass.optimize(make(ResidualChain))
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
    optimised = normpass.optimize(make(ResidualChain))
    loss = loss_of(optimised(image()))
    weight = optimised.stem[0].weight
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    inner = []

    def again(gradient):
        if not inner:
            inner.append(None)
            inner[0] = torch.autograd.grad(loss, weight, retain_graph=True)[0]

    handle = optimised.blocks[2][0].weight.register_hook(again)
    loss.backward(retain_graph=True)
    handle.remove()  # it holds the graph, which holds the hook
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(inner[0], expected)
    assert not values_held()


# --- lifetime -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("backward", [False, True])
def test_no_reference_cycles(cls: type[nn.Module], backward: bool) -> None:
    """Without the garbage collector the graph of a forward dies with its output."""
    optimised = normpass.optimize(make(cls))
    optimised(image())
    seen: list[weakref.ref] = []

    def note(module, args, out):
        seen.append(weakref.ref(out))

    for module in optimised.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        x = image(requires_grad=True) * 1
        out = optimised(x)
        loss = loss_of(out)
        if backward:
            loss.backward(retain_graph=True)
        recipes = [weakref.ref(o) for o in gc.get_objects() if type(o) is recipe.Recipe]
        assert recipes and len(seen) >= 3
        x = weakref.ref(x)
        del out, loss
        assert x() is None
        assert not any(reference() is not None for reference in (*seen, *recipes))
    finally:
        gc.enable()


def test_a_backward_frees_as_plain_does() -> None:
    model = make(ResidualChain)
    optimised = normpass.optimize(model)
    out = optimised(image())
    loss_of(out).backward()
    assert not [o for o in gc.get_objects() if type(o) is recipe.Recipe]
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(out).backward()


def test_memory_goes_back_after_a_retained_backward() -> None:
    optimised = normpass.optimize(make(ResidualChain))
    x = image(2, 3, 16, 16)

    def retained(x):
        out = optimised(x)
        parameters = list(optimised.parameters())
        torch.autograd.grad(loss_of(out), parameters, retain_graph=True)
        return out

    wrapped = Call(optimised, retained)
    assert kept_bytes(wrapped, x) <= kept_bytes(optimised, x) + 4096


class Call(nn.Module):
    def __init__(self, inner: nn.Module, function) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(x)


# --- tags -----------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = block(3), nn.Conv2d(C, 2, 1)

    def forward(self, x):
        z = F.relu(self.a(x))
        return {"z": [z, (torch.cat([z, z], 1), z[:, :2])], "out": self.last(z)}


class Untraceable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        return out if x.mean() < 100 else x


@pytest.mark.parametrize("wrap", [lambda m: m, Untraceable], ids=["whole", "part"])
def test_tags_do_not_leave_the_model(wrap) -> None:
    optimised = normpass.optimize(wrap(spread(Returns())))
    leaves = torch.utils._pytree.tree_leaves(optimised(image()))
    assert len(leaves) == 4 and all(leaf.requires_grad for leaf in leaves)
    assert [vars(leaf) for leaf in leaves] == [{}, {}, {}, {}]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_tagged_without_gradients(context) -> None:
    optimised = normpass.optimize(make(ResidualChain))
    seen = []
    optimised.last.register_forward_pre_hook(lambda module, args: seen.append(vars(args[0]).copy()))
    with context():
        optimised(image())
    assert seen == [{}]
    optimised(image())
    assert list(seen[1]) == [recipe._TAG]


def test_nothing_is_tagged_where_nothing_needs_a_gradient() -> None:
    model = make(ResidualChain)
    model.requires_grad_(False)
    model.last.requires_grad_(True)
    optimised = normpass.optimize(model)
    seen = []
    optimised.last.register_forward_pre_hook(lambda module, args: seen.append(vars(args[0]).copy()))
    optimised(image())
    assert seen == [{}]


def test_the_hooks_of_somebody_else_are_in_charge() -> None:
    optimised = normpass.optimize(make(ResidualChain))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = optimised(image())
        assert not recipe.is_recording()
    assert len(packed) > 20 and not any(vars(t) for t in packed if type(t) is torch.Tensor)
    with Rebuilds() as rebuilds:
        loss_of(out).backward()
    assert rebuilds.total == 0


def test_hooks_inside_ours_are_in_charge() -> None:
    """A layer that is called as it is may install hooks of its own."""

    class OnCpu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return self.conv(x)

    class Model(ResidualChain):
        def __init__(self) -> None:
            super().__init__()
            self.last = OnCpu()

    assert_trains_alike(make(Model), image(requires_grad=True))


# --- changes in place -----------------------------------------------------------------------------


class WriteLater(nn.Module):
    """A layer (called as it is) that writes over its input after it was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        out = self.conv(x)
        if out.mean() < 100:  # not to be traced
            with torch.no_grad():
                x.mul_(2)
        return out


def test_what_a_kept_input_was_is_checked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 2, 1)

        def forward(self, x):
            h = self.conv(x)
            return self.last(F.relu(self.bn(h))), h

    optimised = normpass.optimize(spread(Model()))
    out, h = optimised(image())
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(normpass.ModifiedInPlaceError, match="modified by an inplace operation: a tensor of shape"):
        loss_of(out).backward()


def test_a_tag_holds_for_one_version() -> None:
    """What is written to before it is kept is kept itself; the numbers are those after the writing."""

    class Doubles(nn.Module):
        def forward(self, x):
            return x.mul_(2) if x.mean() < 100 else x

    model = spread(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.SiLU(), Doubles(), nn.Conv2d(C, 2, 1)))
    assert_trains_alike(model, image(requires_grad=True))


def test_a_layer_that_writes_over_its_input_afterwards() -> None:
    model = spread(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Softplus(), WriteLater()))
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss_of(model(image())).backward()
    optimised = normpass.optimize(model)
    try:  # either it is noticed, or what is rebuilt is what the convolution saw
        loss_of(optimised(image())).backward()
    except normpass.ModifiedInPlaceError:
        return
    gradient = optimised[3].conv.weight.grad.clone()
    optimised.zero_grad()
    z = F.softplus(F.batch_norm(optimised[0](image()), None, None, model[1].weight, model[1].bias, True))
    loss_of(optimised[3].conv(z)).backward()
    torch.testing.assert_close(gradient, optimised[3].conv.weight.grad)


def test_autocast_is_that_of_forward() -> None:
    model = spread(ConvNet()).float()
    optimised = normpass.optimize(model)
    gradients = []
    for m in (model, optimised):
        m.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(image().float())
        with torch.autocast("cpu", dtype=torch.float16):  # of the surroundings, not of the model
            out.float().sum().backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()) + 1e-3)
