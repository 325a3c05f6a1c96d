"""What is odd, unsupported or wrong: the plain model's numbers, or a clear error or refusal, never a wrong number."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from training import (
    ConvNet,
    assert_equal,
    assert_trains_alike,
    collected,
    image,
    loss_of,
    rewrites,
    spread,
    train,
)

import normpass
from normpass.collect import Collected
from normpass.measure import kept_bytes
from normpass.optimized import state_of
from normpass.passes import LeakyReLU
from normpass.report.explain import norm_rows
from normpass.report.summary import Row

C = 4


def conv(inputs: int = 3, outputs: int = C) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def small(*layers: nn.Module) -> nn.Sequential:
    """A convolution, the layers, a convolution that keeps its input."""
    torch.manual_seed(0)
    return spread(nn.Sequential(conv(), *layers, conv(C, 2)))


def trains_alike_by(model: nn.Module, x: torch.Tensor, evaluating: bool = True) -> dict[str, Row]:
    """Two steps in train mode, one in eval mode, compared with plain; what was done to the norms, by their paths."""
    plain, optimized, found = model, normpass.optimize(copy.deepcopy(model)), Collected()
    state_of(optimized).observers.append(lambda rewritten, inputs: found.graphs.append(rewritten))
    assert_equal(train(plain, (x,)), train(optimized, (x,)))
    rows = norm_rows(optimized, Collected([graph for graph in found.graphs if graph.keeps_gradients]))
    if evaluating:
        assert_equal(train(plain.eval(), (x,), steps=1), train(optimized.eval(), (x,), steps=1))
    return {row.path: row for row in rows}


def rewrites_of(rows: dict[str, Row]) -> dict[str, str | None]:
    return {path: row.rewrite for path, row in rows.items()}


class Block(nn.Module):
    """conv, norm and a function of (self, x, norm's result) that says what follows."""

    def __init__(self, after, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.last, self.after = conv(), nn.BatchNorm2d(C), conv(C, 2), after
        for name, layer in layers.items():
            setattr(self, name, layer)
        spread(self)

    def forward(self, x):
        return self.after(self, x, self.conv(x))


class Many(nn.Module):
    """Blocks that read the same input, by the names of what follows in them: one graph for many cases."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({block.after.__name__: block for block in blocks})

    def forward(self, x):
        return {name: block(x) for name, block in self.blocks.items()}


# --- what is not a model, or not an option --------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, torch.relu, nn.BatchNorm2d, "resnet18", image()])
def test_not_a_module(thing: object) -> None:
    with pytest.raises(normpass.InvalidModelError, match=f"must be a torch.nn.Module, it is a {type(thing).__name__}"):
        normpass.optimize(thing)


def test_optimized_already() -> None:
    optimized = normpass.optimize(ConvNet())
    with pytest.raises(normpass.InvalidModelError, match="this ConvNet is optimized already; .* normpass.restore"):
        normpass.optimize(optimized)
    with pytest.raises(normpass.InvalidModelError, match="`1.0` is optimized already"):
        normpass.optimize(nn.Sequential(conv(), nn.Sequential(optimized)))
    assert normpass.explain(optimized, image().float()).rewritten == 2


def test_restore_of_a_plain_model() -> None:
    with pytest.raises(normpass.InvalidModelError, match="was not made by normpass.optimize"):
        normpass.restore(ConvNet())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_compiled_and_scripted_models() -> None:
    with pytest.raises(normpass.InvalidModelError, match="optimize the plain module first"):
        normpass.optimize(torch.compile(ConvNet(), backend="eager"))
    with pytest.raises(normpass.InvalidModelError, match="optimize the plain module first"):
        normpass.optimize(torch.jit.script(conv()))


def test_example_inputs_of_another_kind() -> None:
    model = ConvNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for inputs in (image(2, 5, 8, 8).float(), (), (1, 2), {"y": image()}, image().long()):
        words = "`example_inputs`: ConvNet does not run on inputs of shape"
        with pytest.raises(normpass.InvalidInputError, match=words):
            normpass.optimize(model, inputs)
        with pytest.raises(normpass.InvalidInputError, match=words):
            normpass.explain(model, inputs)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_advice_stands_before_what_torch_says() -> None:
    for given in (np.zeros((2, 3, 8, 8)), 3, "2x3x16x16"):
        with pytest.raises(normpass.InvalidInputError, match="there is no tensor among them.*give a tensor") as raised:
            normpass.optimize(ConvNet(), given)
        assert len(str(raised.value)) < 500 and type(given).__name__ in str(raised.value)


@pytest.mark.parametrize("function", [normpass.optimize, normpass.explain, kept_bytes])
def test_a_lazy_model_is_called_first(function) -> None:
    """It cannot be put back to what it was; that is not said to be the inputs' fault."""
    model = nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d()).double()
    with pytest.raises(normpass.InvalidModelError, match="`0.weight` of this Sequential has no shape yet: .* call the"):
        function(model, image())
    model(image())
    function(model, image())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_part_of_the_model_is_scripted() -> None:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
        pair.append(nn.Sequential(conv(), scripted, conv(C, 2)).double())
    model = pair[1]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = normpass.optimize(model, image())
    report = normpass.explain(model, image())
    assert report.memory is not None and report.memory.kept_before == kept_bytes(model, image())
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert_equal(*(train(m, (image(),)) for m in (pair[0], optimized)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("leaky_relu", "is a sequence of names or option objects"),
        (("leaky",), '"leaky" is not known; known are "leaky_relu"'),
        ((3,), "3 is neither a name"),
        ((LeakyReLU,), "is neither a name"),
    ],
)
def test_wrong_changes(changes: object, words: str) -> None:
    with pytest.raises(normpass.InvalidInputError, match=words):
        normpass.optimize(ConvNet(), changes=changes)


class HasALock(ConvNet):
    """Cannot be copied deeply; need not be, for a copy that shares what is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


def test_a_model_that_cannot_be_copied_deeply() -> None:
    torch.manual_seed(0)
    models = [spread(HasALock()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimized = normpass.optimize(models[1], image())
    assert optimized.lock is models[1].lock
    assert_equal(*(train(m, (image(),), steps=1) for m in (models[0], optimized)))


class HoldsAnIterator(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.cycle([self.stem])


def test_a_model_whose_copy_could_not_lead_to_copies() -> None:
    with pytest.raises(normpass.InvalidModelError, match="leads to a cycle, which holds a module"):
        normpass.optimize(HoldsAnIterator())


# --- norms that are left alone --------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.BatchNorm2d):
    """A subclass that changes nothing: unknown all the same."""


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, out: out * 2)
    return norm


def with_forward(norm: nn.Module) -> nn.Module:
    norm.forward = lambda x: F.batch_norm(x, None, None, training=True) * 3
    return norm


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrised(norm: nn.Module) -> nn.Module:
    parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


NORMS = {
    "hooks": lambda: hooked(nn.BatchNorm2d(C)),
    "instance_forward": lambda: with_forward(nn.BatchNorm2d(C)),
    "own_class": lambda: OwnNorm(C),
    "renamed": lambda: Renamed(C),
    "parametrised": lambda: parametrised(nn.BatchNorm2d(C)),
    "group": lambda: nn.GroupNorm(2, C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True),
    "layer": lambda: nn.LayerNorm(8),
    "plain": lambda: nn.BatchNorm2d(C),
}
OTHER_NORMS = {"group": "group_norm", "instance": "instance_norm", "layer": "layer_norm"}


def test_norms_of_every_class() -> None:
    """What runs is what counts: subclasses, hooks and parametrisations are in the graph."""
    model = chain({name: make() for name, make in NORMS.items()})
    rows = trains_alike_by(model, image(requires_grad=True))
    assert {path.split(".")[0] for path in rows} == set(NORMS)
    for path, row in rows.items():
        other = OTHER_NORMS.get(path.split(".")[0])
        assert row.rewrite == ("split_bn" if other is None else "rebuild_values"), path
        assert row.reason == ("" if other is None else f"rebuilt, not fused: {other} is not a batch norm"), path


def test_sync_batch_norm_is_reported() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small(nn.BatchNorm2d(C), nn.ReLU())).eval()
    assert list(rewrites(model)) == ["1"]
    torch.testing.assert_close(normpass.optimize(model)(image()), model(image()))


def test_lazy_layers_materialize_in_the_optimized_model() -> None:
    numbers = []
    for change in (lambda m: m, normpass.optimize):
        model = nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1)).double()
        trained = change(model)
        torch.manual_seed(1)
        trained(image())
        numbers.append(train(trained, (image(),)))
    assert_equal(*numbers)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
def test_parametrised_convolutions() -> None:
    """As they are given, and registered on a model that has run."""
    wraps = (weight_norm, spectral_norm, parametrizations.orthogonal, torch.nn.utils.weight_norm)
    pair = []
    for change in (lambda m: m, normpass.optimize):
        torch.manual_seed(0)
        layers = [nn.Sequential(wrap(conv(C, C)), nn.BatchNorm2d(C), nn.ReLU()) for wrap in wraps]
        pair.append(change(spread(nn.Sequential(conv(), *layers, conv(C, 2)))))
    x = image(requires_grad=True)
    assert_equal(*(train(m, (x,)) for m in pair))
    for m in pair:
        torch.manual_seed(1)
        parametrised(m[1][1])
        spectral_norm(m[-1])
    assert_equal(*(train(m.train(), (x,)) for m in pair))
    assert set(rewrites(normpass.restore(pair[1])).values()) == {"split_bn"}


# --- norms and modules used more than once --------------------------------------------------------


def twice(m, x, h):
    return m.last(F.relu(m.bn(F.relu(m.bn(h)))))


def under_two_names(m, x, h):
    return m.last(F.relu(m.same(F.relu(m.bn(h)))))


def block_twice(m, x, h):
    return m.last(m.block(m.block(h)))


def shared_layers(m, x, h):
    h = m.act(m.bn(h))
    return m.last(m.act(m.bn2(m.inner(m.inner(h)))))


def test_what_is_called_twice() -> None:
    """A norm, by one name or two; a block; an activation and a convolution: each call is a node of its own."""
    model = Many(
        Block(twice),
        Block(under_two_names),
        Block(block_twice, block=nn.Sequential(conv(C, C), nn.BatchNorm2d(C), nn.ReLU())),
        Block(shared_layers, act=nn.ReLU(inplace=True), inner=conv(C, C), bn2=nn.BatchNorm2d(C)),
    )
    model.blocks.under_two_names.same = model.blocks.under_two_names.bn
    rows = trains_alike_by(model, image(requires_grad=True))
    assert rows.pop("blocks.block_twice.bn").reason == "no captured graph calls it"
    assert set(rewrites_of(rows).values()) == {"split_bn"} and len(rows) == 8, rows
    assert {"blocks.twice.bn", "blocks.under_two_names.bn", "blocks.block_twice.block.1"} <= set(rows)


def test_norms_that_share_parameters() -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU(), conv(C, C), nn.BatchNorm2d(C), nn.ReLU())
    model[4].weight, model[4].running_mean = model[1].weight, model[1].running_mean
    optimized = assert_trains_alike(model, image())
    assert optimized[4].weight is optimized[1].weight


# --- in place -------------------------------------------------------------------------------------


def add_number(m, x, h):
    z = F.silu(m.bn(h))
    z.add_(1)
    return m.last(z)


def hardswish_later(m, x, h):
    z = F.silu(m.bn(h))
    return m.last(F.hardswish(z, inplace=True))


def write_through_a_view(m, x, h):
    z = F.silu(m.bn(h))
    z.view(-1).mul_(2)
    return m.last(z)


def write_a_slice(m, x, h):
    z = F.silu(m.bn(h))
    z[:, 1:3].add_(1)
    return m.last(z)


def write_one_of_two_views(m, x, h):
    z = F.silu(m.bn(h))
    first, second = z[:, :2], z.narrow(1, 2, 2)
    first.add_(second)
    return m.last(torch.cat([first, second], 1))


def write_an_unfolded_view(m, x, h):
    z = m.bn(h)
    z.unfold(2, 2, 2).mul_(3)
    return m.last(z)


def write_through_data(m, x, h):
    z = F.silu(m.bn(h))
    z.data.mul_(2)
    return m.last(z)


def write_the_norms_input(m, x, h):
    z = m.bn(h.clone()) + 1
    h.add_(2)
    return m.last(z) + h.mean()


def write_the_residual_before(m, x, h):
    r = h * 2
    y = m.bn(h)
    r.mul_(3)
    return m.last(F.relu(y + r))


def write_the_residual_later(m, x, h):
    r = h * 2
    z = F.relu(m.bn(h) + r)
    out = m.last(z)
    r.mul_(3)
    return out, r


def write_a_part_of_a_concatenation_later(m, x, h):
    z, w = F.relu(m.bn(h)), x * 2
    out = m.wide(torch.cat([z, w], 1))
    w.add_(1)
    return out, w


def write_a_term_of_a_sum_later(m, x, h):
    z, w = F.relu(m.bn(h)), h * 2
    out = m.last(z + w)
    w.add_(1)
    return out, w


def write_after_it_was_read(m, x, h):
    z = m.bn(h)
    pooled = z.mean((2, 3), keepdim=True)
    z += pooled
    return m.last(z)


def sum_into_the_residual(m, x, h):
    r = h * 2
    r += m.bn(h)
    return m.last(F.relu_(r))


def sum_into_the_norm(m, x, h):
    z = m.bn(h)
    z += h
    return m.last(F.relu_(z))


def product_into_the_norm(m, x, h):
    z = F.silu(m.bn(h))
    z *= h.sigmoid()
    return m.last(z)


def sum_into_a_view(m, x, h):
    z = F.silu(m.bn(h))
    v = z[:, :2]
    v += 1
    return m.last(z)


def sum_into_what_another_name_holds(m, x, h):
    z = F.silu(m.bn(h))
    kept = [z]
    z += h
    return m.last(kept[0])


def other_operators_into_what_another_name_holds(m, x, h):
    z = F.silu(m.bn(h))
    kept = [z]
    z -= 1
    z /= 3
    z **= 2
    return m.last(kept[0])


def running_sum(m, x, h):
    total = m.bn(h)
    kept = []
    for k in range(3):
        kept.append(total)
        total += h * k
    return m.last(sum(kept))


def set_an_item(m, x, h):
    z = F.silu(m.bn(h))
    z[:, 0] = 1
    z[:, 1:3] += 1
    return m.last(z)


def set_the_data(m, x, h):
    z = F.silu(m.bn(h))
    z.data = z.data * 2
    return m.last(z)


def out_argument(m, x, h):
    z = m.bn(h)
    with_out = torch.empty(2, C, 8, 8, dtype=torch.float64)
    return m.last(z), with_out.copy_(z.detach()).sum()


IN_PLACE = [
    add_number,
    hardswish_later,
    write_through_a_view,
    write_a_slice,
    write_one_of_two_views,
    write_an_unfolded_view,
    write_through_data,
    write_the_norms_input,
    write_the_residual_before,
    write_the_residual_later,
    write_a_part_of_a_concatenation_later,
    write_a_term_of_a_sum_later,
    write_after_it_was_read,
    sum_into_the_residual,
    sum_into_the_norm,
    product_into_the_norm,
    sum_into_a_view,
    sum_into_what_another_name_holds,
    other_operators_into_what_another_name_holds,
    running_sum,
    set_an_item,
    out_argument,
]


def test_in_place() -> None:
    model = Many(*(Block(after, wide=conv(C + 3, 2)) for after in IN_PLACE))
    rows = rewrites_of(trains_alike_by(model, image(requires_grad=True)))
    # What reads the storage that it writes to is not made again, nor is what it is made from.
    kept = "other_operators_into_what_another_name_holds", "set_an_item", "write_one_of_two_views"
    rewrites = {name: "fuse_norm_act" if name in kept else "split_bn" for name in model.blocks}
    assert rows == {f"blocks.{name}.bn": rewrite for name, rewrite in rewrites.items()}


def test_the_data_is_set() -> None:
    """Where Dynamo ends its graph."""
    model = Block(set_the_data)
    found = collected(model, image(requires_grad=True))
    assert not found.failures and len(found.graphs) > 1
    assert "data attribute" in found.graphs[0].ends and "test_bad_input.py:" in found.graphs[0].ends
    trains_alike_by(model, image(requires_grad=True))


def refused_by_plain(m, x, h):
    z = m.bn(h).sigmoid()
    out = m.last(z)
    z.mul_(2)  # the convolution has kept z
    return out


def refused_with_an_index(m, x, h):
    z = F.relu(m.bn(h))
    out = m.last(z)
    z[z > 1] = 1
    return out


@pytest.mark.parametrize("after", [refused_by_plain, refused_with_an_index], ids=lambda f: f.__name__)
def test_what_autograd_refuses_is_refused(after) -> None:
    model = Block(after)
    for m in (model, normpass.optimize(model)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(m(image())).backward()


def test_what_the_recipe_reads_may_not_change() -> None:
    """What plain keeps may not be written to, in autograd's words; what it does not keep may."""
    model = Block(lambda m, x, h: m.last(F.relu(m.bn(x))))
    model.bn, model.last = nn.BatchNorm2d(3), conv(3, 2)
    pair = spread(model), normpass.optimize(copy.deepcopy(model))
    for path in ("input", "bn.weight"):
        errors = []
        for m in pair:
            x = image(requires_grad=True) * 1
            out = m(x)
            with torch.no_grad():
                (x if path == "input" else m.bn.weight).mul_(2)
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*expected version \d") as error:
                loss_of(out).backward()
            errors.append(type(error.value))
        assert errors[0] is errors[1]
    gradients = []
    for m in pair:
        x = image(requires_grad=True)
        out = m(x)
        with torch.no_grad():
            m.bn.bias.add_(1), m.last.bias.mul_(2)
            if m is pair[1]:
                m.bn.running_mean.zero_()  # plain keeps it, for nothing
        gradients.append(torch.autograd.grad(loss_of(out), [x, *m.bn.parameters(), *m.last.parameters()]))
    torch.testing.assert_close(*gradients)


# --- batches --------------------------------------------------------------------------------------


def test_an_empty_batch_and_one_with_nan() -> None:
    trains_alike_by(small(nn.BatchNorm2d(C), nn.ReLU()), image(0, 3, 8, 8))
    x = image()
    x[0, 0, 0, 0] = float("nan")
    x[1, 1, 1, 1] = float("inf")
    trains_alike_by(small(nn.BatchNorm2d(C), nn.ReLU()), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_values(layout) -> None:
    """Up to where a variance overflows, a norm's gradient has its part through the statistics."""
    norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]).double()
    for scale in (1e100, 1e120, 1e150):
        x = (image(2, 8, 4, 4) * scale).contiguous(memory_format=layout).requires_grad_()
        found = []
        for optimize in (copy.deepcopy, normpass.optimize):
            model = optimize(LargeValues(norms))
            found.append([g * scale for g in torch.autograd.grad(loss_of(model(x)), x)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


class LargeValues(nn.Module):
    """A norm by itself, and one of a concatenation."""

    def __init__(self, norms: nn.ModuleList) -> None:
        super().__init__()
        self.norms = norms

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return self.norms[0](x), F.relu(self.norms[1](torch.cat([second, first], 1)))


def test_one_value_per_channel() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()).double()
    optimized = normpass.optimize(model)
    for m in (model, optimized):
        for _ in range(2):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
                m(image(1, 3))
            assert type(error.value) is ValueError
    torch.testing.assert_close(optimized.eval()(image(1, 3)), model.eval()(image(1, 3)))
    assert_equal(*(train(copy.deepcopy(m).train(), (image(3, 3),)) for m in (model, optimized)))


def error_of(model: nn.Module, x: torch.Tensor) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        model(x)
    return type(error.value), str(error.value)


def test_a_wrong_shape_raises_what_plain_raises() -> None:
    """Before anything was captured and afterwards; then a right one runs, and keeps what it should."""
    model = small(nn.BatchNorm2d(C), nn.ReLU())
    optimized = normpass.optimize(copy.deepcopy(model))
    for _ in range(2):
        for shape in ((2, 8, 8), (8, 8), (2, 3, 4, 8, 8), (2, 5, 8, 8)):
            assert error_of(optimized, image(*shape)) == error_of(model, image(*shape))
        torch.testing.assert_close(optimized(image()), model(image()))
    assert kept_bytes(optimized, image()) < 0.8 * kept_bytes(model, image())


def test_models_that_raise_what_plain_raises() -> None:
    """A norm of another width; mixed dtypes; complex input; a negative eps."""
    mixed = small(nn.BatchNorm2d(C), nn.ReLU()).float()
    mixed[1].double()
    negative = small(nn.BatchNorm2d(C, eps=-1.0), nn.ReLU())
    complex_conv = nn.Sequential(nn.Conv2d(3, C, 1, dtype=torch.complex64), nn.BatchNorm2d(C), nn.ReLU())
    for model, x in [
        (small(nn.BatchNorm2d(C + 1), nn.ReLU()), image()),
        (mixed, image().float()),
        (complex_conv, image().to(torch.complex64)),
        (negative, image()),
    ]:
        assert error_of(normpass.optimize(model), x) == error_of(model, x)


class Joined(nn.Module):
    """A norm before an addition, one of a concatenation, one before a depthwise convolution."""

    def __init__(self, eps: Any) -> None:
        super().__init__()
        self.first, self.depthwise = conv(), nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)
        self.a, self.b, self.c = (
            nn.BatchNorm2d(C, eps=eps),
            nn.BatchNorm2d(2 * C, eps=eps),
            nn.BatchNorm2d(2 * C, eps=eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        z = self.b(torch.cat([F.relu(self.a(x) + x), x], 1))
        return self.depthwise(F.silu(self.c(F.leaky_relu(z, 0.1))))


@pytest.mark.parametrize("eps", [1, 10**6, 0, 0.0, -1, -1e-5, math.nan, math.inf, True], ids=str)
@pytest.mark.parametrize("lossy", [False, True])
def test_odd_eps(eps: Any, lossy: bool) -> None:
    """The numbers or the error of plain, in train and eval mode."""
    torch.manual_seed(0)
    model = Joined(eps).double()
    optimized = normpass.optimize(copy.deepcopy(model), allow_lossy=lossy)
    for training in (True, False):
        model.train(training), optimized.train(training)
        try:
            copy.deepcopy(model)(image())  # its running statistics are another's
        except ValueError:
            assert error_of(optimized, image()) == error_of(model, image())
            continue
        results = []
        for m in (model, optimized):
            x = image(requires_grad=True)
            y = m(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, equal_nan=True)


# --- norms of every kind --------------------------------------------------------------------------

KINDS = {
    "no_statistics": {"track_running_stats": False},
    "no_affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
    "no_momentum": {"momentum": 0.0},
    "all_momentum": {"momentum": 1.0},
    "large_eps": {"eps": 10.0},
}


def chain(norms: dict[str, nn.Module]) -> nn.Module:
    """conv → norm → ReLU for each, one behind the other."""
    torch.manual_seed(0)
    layers = {name: nn.Sequential(conv(C, C), norm, nn.ReLU()) for name, norm in norms.items()}
    return spread(nn.Sequential(OrderedDict(first=conv(), **layers, last=conv(C, 2))))


def test_options_of_the_norm() -> None:
    model = chain({name: nn.BatchNorm2d(C, **options) for name, options in KINDS.items()})
    rows = rewrites_of(trains_alike_by(model, image(requires_grad=True)))
    assert rows == {f"{name}.1": "split_bn" for name in KINDS}


def test_a_cumulative_average() -> None:
    """Its momentum is a number from a tensor, where Dynamo ends its graph."""
    trains_alike_by(small(nn.BatchNorm2d(C, momentum=None), nn.ReLU()), image(requires_grad=True))


def drop_statistics(m: nn.Module) -> None:
    m.running_mean = m.running_var = None


def one_statistic(m: nn.Module) -> None:
    m.bias = None


LATER = {
    "eps": lambda m: setattr(m, "eps", 3.0),
    "momentum": lambda m: setattr(m, "momentum", None),
    "no_tracking": lambda m: setattr(m, "track_running_stats", False),
    "no_statistics": drop_statistics,
    "no_bias": one_statistic,
    "no_counter": lambda m: setattr(m, "num_batches_tracked", None),
    "no_counter_cumulative": lambda m: (setattr(m, "num_batches_tracked", None), setattr(m, "momentum", None)),
    "reset": lambda m: m.reset_running_stats(),
    "other_weight": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(C).double())),
}


