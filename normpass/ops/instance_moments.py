"""`normpass::instance_moments`: mean and biased variance of every channel of every sample; their merge.

For x of shape (N, C, *) with s spatial values, mean = Σx/s and var = Σ(x − mean)²/s over the spatial positions,
in two passes. The gradient, by the chain rule with Σ(x − mean) = 0:

    dx = dmean/s + dvar · 2·(x − mean)/s

Moments of a layer (all channels of a sample) or of a batch (all samples of a channel) are merged from these,
since all parts are of one size (Chan, Golub, LeVeque 1979):

    mean = average of the means        var = average of var_k + (mean_k − mean)²

which has no difference of squares to cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels
from normpass.onlookers import is_exporting

from .layout import check_input, statistics_dtype
from .library import declare


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the spatial positions of `x`.

    Args:
        x: (N, C, *), floating; without spatial dimensions every value is its own mean.

    Returns:
        `mean` and `var`, each (N, C), float64 for float64 input and float32 otherwise.

    Raises:
        ValueError: `x` is not a floating (N, C, *) tensor, or has no spatial position.
    """
    if is_exporting():
        return _reference(x)
    mean, var = _instance_moments(x)
    return mean, var


def merged_moments(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The moments of the union of equally large parts that lie along `dim`, which stays with size 1."""
    merged = mean.mean(dim, keepdim=True)
    return merged, (var + (mean - merged).square()).mean(dim, keepdim=True)


def _flat(x: Tensor) -> Tensor:
    """(N, C, positions)"""
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    wide = x.to(statistics_dtype(x))
    var, mean = torch.var_mean(_flat(wide), 2, correction=0)
    return mean, var


def _kernel(kernels: Kernels | None, x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    if kernels is None or not x.is_contiguous() or x.numel() == 0:
        return _reference(x)
    channels = x.shape[0] * x.shape[1]  # every channel of every sample as a channel of one sample
    mean, var = torch.ops.normpass.moments.default(x.view(1, channels, -1))
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def _check(x: Tensor) -> None:
    check_input("instance_moments", x)
    if 0 in x.shape[2:]:
        raise ValueError(
            f"normpass::instance_moments: `x` must have at least one spatial position, got shape {tuple(x.shape)}"
        )


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_input("instance_moments", x)
    dtype = statistics_dtype(x)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Tensor | None:
    x, mean = ctx.saved_tensors
    if grad_mean is None and grad_var is None:
        return None
    spatial = [1] * (x.dim() - 2)
    positions = x.shape[2:].numel()
    dx = torch.zeros_like(mean) if grad_mean is None else grad_mean / positions
    dx = dx.reshape(*mean.shape, *spatial)
    if grad_var is not None:
        factor = (grad_var * (2 / positions)).reshape(*mean.shape, *spatial)
        dx = dx + (x - mean.reshape(*mean.shape, *spatial)) * factor
    return dx.to(x.dtype).expand(x.shape)


_instance_moments = declare(
    "instance_moments(Tensor x) -> (Tensor mean, Tensor var)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
