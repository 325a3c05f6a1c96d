"""What an optimized model returns lies in memory as what the plain model returns, along dimensions of one value too.

`view` raises, a dropout draws another mask and a convolution behind it takes another layout where it does not. ATen
decides by the strides of what it is given: see `normpass.ops.layout`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.optimized import with_recipes
from normpass.pipeline import Request, note_recipes, rewrite
from normpass.runtime.convolution import convolution_function, norm_act_convolution
from normpass.runtime.functional import FunctionalBatchNorm, inplace_abn, split_norm_act
from normpass.runtime.sharing import producer_statistics, shared_norm_act

CHANNELS = 4
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SPATIAL: dict[int, tuple[int, ...]] = {2: (), 3: (6,), 4: (6, 5), 5: (4, 3, 5)}
DIMS = tuple(SPATIAL)


def bases(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """A tensor of `shape` in each layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yield "contiguous", x
    if x.dim() in LAST:
        yield "channels_last", x.to(memory_format=LAST[x.dim()])
    if x.dim() == 3:
        yield "rows of channels", x.transpose(1, 2).contiguous().transpose(1, 2)


def parts(n: int, c: int, spatial: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """(n, c, *spatial) in every layout, and as a part or a view of something larger."""
    inside = tuple(slice(1, size + 1) for size in spatial)
    steps = tuple(slice(0, None, 2) for _ in spatial)
    ways = {
        "": ((n, c, *spatial), lambda x: x),
        "chunk of": ((n, 2 * c, *spatial), lambda x: x.chunk(2, 1)[1]),
        "every second channel of": ((n, 2 * c, *spatial), lambda x: x[:, ::2]),
        "every second sample of": ((2 * n, c, *spatial), lambda x: x[::2]),
        "one channel of": ((n, 1, *spatial), lambda x: x.expand(n, c, *spatial)),
        "one sample of": ((1, c, *spatial), lambda x: x.expand(n, c, *spatial)),
        "samples and channels swapped in": ((c, n, *spatial), lambda x: x.transpose(0, 1)),
    }
    if spatial:
        twice = (n, c, *(2 * size for size in spatial))
        ways["an inner part of"] = (twice, lambda x: x[(slice(None), slice(None), *inside)])
        ways["every second place of"] = (twice, lambda x: x[(slice(None), slice(None), *steps)])
    if len(spatial) > 1:
        swapped = (n, c, *spatial[:-2], spatial[-1], spatial[-2])
        ways["rows and columns swapped in"] = (swapped, lambda x: x.transpose(-1, -2))
        rows_first = (*spatial, c)
        ways["a new dimension of"] = (rows_first, lambda x: x.movedim(-1, 0).unsqueeze(0).expand(n, c, *spatial))
    for way, (shape, take) in ways.items():
        for layout, x in bases(*shape):
            yield f"{way} {layout}", take(x)


@cache
def inputs(dims: int) -> tuple[tuple[str, Tensor], ...]:
    """What is compared: every part in every size that has ones in it."""
    spatial = SPATIAL[dims]
    sizes = {"": (3, CHANNELS, spatial), "one sample": (1, CHANNELS, spatial), "empty": (0, CHANNELS, spatial)}
    if spatial:
        sizes["1×1"] = (3, CHANNELS, (1,) * len(spatial))
        sizes["one column"] = (3, CHANNELS, (*spatial[:-1], 1))
        sizes["one row"] = (3, CHANNELS, (1, *spatial[1:]))
    return tuple((f"{name} {part}", x) for name, size in sizes.items() for part, x in parts(*size))


@cache
def with_one_channel(dims: int) -> tuple[tuple[str, Tensor], ...]:
    return tuple((f"one channel, {n} {part}", x) for n in (1, 3) for part, x in parts(n, 1, SPATIAL[dims]))


def norm_of(channels: int, training: bool) -> FunctionalBatchNorm:
    values = [torch.linspace(0.5, 1.5, channels, dtype=torch.float64) for _ in range(4)]
    return FunctionalBatchNorm(*values, training)


def plain_of(norm: FunctionalBatchNorm, *xs: Tensor) -> Tensor | None:
    """The norm itself; None where it raises, for one value a channel."""
    try:
        return norm(torch.cat(xs, 1) if len(xs) > 1 else xs[0])
    except ValueError:
        return None


def assert_same(found: Tensor, plain: Tensor, what: Any) -> None:
    assert (found.shape, found.dtype, found.stride()) == (plain.shape, plain.dtype, plain.stride()), what
    if plain.numel():
        assert (found - plain).detach().abs().max() <= 1e-12 * max(1.0, float(plain.detach().abs().max())), what


# --- the functions that a rewritten graph calls -----------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
def test_norm_and_activation(dims: int) -> None:
    for (name, x), training in itertools.product((*inputs(dims), *with_one_channel(dims)), (True, False)):
        norm = norm_of(x.shape[1], training)
        y = plain_of(norm, x)
        if y is not None:
            assert_same(split_norm_act(norm, x), y, name)
            assert_same(split_norm_act(norm, x, None, "silu"), F.silu(y), name)
            assert_same(inplace_abn(norm, x, "elu", (1.0,)), F.elu(y), name)


@pytest.mark.parametrize("dims", DIMS)
def test_norm_residual_and_activation(dims: int) -> None:
    """Of every input with some others of its shape, the sum written into each of the two terms or into neither."""
    every = (*inputs(dims), *with_one_channel(dims))
    for index, (name, x) in enumerate(every):
        residuals = [(n, r) for n, r in every[index % 3 :: 3] if r.shape == x.shape]
        norm = norm_of(x.shape[1], index % 2 == 0)
        y = plain_of(norm, x)
        for other, r in residuals if y is not None else ():
            what = f"{name} + {other}"
            assert_same(split_norm_act(norm, x, r, "relu"), torch.relu(y + r), what)
            assert_same(split_norm_act(norm, x, r, sum_into="residual +"), r + y, what)
            assert_same(split_norm_act(norm, x, r, "relu", (), "norm"), torch.relu(norm(x).add_(r)), what)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_concatenation_norm_and_activation(dims: int, needs_gradient: bool) -> None:
    every = (*inputs(dims), *with_one_channel(dims))
    for index, (name, x) in enumerate(every):
        others = [(n, r) for n, r in every[index % 5 :: 5] if r.shape == x.shape]
        for other, z in others:
            norm = norm_of(2 * x.shape[1], index % 2 == 0)
            y = plain_of(norm, x, z)
            xs = [t.detach().requires_grad_(needs_gradient) for t in (x, z)]
            if y is not None:
                producers = [producer_statistics(t, norm.training) for t in xs]
                found = shared_norm_act(norm, "relu", (), *producers)
                assert_same(found, torch.relu(y), f"{name}, {other}")


# input channels, output channels, groups, size: those for which there are kernels, and where both layouts are one
CONVOLUTIONS = [(64, 64, 1, (28, 28)), (64, 64, 64, (14, 14)), (64, 64, 64, (1, 1)), (1, 64, 1, (28, 28))]


@pytest.mark.parametrize("channels, outputs, groups, size", CONVOLUTIONS)
def test_convolutions(channels: int, outputs: int, groups: int, size: tuple[int, int]) -> None:
    """By the layout of the weight as well."""
    weights = [w for _, w in bases(outputs, channels // groups, 3, 3)]
    for (name, x), weight, training in itertools.product(parts(2, channels, size), weights, (True, False)):
        x, weight = (t.float().requires_grad_() for t in (x, weight))
        norm = norm_of(channels, training)
        steps = 1, 1, 1, groups
        expected = F.conv2d(x, weight, None, *steps)
        assert convolution_function(x, weight, None, *steps).stride() == expected.stride(), name
        joined = norm_act_convolution(split_norm_act, norm, x.double(), "relu", (), weight.double(), None, *steps)
        expected = F.conv2d(torch.relu(norm(x.double())), weight.double(), None, *steps)
        assert_same(joined, expected, name)


# --- whole models -----------------------------------------------------------------------------------


class Kind(nn.Module):
    """One arrangement around a norm, for images of any number of dimensions."""

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
        self.norm, self.second = norm(CHANNELS), norm(CHANNELS)
        self.wide = norm(2 * CHANNELS)
        conv = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[dims]
        size = () if dims == 2 else (1,)
        self.conv = conv(CHANNELS, CHANNELS, *size)
        if dims > 2:
            self.depthwise = conv(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return getattr(self, self.kind)(x)

    def norm_act(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def norm_act_in_place(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x), inplace=True)

    def residual(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(x))

    def residual_in_place(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y += x
        return F.relu(y, inplace=True)

    def two_norms(self, x: Tensor) -> Tensor:
        y = self.second(x.flip(0))
        y += self.norm(x)
        return y

    def concatenation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([x, self.norm(x)], 1)
        return F.relu(self.wide(whole)), F.gelu(self.norm(x))

    def convolution(self, x: Tensor) -> Tensor:
        return F.hardswish(self.norm(self.conv(x)))

    def chunks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.wide(torch.cat([x, x], 1)).chunk(2, 1)
        return F.relu(self.norm(a) + b), F.relu(self.second(b)).sin_()

    def convolutions_behind(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.depthwise(F.silu(self.norm(x))), self.conv(F.silu(self.second(x)))

    def pools(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.norm(x))
        pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[self.dims]
        mean = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[self.dims]
        return pool(y, 1), self.second(mean(y, 2))

    def written_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.wide(torch.cat([x, x], 1))[:, ::2]
        y.mul_(y.detach() + 1).sin_()
        return y.exp(), F.dropout(self.norm(y), 0.5, self.training)


KINDS = [name for name in vars(Kind) if not name.startswith("_") and name not in ("forward", "norm")]
NEEDS_MAPS = {"convolutions_behind", "pools"}


def captured(model: nn.Module, x: Tensor) -> tuple[Any, list[Any]]:
    """Dynamo's graph of a forward, and its inputs."""
    found: list[Any] = []

    def backend(graph_module: Any, given: list) -> Any:
        found.extend((copy.deepcopy(graph_module), list(given)))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x)
    return found[0], found[1]


def run_rewritten(graph_module: Any, given: list) -> Any:
    """What the graph returns once it is rewritten for these inputs."""
    rewritten = rewrite(copy.deepcopy(graph_module), given, Request())
    note_recipes(rewritten, Request())
    torch.manual_seed(0)
    return with_recipes(rewritten.runs)(*given)


@pytest.mark.parametrize("kind", KINDS)
def test_models(kind: str) -> None:
    """Every kind with inputs of every number of dimensions, other ones in train and in eval mode."""
    runs = {(4, True): 9, (4, False): 13, (3, True): 29, (5, False): 29, (2, True): 29}
    for (dims, training), every in runs.items():
        if dims == 2 and kind in NEEDS_MAPS:
            continue
        compare(Kind(kind, dims).double().train(training), inputs(dims)[0 if training else every // 2 :: every])


def compare(model: nn.Module, samples: tuple[tuple[str, Tensor], ...]) -> None:
    first = samples[0][1]
    graph_module, given = captured(model, first)
    position = next(i for i, t in enumerate(given) if t is first)
    for name, x in samples:
        torch.manual_seed(0)
        try:
            plain = model(x)
        except (ValueError, RuntimeError):  # one value a channel, an empty batch
            continue
        found = run_rewritten(graph_module, [*given[:position], x, *given[position + 1 :]])
        for a, b in zip(found, plain if isinstance(plain, tuple) else (plain,), strict=True):
            assert_same(a, b, f"{model} {name} {tuple(x.shape)} {x.stride()}")