def test_norms_change_later() -> None:
    model = chain({name: nn.BatchNorm2d(C) for name in LATER})
    pair = model, normpass.optimize(copy.deepcopy(model))
    for m in pair:
        m(image())
        m.eval()(image())
        for name, change in LATER.items():
            change(m.train().get_submodule(f"{name}.1"))
    assert_equal(*(train(m, (image(requires_grad=True),)) for m in pair))
    assert_equal(*(train(m, (image(requires_grad=True),), steps=1) for m in pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float_norm_of_narrow_input(dtype: torch.dtype) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU()).to(dtype)
    model[1].float()
    optimized = normpass.optimize(copy.deepcopy(model))
    gradients = []
    for m in (model, optimized):
        out = m(image().to(dtype))
        assert out.dtype == dtype
        out.float().sum().backward()
        gradients.append([out, *(p.grad for p in m.parameters()), m[1].running_var])
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0.05, atol=0.05 * float(model[1].weight.grad.abs().max())
    )


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Linear(3, C), nn.BatchNorm1d(C), nn.ELU(), nn.Linear(C, 2)), (4, 3)),
        ((nn.Conv1d(3, C, 3), nn.BatchNorm1d(C), nn.ReLU(), nn.Conv1d(C, 2, 1)), (2, 3, 8)),
        ((nn.Conv3d(3, C, 1), nn.BatchNorm3d(C), nn.ReLU(), nn.Conv3d(C, 2, 1)), (2, 3, 2, 4, 4)),
        ((nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)), (2, 3, 8, 8)),
        ((nn.BatchNorm2d(3),), (2, 3, 8, 8)),
    ],
    ids=["linear", "1d", "3d", "first_layer", "alone"],
)
def test_dimensions(layers, shape) -> None:
    torch.manual_seed(0)
    model = spread(nn.Sequential(*layers))
    rows = rewrites_of(trains_alike_by(copy.deepcopy(model), image(*shape), evaluating=False))
    assert set(rows.values()) == {"split_bn" if len(layers) > 1 else "fuse_norm_act"}
    assert_trains_alike(model, image(*shape, requires_grad=True))


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_norm_in_a_subclass_of_sequential() -> None:
    model = spread(OwnSequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(C, 2)))
    assert rewrites_of(trains_alike_by(model, image(), evaluating=False)) == {"1": "split_bn"}


