"""The convolutions that have kernels of ours on the CPU, each pass beside the vendor's, alternating."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normpass import ops
from normpass.bench.layers import LAYOUTS, train_step
from normpass.kernels import disabled, kernels_for
from normpass.measure import Ratio, ratios
from normpass.measure.timing import Clock, Step, alternate
from normpass.ops.depthwise_conv2d import input_gradient_on
from normpass.runtime.convolution import norm_act_convolution
from normpass.runtime.functional import FunctionalBatchNorm, split_norm_act

THREE, DEPTHWISE, FIVE, NORM = "3x3", "depthwise 3x3", "depthwise 5x5", "norm, SiLU, depthwise 3x3"
CASES: tuple[tuple[str, tuple[int, int, int, int], int], ...] = (
    (THREE, (16, 64, 56, 56), 64),
    (THREE, (16, 128, 28, 28), 128),
    (THREE, (16, 256, 14, 14), 256),
    (THREE, (16, 512, 7, 7), 512),
    (THREE, (16, 128, 56, 56), 32),
    (THREE, (16, 128, 14, 14), 32),
    (THREE, (2, 64, 56, 56), 64),
    (THREE, (2, 256, 14, 14), 256),
    (DEPTHWISE, (16, 144, 56, 56), 144),
    (DEPTHWISE, (16, 384, 14, 14), 384),
    (FIVE, (16, 64, 56, 56), 64),
    (FIVE, (16, 256, 56, 56), 256),
    (FIVE, (16, 1024, 14, 14), 1024),
    (NORM, (16, 144, 56, 56), 144),
    (NORM, (16, 384, 14, 14), 384),
)
"""What is convolved, shape of x, channels of the result: of ResNet-50, DenseNet-121, MobileNetV2, EfficientNet-B0"""
Pass = Callable[[Tensor, Tensor], object]
"""of x and the gradient of the result"""
_COPIES = 3
"""of the arguments, in turns, so that they do not come out of the caches"""


@dataclass(frozen=True)
class ConvolutionRow:
    """One pass of one convolution, stride 1 and the size kept, float32."""

    convolution: str
    shape: tuple[int, ...]
    channels: int
    """of the result"""
    layout: str
    computes: str
    """`y`, `dx`, `dweight`, or `gradients`: all of them and those of the norm"""
    seconds: float
    vendor_seconds: float
    """medians over the rounds"""
    ratio: Ratio
    """ours over the vendor's, round by round: median and quartiles"""


def bench_convolution(
    convolution: str, shape: tuple[int, int, int, int], channels: int, layout: str, rounds: int
) -> list[ConvolutionRow]:
    """Every pass that has a kernel; where that does not pay, ours is the vendor's too.

    Args:
        convolution: `THREE`, `DEPTHWISE`, `FIVE` or `NORM`, of which the vendor's are the layers one after another.
        shape, channels: (N, C, H, W) of x, and the channels of the result.
        layout: of x and the gradient, "channels_last" or "contiguous".
        rounds: samples of each.
    """
    torch.manual_seed(0)
    make = partial(torch.Tensor.contiguous, memory_format=LAYOUTS[layout])
    results = (shape[0], channels, *shape[2:])
    pairs = [(make(torch.randn(shape)), make(torch.randn(results))) for _ in range(_COPIES)]
    size, inner = (5 if convolution == FIVE else 3), (shape[1] if convolution == THREE else 1)
    weight = make(torch.randn(channels, inner, size, size)) / (size * inner**0.5)
    if convolution == NORM:
        names, steps = ["y", "gradients"], _layer_steps(weight, pairs)
        found = alternate(steps, torch.device("cpu"), rounds)
        times = [{who: taken[index] for who, taken in found.items()} for index in range(len(names))]
    else:
        names, times = [], []
        for name, run in _passes(convolution, weight).items():
            steps = {who: partial(_step, run, pairs, who == "vendor") for who in ("ours", "vendor")}
            with torch.no_grad():
                taken = alternate(steps, torch.device("cpu"), rounds)
            names.append(name)
            times.append({who: phases[-1] for who, phases in taken.items()})
    rows = []
    for name, of in zip(names, times, strict=True):
        seconds = of["ours"].median, of["vendor"].median
        ratio = ratios(of, "vendor")["ours"]
        rows.append(ConvolutionRow(convolution, shape, channels, layout, name, *seconds, ratio))
    return rows


def _passes(convolution: str, weight: Tensor) -> dict[str, Pass]:
    if convolution in (DEPTHWISE, FIVE):
        size, border = weight.shape[2:], tuple(n // 2 for n in weight.shape[2:])
        return {
            "dx": lambda x, grad: input_gradient_on(kernels_for("cpu"), grad, x, weight, (1, 1), border),
            "dweight": lambda x, grad: ops.depthwise_weight_gradient(grad, x, size, (1, 1), border),
        }
    return {
        "y": lambda x, grad: ops.winograd_conv2d(x, weight, None, (1, 1)),
        "dx": lambda x, grad: ops.winograd_conv2d(grad, weight, None, (1, 1), transposed=True),
        "dweight": lambda x, grad: ops.winograd_weight_gradient(grad, x, (1, 1)),
    }


def _step(
    run: Callable[[Tensor, Tensor], object],
    pairs: list[tuple[Tensor, Tensor]],
    of_vendor: bool,
    turn: int,
    clock: Clock,
) -> None:
    x, grad = pairs[turn % len(pairs)]
    with disabled() if of_vendor else nullcontext():
        clock.lap()
        run(x, grad)
        clock.lap()


def _layer_steps(weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Step]:
    """Forward and backward of a norm, SiLU and the convolution with `weight`: as one, and layer by layer."""
    channels = len(weight)
    norm, activation = nn.BatchNorm2d(channels), nn.SiLU(inplace=True)
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)

    parameters = [*norm.parameters(), *layer.parameters()]

    def ours(x: Tensor) -> Tensor:
        options = layer.stride, layer.padding, layer.dilation, layer.groups
        called = FunctionalBatchNorm.of(norm)
        return norm_act_convolution(split_norm_act, called, x, "silu", (), layer.weight, None, *options)

    return {
        "ours": partial(train_step, ours, parameters, pairs),
        "vendor": partial(train_step, lambda x: layer(activation(norm(x))), parameters, pairs),
    }
