"""Norms of every kind, used once and more often: the plain model's numbers, and what was done to each."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, C, Many, chain, conv, rewrites_of, small, trains_alike_by
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from training import assert_equal, assert_trains_alike, image, rewrites, spread, train

import normpass
from normpass import kernels

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
PER_SAMPLE = ("group", "instance", "layer")


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "reference"])
def test_norms_of_every_class(by_kernels: bool) -> None:
    """What runs is what counts: subclasses, hooks and parametrisations are in the graph."""
    if by_kernels and kernels.kernels_for("cpu") is None:
        pytest.skip("there are no kernels")
    model = chain({name: make() for name, make in NORMS.items()})
    with contextlib.nullcontext() if by_kernels else kernels.disabled():
        rows = trains_alike_by(model, image(requires_grad=True))
    assert {path.split(".")[0] for path in rows} == set(NORMS)
    without = "rebuild_values", "rebuilt, not fused: there is no kernel for it on `cpu`"
    of_samples = ("split_norm", "") if by_kernels else without
    for path, row in rows.items():
        expected = of_samples if path.split(".")[0] in PER_SAMPLE else ("split_bn", "")
        assert (row.rewrite, row.reason) == expected, path


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


# --- norms of every kind --------------------------------------------------------------------------

KINDS = {
    "no_statistics": {"track_running_stats": False},
    "no_affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
    "no_momentum": {"momentum": 0.0},
    "all_momentum": {"momentum": 1.0},
    "large_eps": {"eps": 10.0},
}


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