# --- what stands around a norm --------------------------------------------------------------------


def broadcast_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + h.mean((2, 3), keepdim=True)))


def broadcast_norm(m, x, h):
    return m.last(F.relu(m.bn(h.mean((2, 3), keepdim=True)) + h))


def residual_number(m, x, h):
    return m.last(F.relu(m.bn(h) + 0.5))


def residual_parameter(m, x, h):
    return m.last(F.relu(m.bn(h) + m.last.weight.mean()))


def scaled_residual(m, x, h):
    return m.last(F.relu(torch.add(m.bn(h), h, alpha=0.3)))


def narrow_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + h.float()).double())


def doubled(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y + y))


def doubled_activation(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z + z)


def norms_on_both_sides(m, x, h):
    return m.last(F.relu(m.bn(h) + m.bn2(m.conv2(x))))


def norms_on_both_sides_in_place(m, x, h):
    z = m.bn(h)
    z += m.bn2(m.conv2(x))
    return m.last(F.relu_(z))


def norm_of_the_input_as_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + m.bn2(h)))


def norm_used_twice(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y)) * y.mean()


def norm_returned(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y)), y


def activation_returned(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z), z, [z]


def norm_of_norm(m, x, h):
    return m.last(F.relu(m.bn2(m.bn(h))))


