"""What the norm layers of this package share with `nn.BatchNorm`: parameters, running statistics, checks.

Each layer's forward calls one function of tensors and constants, so that the layer is one node of a captured graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normpass.graph.nodes import hooks_of
from normpass.kernels.contract import Running
from normpass.onlookers import is_compiling
from normpass.ops import shift_scale
from normpass.ops.layout import statistics_dtype
from normpass.ops.running_stats import move_running_stats
from normpass.recipe.notes import is_recording, tag

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormLike(_NormBase):
    """A norm with BatchNorm's parameters and buffers, but no BatchNorm: nothing converts it to a SyncBatchNorm."""

    dims: tuple[int, ...] = ()
    """how many dimensions its input may have"""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in self.dims:
            allowed = " or ".join(f"{d}-d" for d in self.dims)
            raise ValueError(f"{type(self).__name__}: expected {allowed} input, got shape {tuple(x.shape)}")


class Buffers(NamedTuple):
    """The running statistics that a call moves or reads; None where a norm has none."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def buffers_of(norm: Any) -> Buffers:
    """Those of `norm`; none in training where they do not follow the batches."""
    if norm.training and not norm.track_running_stats:
        return Buffers(None, None, None)
    return Buffers(norm.running_mean, norm.running_var, norm.num_batches_tracked)


def uses_batch(norm: Any) -> bool:
    """Whether the statistics of a norm come from the batch, not from running averages."""
    return norm.training or norm.running_mean is None


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    """What `nn.BatchNorm` computes from the parameters, buffers and mode of `norm`."""
    return nn.modules.batchnorm._BatchNorm.forward(norm, x)


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean)·rsqrt(var + eps)·weight + bias for statistics (N, C) or (1, C) that have gradients.

    Inside an optimized model who saves the result saves its recipe instead: x is all that is kept.
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    args = x, mean, scale, bias
    y = shift_scale(*args)
    if notes_recipes():
        tag(y, shift_scale, args)
    return y


def notes_recipes() -> bool:
    """Whether who saves a result may save its recipe instead. A compiler that traces through a layer decides itself."""
    return not is_compiling() and is_recording()


def running_statistics(buffers: Buffers, x: Tensor) -> tuple[Tensor, Tensor]:
    """The running mean and variance as (1, C), in the dtype of the statistics of `x`."""
    assert buffers.running_mean is not None and buffers.running_var is not None  # the callers have looked
    dtype = statistics_dtype(x)
    return buffers.running_mean.to(dtype)[None], buffers.running_var.to(dtype)[None]


def check_count(kind: str, x: Tensor, count: int) -> None:
    """ValueError where a batch has no variance, as `nn.BatchNorm` raises. `kind` is what the norm is called."""
    if count < 2:
        raise ValueError(
            f"{kind}: expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


def update_running(buffers: Buffers, momentum: float | None, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running averages towards (C,) `mean` and biased `var` of `count` values, as `nn.BatchNorm` does."""
    running_mean, running_var, batches = buffers
    if running_mean is None or running_var is None:
        return
    if batches is not None:
        batches.add_(1)
    mean, var = mean.detach(), var.detach()
    with torch.no_grad():
        if momentum is not None:
            move_running_stats(Running(running_mean, running_var, momentum), mean, var, count)
            return
        if batches is None:
            return  # a cumulative average of an unknown number
        share = 1 / batches.to(mean.dtype)  # on the device: nothing is read back
        for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            running.lerp_(value.to(running.dtype), share.to(running.dtype))


def adopt(layer: Any, norm: Any) -> Any:
    """Give `layer` the very parameters and buffers of a BatchNorm, and its mode; returns it."""
    for name in ("weight", "bias"):
        layer._parameters[name] = norm._parameters[name]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers[name] = norm._buffers[name]
    layer.training = norm.training
    return layer


def options_of(norm: Any) -> dict[str, Any]:
    """The arguments with which a norm like `norm` is made."""
    reference = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    return {
        "num_features": norm.num_features,
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "device": reference.device if reference is not None else None,
        "dtype": reference.dtype if reference is not None else None,
    }


def dimension_of(norm: nn.Module) -> int | None:
    """1, 2 or 3 for `nn.BatchNorm1d`, 2d or 3d; None for any other class, subclasses (and parametrised ones) too."""
    return next((d for d, kind in enumerate(BATCH_NORMS, 1) if type(norm) is kind), None)


def is_replaceable(norm: nn.Module) -> bool:
    """Whether `norm` is a BatchNorm1d, 2d or 3d that computes what its class says, and that nobody watches."""
    return dimension_of(norm) is not None and not any(hooks_of(norm)) and "forward" not in norm.__dict__


def as_batch_norm(norm: BatchNormLike) -> nn.Module:
    """The `nn.BatchNorm` that has the very parameters and buffers of `norm`, and its mode."""
    dimension = next(d for d in (1, 2, 3) if d + 2 in norm.dims)
    return adopt(BATCH_NORMS[dimension - 1](**options_of(norm)), norm)


def batch_norm_again(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """A BatchNorm like `norm` and with its very buffers, but the parameters and the mode of `layer`."""
    again = adopt(type(norm)(**options_of(norm)), norm)
    for name in ("weight", "bias"):
        again._parameters[name] = layer._parameters[name]
    return again.train(layer.training)
