"""An estimate of a tensor's statistics, and how it passes the layers between two norms.

An estimate is a mean and a variance for every channel, of each micro-batch: two tensors (micro-batches, C). A layer
that is passed predicts those of its result:

    activation    closed form: moments of act(N(mean, var));  sampled: of a draw from it
    conv, linear  closed form: Σ W·mean + bias and Σ W²·var, the values independent, no border;
                  sampled: the moments of the layer's result on a draw (arXiv 1802.03133, the authors' code)
    sum           means add, variances add
    concatenation estimates are concatenated
    pooling       as it is

Gradients flow through all of it. None stands for no estimate, and whatever reads none gives none: so in eval mode
nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.nn.gaussian import SMALLEST_VARIANCE, activated_moments
from normpass.ops import activate, instance_moments, merged_moments


class Estimate(NamedTuple):
    """Mean and variance, each (micro-batches, C), float32 or float64. A plain tuple of the two does as well."""

    mean: Tensor
    var: Tensor


FEWEST_POSITIONS = 64
"""A draw has at least so many positions, though the map may have fewer."""

_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""By how many positions a weight reaches over."""


def activated(estimate: Estimate | None, name: str, args: Sequence[float], sampled: bool = False) -> Estimate | None:
    """The estimate behind an activation of `normpass.ops.Activation`."""
    if estimate is None:
        return None
    if sampled:
        mean, var = instance_moments(activate(_drawn(estimate, (FEWEST_POSITIONS,)), name, args))
        return Estimate(mean, var)
    mean, var = estimate
    new_mean, new_var = activated_moments(mean, var, name, args)
    return Estimate(new_mean.to(mean.dtype), new_var.to(var.dtype))


def through_norm(estimate: Estimate | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Estimate | None:
    """The estimate behind a norm that normalizes with it: mean bias, variance weight²·var/(var + eps)."""
    if estimate is None:
        return None
    mean, var = estimate
    var = var / (var + eps)
    if weight is not None:
        var = weight.to(var.dtype).square() * var
    return Estimate(torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean), var)


def predicted(estimate: Estimate | None, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Estimate | None:
    """The estimate behind a convolution or linear layer, in closed form. weight: (C', C/groups, *)."""
    if estimate is None:
        return None
    mean, var = estimate
    dtype = mean.dtype
    with torch.autocast(mean.device.type, enabled=False):
        weight = weight.to(dtype)
        taps = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(-1)
        bias = None if bias is None else bias.to(dtype)
        mean = F.conv1d(mean.unsqueeze(-1), taps.sum(2, keepdim=True), bias, groups=groups)
        var = F.conv1d(var.unsqueeze(-1), taps.square().sum(2, keepdim=True), groups=groups)
    return Estimate(mean.squeeze(-1), var.squeeze(-1))


def predicted_by_sample(
    estimate: Estimate | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    name: str = "identity",
    args: Sequence[float] = (),
) -> Estimate | None:
    """The estimate behind an activation and a convolution or linear layer, from one draw of the size of `x`.

    Of `x`, the layer's input, only the shape is read. Where the layer pads, the draw is larger instead.
    """
    if estimate is None:
        return None
    estimate = Estimate(*estimate)
    dtype = estimate.mean.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(estimate.mean.device.type, enabled=False):
        if weight.dim() == 2:
            draw = activate(_drawn(estimate, (FEWEST_POSITIONS,)), name, args).transpose(1, 2)
            result = F.linear(draw, weight, bias).transpose(1, 2)
        else:
            draw = activate(_drawn_for(estimate, x, weight, stride, dilation), name, args)
            convolve: Any = _LAYERS[weight.dim() - 2]
            result = convolve(draw, weight, bias, stride, 0, dilation, groups)
    count = estimate.mean.shape[0]
    mean, var = instance_moments(result)
    mean, var = (v.unflatten(0, (count, -1)) for v in (mean, var))  # several draws of each micro-batch
    mean, var = merged_moments(mean, var, 1)
    return Estimate(mean.squeeze(1), var.squeeze(1))


def _drawn_for(
    estimate: Estimate, x: Tensor, weight: Tensor, stride: int | Sequence[int], dilation: int | Sequence[int]
) -> Tensor:
    """What a convolution of `x` is to read, as often as it takes to have enough results."""
    positions = x.shape[2:]
    strides, dilations = (_for_each(v, len(positions)) for v in (stride, dilation))
    sizes = [
        size + (kernel - 1) * apart for size, kernel, apart in zip(positions, weight.shape[2:], dilations, strict=True)
    ]
    results = math.prod(-(-size // step) for size, step in zip(positions, strides, strict=True))
    draws = -(-FEWEST_POSITIONS // results)
    return _drawn(Estimate(*(v.repeat_interleave(draws, 0) for v in estimate)), sizes)


def _for_each(value: int | Sequence[int], count: int) -> Sequence[int]:
    """As functions of torch read it: one number stands for every dimension."""
    values = (value,) if isinstance(value, int) else value
    return values if len(values) == count else (values[0],) * count


def _drawn(estimate: Estimate, sizes: Sequence[int]) -> Tensor:
    """Values from N(mean, var), (micro-batches, C, *sizes)."""
    mean, var = estimate
    shape = (*mean.shape, *[1] * len(sizes))
    noise = torch.randn(*mean.shape, *sizes, dtype=mean.dtype, device=mean.device)
    sigma = var.clamp(min=SMALLEST_VARIANCE).sqrt()
    return mean.reshape(shape) + sigma.reshape(shape) * noise


def summed(*estimates: Estimate | None) -> Estimate | None:
    """The estimate of a sum of independent values."""
    known = [e for e in estimates if e is not None]
    if len(known) < len(estimates):
        return None
    mean, var = known[0]
    for other_mean, other_var in known[1:]:
        mean, var = mean + other_mean, var + other_var
    return Estimate(mean, var)


def concatenated(*estimates: Estimate | None) -> Estimate | None:
    """The estimate of a concatenation of channels."""
    known = [e for e in estimates if e is not None]
    if len(known) < len(estimates):
        return None
    means, variances = zip(*known, strict=True)
    return Estimate(torch.cat(means, 1), torch.cat(variances, 1))


def padded(estimate: Estimate | None, before: int, after: int) -> Estimate | None:
    """The estimate where channels of zeros are added."""
    return None if estimate is None else Estimate(*(F.pad(v, (before, after)) for v in estimate))


def batch_estimate(x: Tensor, micro_batches: int) -> Estimate:
    """The moments of every micro-batch of `x`: equal parts, in order, of its samples.

    Raises:
        ValueError: the samples do not divide into that many parts.
    """
    if micro_batches == 1:
        mean, var = torch.ops.normpass.moments.default(x)
        return Estimate(mean.unsqueeze(0), var.unsqueeze(0))
    if x.shape[0] % micro_batches:
        raise ValueError(
            f"a batch of {x.shape[0]} does not divide into `micro_batches={micro_batches}`: "
            "give a batch size that is a multiple of it, or drop the last, smaller batch"
        )
    mean, var = instance_moments(x)
    mean, var = (v.unflatten(0, (micro_batches, -1)) for v in (mean, var))
    mean, var = merged_moments(mean, var, 1)
    return Estimate(mean.squeeze(1), var.squeeze(1))


__all__ = [
    "Estimate",
    "activated",
    "batch_estimate",
    "concatenated",
    "padded",
    "predicted",
    "predicted_by_sample",
    "summed",
    "through_norm",
]