def activation_of_activation(m, x, h):
    return m.last(F.silu(F.relu(m.bn(h))))


def views(m, x, h):
    z = F.relu(m.bn(h))
    first, second = z.chunk(2, 1)
    z = torch.cat([second, first, z[:, :1], z[:, 1:]], 1)
    z = z.permute(0, 2, 3, 1).reshape(-1, 8).t().reshape(8, 2, 8, 8).transpose(0, 1)
    return m.last(z[:, 2:6])


def matrix_products(m, x, h):
    z = F.gelu(m.bn(h)).flatten(2)
    return m.last((z @ z.mT @ z).view_as(h)), z.bmm(z.transpose(1, 2))


def einsum_and_attention(m, x, h):
    z = F.relu(m.bn(h)).flatten(2).mT
    return F.scaled_dot_product_attention(z, z, z), torch.einsum("bij,bij->b", z, z)


def gate(m, x, h):
    z = F.silu(m.bn(h))
    return m.last(z * torch.sigmoid(z.mean((2, 3), keepdim=True)))


def pools(m, x, h):
    z = F.relu(m.bn(h))
    parts = [F.max_pool2d(z, 3, 1, 1), F.avg_pool2d(z, 3, 1, 1), F.max_pool2d(F.interpolate(z, scale_factor=2), 2)]
    return m.last(sum(parts)), F.max_pool2d(z, 2, return_indices=True)


