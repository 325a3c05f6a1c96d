"""Norms with a sample's own statistics and the activation behind them, through autograd: ours beside eager.

Somebody reads the result in backward. Eager keeps it; ours is made again, as training does by default, or kept, as
a plan may have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.bench.layers import ReadInBackward, train_step
from normpass.measure import Ratio, ratios
from normpass.measure.timing import alternate
from normpass.recipe.notes import recording
from normpass.runtime.sample_norms import (
    FunctionalGroupNorm,
    FunctionalRowNorm,
    fused_sample_norm_act,
    split_sample_norm_act,
)

Shape = tuple[int, ...]
_COPIES = 3
"""of the arguments, in turns, so that they do not come out of the caches"""

CASES: dict[str, tuple[Shape, ...]] = {
    "GroupNorm, SiLU": ((2, 320, 32, 32), (8, 128, 64, 64), (2, 640, 16, 16), (16, 512, 8, 8), (4, 64, 128, 128)),
    "InstanceNorm, LeakyReLU": (
        (4, 64, 64, 64),
        (16, 256, 16, 16),
        (2, 32, 128, 128),
        (16, 256, 8, 8),
        (1, 64, 256, 256),
    ),
    "InstanceNorm3d, LeakyReLU": (
        (1, 32, 64, 64, 64),
        (2, 64, 32, 32, 32),
        (2, 128, 16, 16, 16),
        (2, 256, 8, 8, 8),
        (2, 320, 4, 4, 4),
    ),
    "LayerNorm, GELU": ((8, 56, 56, 96), (8, 28, 28, 192), (8, 14, 14, 384), (8, 7, 7, 768), (64, 64, 768)),
}
"""norm and activation: shapes of x, as diffusion networks, style transfer, nnU-Net and ConvNeXt have them"""


@dataclass(frozen=True)
class SampleNormRow:
    """One norm with its activation, forward and backward, float32."""

    layer: str
    shape: Shape
    layout: str
    seconds: float
    eager_seconds: float
    """medians over the rounds"""
    ratio: Ratio
    """ours over eager's, round by round: median and quartiles"""
    kept_ratio: Ratio
    """the same where the result is kept"""


def bench_sample_norm(layer: str, shape: Shape, layout: str, rounds: int) -> SampleNormRow:
    """One of `CASES`.

    Args:
        layout: of x and the gradient, "channels_last" or "contiguous"; of layer norm's "contiguous".
        rounds: samples of each.
    """
    torch.manual_seed(0)
    norm, plain, called = _layer(layer, shape)
    pairs = [(_laid_out(torch.randn(shape), layout), _laid_out(torch.randn(shape), layout)) for _ in range(_COPIES)]
    activation, args = _ACTIVATIONS[layer.partition(", ")[2]]

    def ours(x: Tensor) -> Tensor:
        with recording():
            z: Tensor = ReadInBackward.apply(split_sample_norm_act(called, x, None, activation, args))
        return z

    functions = {
        "ours": ours,
        "kept": lambda x: ReadInBackward.apply(fused_sample_norm_act(called, x, None, activation, args)),
        "eager": lambda x: ReadInBackward.apply(plain(x)),
    }
    steps = {name: partial(train_step, run, list(norm.parameters()), pairs) for name, run in functions.items()}
    times = {name: taken[-1] for name, taken in alternate(steps, torch.device("cpu"), rounds).items()}
    medians = times["ours"].median, times["eager"].median
    compared = ratios(times, "eager")
    return SampleNormRow(layer, shape, layout, *medians, compared["ours"], compared["kept"])


_ACTIVATIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "SiLU": ("silu", ()),
    "LeakyReLU": ("leaky_relu", (0.01,)),
    "GELU": ("gelu", ()),
}


def _layer(name: str, shape: Shape) -> tuple[nn.Module, Callable[[Tensor], Tensor], Any]:
    """The norm's module, the plain layers, and the norm as a rewritten graph calls it."""
    channels = shape[1]
    if name.startswith("GroupNorm"):
        group = nn.GroupNorm(32, channels)
        return group, lambda x: F.silu(group(x)), FunctionalGroupNorm(32, group.weight, group.bias, group.eps)
    if name.startswith("LayerNorm"):
        layer = nn.LayerNorm(shape[-1])
        called = FunctionalRowNorm((shape[-1],), layer.weight, layer.bias, layer.eps)
        return layer, lambda x: F.gelu(layer(x)), called
    instance = (nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm3d)(channels, affine=True)
    called_instance = FunctionalGroupNorm(None, instance.weight, instance.bias, instance.eps)
    return instance, lambda x: F.leaky_relu_(instance(x)), called_instance


def _laid_out(x: Tensor, layout: str) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x if layout == "contiguous" or last is None else x.contiguous(memory_format=last)
