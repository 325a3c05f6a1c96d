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
from torch import Tensor, nn

from normpass.nn.gaussian import SMALLEST_VARIANCE, activated_moments
from normpass.ops import activate, instance_moments, merged_moments


class Estimate(NamedTuple):
    """Mean and variance, each (micro-batches, C), float32 or float64."""

    mean: Tensor
    var: Tensor


FEWEST_POSITIONS = 64
"""A draw has at least so many positions, though the map may have fewer."""

_CONVOLUTIONS: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def activated(estimate: Estimate | None, name: str, args: Sequence[float], sampled: bool = False) -> Estimate | None:
    """The estimate behind an activation of `normpass.ops.Activation`."""
    if estimate is None:
        return None
    if sampled:
        mean, var = instance_moments(activate(_drawn(estimate, (FEWEST_POSITIONS,)), name, args))
        return Estimate(mean, var)
    mean, var = activated_moments(*estimate, name, args)
    return Estimate(mean.to(estimate.mean.dtype), var.to(estimate.var.dtype))


def through_norm(norm: Any, estimate: Estimate | None) -> Estimate | None:
    """The estimate behind a norm that normalises with it: mean bias, variance weight²·var/(var + eps)."""
    if estimate is None:
        return None
    mean, var = estimate
    var = var / (var + norm.eps)
    if norm.weight is None:
        return Estimate(torch.zeros_like(mean), var)
    weight, bias = (v.to(mean.dtype) for v in (norm.weight, norm.bias))
    return Estimate(bias.expand_as(mean), weight.square() * var)


def predicted(layer: Any, estimate: Estimate | None) -> Estimate | None:
    """The estimate behind a convolution or linear layer, in closed form."""
    if estimate is None:
        return None
    dtype = estimate.mean.dtype
    with torch.autocast(estimate.mean.device.type, enabled=False):
        weight = layer.weight.to(dtype)
        taps = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(-1)
        groups = getattr(layer, "groups", 1)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        mean = F.conv1d(estimate.mean.unsqueeze(-1), taps.sum(2, keepdim=True), bias, groups=groups)
        var = F.conv1d(estimate.var.unsqueeze(-1), taps.square().sum(2, keepdim=True), groups=groups)
    return Estimate(mean.squeeze(-1), var.squeeze(-1))


def predicted_by_sample(
    layer: Any, estimate: Estimate | None, x: Tensor, name: str = "identity", args: Sequence[float] = ()
) -> Estimate | None:
    """The estimate behind an activation and a convolution or linear layer, from one draw of the size of `x`.

    Of `x`, the layer's input, only the shape is read. Where the layer pads, the draw is larger instead.
    """
    if estimate is None:
        return None
    with torch.autocast(estimate.mean.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            draw = activate(_drawn(estimate, (FEWEST_POSITIONS,)), name, args).transpose(1, 2)
            bias = None if layer.bias is None else layer.bias.to(draw.dtype)
            result = F.linear(draw, layer.weight.to(draw.dtype), bias).transpose(1, 2)
        else:
            result = _convolved(layer, estimate, x, name, args)
    count = estimate.mean.shape[0]
    mean, var = instance_moments(result)
    mean, var = (v.unflatten(0, (count, -1)) for v in (mean, var))  # several draws of each micro-batch
    mean, var = merged_moments(mean, var, 1)
    return Estimate(mean.squeeze(1), var.squeeze(1))


def _convolved(layer: Any, estimate: Estimate, x: Tensor, name: str, args: Sequence[float]) -> Tensor:
    sizes = [
        size + (kernel - 1) * dilation
        for size, kernel, dilation in zip(x.shape[2:], layer.kernel_size, layer.dilation, strict=True)
    ]
    results = math.prod(-(-size // stride) for size, stride in zip(x.shape[2:], layer.stride, strict=True))
    draws = -(-FEWEST_POSITIONS // results)
    repeated = Estimate(*(v.repeat_interleave(draws, 0) for v in estimate))
    draw = activate(_drawn(repeated, sizes), name, args)
    bias = None if layer.bias is None else layer.bias.to(draw.dtype)
    convolution = next(f for kind, f in _CONVOLUTIONS.items() if isinstance(layer, kind))
    result: Tensor = convolution(draw, layer.weight.to(draw.dtype), bias, layer.stride, 0, layer.dilation, layer.groups)
    return result


def _drawn(estimate: Estimate, sizes: Sequence[int]) -> Tensor:
    """Values from N(mean, var), (micro-batches, C, *sizes)."""
    shape = (*estimate.mean.shape, *[1] * len(sizes))
    noise = torch.randn(*estimate.mean.shape, *sizes, dtype=estimate.mean.dtype, device=estimate.mean.device)
    sigma = estimate.var.clamp(min=SMALLEST_VARIANCE).sqrt()
    return estimate.mean.reshape(shape) + sigma.reshape(shape) * noise


def summed(*estimates: Estimate | None) -> Estimate | None:
    """The estimate of a sum of independent values."""
    known = [e for e in estimates if e is not None]
    if len(known) < len(estimates):
        return None
    total = known[0]
    for other in known[1:]:
        total = Estimate(total.mean + other.mean, total.var + other.var)
    return total


def concatenated(*estimates: Estimate | None) -> Estimate | None:
    """The estimate of a concatenation of channels."""
    known = [e for e in estimates if e is not None]
    if len(known) < len(estimates):
        return None
    return Estimate(torch.cat([e.mean for e in known], 1), torch.cat([e.var for e in known], 1))


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