def pads_and_shuffles(m, x, h):
    z = F.pad(F.relu(m.bn(h)), (1, 0, 0, 1))
    return m.last(F.pixel_shuffle(z, 1)), F.unfold(z, 2)


def where_and_masks(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(torch.where(h > 0, z, z * 2).masked_fill(h > 1, 0.5)), z.clamp(max=1), z.pow(2), z.sqrt().sum()


def detached(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z) + z.detach().mean()


def custom_function(m, x, h):
    return m.last(Cube.apply(F.relu(m.bn(h))))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * 3 * x**2  # reversed, as in adversarial training


def functional_norm(m, x, h):
    h = F.batch_norm(h, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, m.training, 0.2, 1e-3)
    return m.last(F.relu(h))


def functional_norm_of_the_batch(m, x, h):
    return m.last(F.relu(F.batch_norm(h, None, None, training=True)))


def no_consumer(m, x, h):
    m.bn(h)
    return m.last(h)


AROUND = [
    broadcast_residual,
    broadcast_norm,
    residual_number,
    residual_parameter,
    scaled_residual,
    narrow_residual,
    doubled,
    doubled_activation,
    norms_on_both_sides,
    norms_on_both_sides_in_place,
    norm_of_the_input_as_residual,
    norm_used_twice,
    norm_returned,
    activation_returned,
    norm_of_norm,
    activation_of_activation,
    views,
    matrix_products,
    einsum_and_attention,
    gate,
    pools,
    pads_and_shuffles,
    where_and_masks,
    detached,
    custom_function,
    functional_norm,
    functional_norm_of_the_batch,
    no_consumer,
]


def test_around_a_norm() -> None:
    model = Many(*(Block(after, conv2=conv(), bn2=nn.BatchNorm2d(C)) for after in AROUND))
    rows = rewrites_of(trains_alike_by(model, image(requires_grad=True)))
    found = {name: [rewrite for path, rewrite in rows.items() if path.split(".")[1] == name] for name in model.blocks}
    called = {name: [rewrite for rewrite in done if rewrite is not None] for name, done in found.items()}
    fused = {"broadcast_norm", "activation_returned", "no_consumer"}  # kept all the same, or read by nobody
    two = {"norms_on_both_sides", "norms_on_both_sides_in_place", "norm_of_the_input_as_residual", "norm_of_norm"}
    for name, done in called.items():
        expected = "fuse_norm_act" if name in fused else "split_bn"
        assert done == [expected] * (2 if name in two else 1), name


def test_a_sum_in_place_has_the_first_dtype() -> None:
    def after(m, x, h):
        z = m.bn(h)
        z += h.double()
        return F.relu_(z)

    model = Block(after).float()
    optimized = normpass.optimize(model)
    expected, found = model(image().float()), optimized(image().float())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
