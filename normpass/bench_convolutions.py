"""The convolutions that have kernels of ours on the CPU, each pass beside the vendor's, alternating."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from normpass import ops
from normpass.bench_layers import LAYOUTS
from normpass.kernels import disabled
from normpass.measure import Ratio, ratios
from normpass.timing import Clock, alternate

THREE, FIVE = "3x3", "depthwise 5x5"
CASES: tuple[tuple[str, tuple[int, int, int, int], int], ...] = (
    (THREE, (16, 64, 56, 56), 64),
    (THREE, (16, 128, 28, 28), 128),
    (THREE, (16, 256, 14, 14), 256),
    (THREE, (16, 512, 7, 7), 512),
    (THREE, (16, 128, 56, 56), 32),
    (THREE, (16, 128, 14, 14), 32),
    (THREE, (2, 64, 56, 56), 64),
    (THREE, (2, 256, 14, 14), 256),
    (FIVE, (16, 64, 56, 56), 64),
    (FIVE, (16, 256, 56, 56), 256),
    (FIVE, (16, 1024, 14, 14), 1024),
)
"""What is convolved, shape of x, channels of the result: of ResNet-50, DenseNet-121, EfficientNet-B0"""
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
    """`y`, `dx` or `dweight`"""
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
        convolution: `THREE` or `FIVE`.
        shape, channels: (N, C, H, W) of x, and the channels of the result.
        layout: of x and the gradient, "channels_last" or "contiguous".
        rounds: samples of each.
    """
    torch.manual_seed(0)
    make = partial(torch.Tensor.contiguous, memory_format=LAYOUTS[layout])
    results = (shape[0], channels, *shape[2:])
    pairs = [(make(torch.randn(shape)), make(torch.randn(results))) for _ in range(_COPIES)]
    size = 3 if convolution == THREE else 5
    inner = shape[1] if convolution == THREE else 1
    weight = make(torch.randn(channels, inner, size, size)) / (size * inner**0.5)
    rows = []
    for name, run in _passes(convolution, weight).items():
        steps = {who: partial(_step, run, pairs, who == "vendor") for who in ("ours", "vendor")}
        with torch.no_grad():
            times = {who: taken[-1] for who, taken in alternate(steps, torch.device("cpu"), rounds).items()}
        ratio = ratios(times, "vendor")["ours"]
        seconds = times["ours"].median, times["vendor"].median
        rows.append(ConvolutionRow(convolution, shape, channels, layout, name, *seconds, ratio))
    return rows


def _passes(convolution: str, weight: Tensor) -> dict[str, Pass]:
    if convolution == FIVE:
        return {"dweight": lambda x, grad: ops.depthwise_weight_gradient(grad, x, (5, 5), (1, 1), (2, 2))}
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
