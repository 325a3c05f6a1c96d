"""What a rewritten graph calls where a norm and its activation stood.

    fused_norm_act   z = act(norm(x) + residual); keeps x (the consumer keeps z)
    split_norm_act   the same, and z carries its recipe: x is all that is kept
    inplace_abn      z = act(norm(x)); keeps z alone and reconstructs x̂ from it

Each takes the norm *module* and reads it when it runs: `train()`/`eval()`, a single frozen norm,
replaced parameters and changed momentum all keep working. Where the norm can no longer be fused (a
hook was registered, it was replaced by a SyncBatchNorm, the batch is empty, dtypes are mixed), the
plain layers run instead: same numbers, no saving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.graph import hooks_of
from normpass.ops.activation import activate
from normpass.recipe import is_recording, tag, under_other_derivatives

BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DIMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


@dataclass
class FunctionalBatchNorm:
    """The arguments of one `F.batch_norm` call, with the attributes of a norm module."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    track_running_stats: bool = True
    num_batches_tracked: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class Statistics(NamedTuple):
    """Mean and biased variance of one norm's input, each (C,), and whether they are the batch's own."""

    mean: Tensor
    var: Tensor
    of_batch: bool


def is_norm_act_module(norm: Any) -> bool:
    """Whether `norm` is timm's `BatchNormAct2d`: a BatchNorm that runs its own dropout and activation."""
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")


def is_supported_norm(norm: Any) -> bool:
    """Whether the class of `norm` is one whose computation is known here (subclasses are not)."""
    return type(norm) in _DIMS or type(norm) is FunctionalBatchNorm or is_norm_act_module(norm)


def plain_norm_act(norm, x, residual, activation, activation_args, sum_into) -> Tensor:
    """The same layers one after the other, as the model had them.

    `sum_into` says which term gives the sum its dtype, as in `term += other`: "norm", "residual" or "" for none.
    """
    y = norm(x)
    if is_norm_act_module(norm):
        return y
    if residual is not None:
        first, second = (residual, y) if sum_into == "residual" else (y, residual)
        y = sum_as_first(first, second) if sum_into else first + second
    return activate(y, activation, activation_args)


def fused_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x. x: (N, C, *); residual like x."""
    if not _is_fusible(norm, x, residual, activation):
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    return torch.ops.normpass.norm_act.default(*_op_args(norm, x, residual, activation, activation_args))


def split_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x; who saves the result saves its recipe instead."""
    if not _is_fusible(norm, x, residual, activation):
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    args = _op_args(norm, x, residual, activation, activation_args)
    z = torch.ops.normpass.norm_act.default(*args)
    if not torch.compiler.is_compiling() and is_recording():
        tag(z, torch.ops.normpass.norm_act.default, args)
    return z


def inplace_abn(norm, x, activation="identity", activation_args=()):
    """act(norm(x)) that keeps only its result. The activation must be invertible."""
    if not _is_fusible(norm, x, None, activation):
        return plain_norm_act(norm, x, None, activation, activation_args, "")
    args = _op_args(norm, x, None, activation, activation_args)
    return torch.ops.normpass.inplace_abn.default(args[0], *args[2:])


def sum_as_first(first: Tensor, second: Any) -> Tensor:
    """`first += second` out of place: the result has the dtype of `first`."""
    result = first + second
    return result if result.dtype == first.dtype else result.to(first.dtype)


def product_as_first(first: Tensor, second: Any) -> Tensor:
    """`first *= second` out of place: the result has the dtype of `first`."""
    result = first * second
    return result if result.dtype == first.dtype else result.to(first.dtype)


def survival_noise(x: Tensor, p: float, mode: str) -> Tensor:
    """The factor by which torchvision's `stochastic_depth` multiplies x in training: same draw, same values."""
    shape = [x.shape[0]] + [1] * (x.ndim - 1) if mode == "row" else [1] * x.ndim
    noise = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p)
    return noise if p == 1.0 else noise.div_(1.0 - p)


def _op_args(norm, x, residual, activation, activation_args) -> tuple:
    mean, var, of_batch = _statistics(norm, x)
    return (
        x,
        residual,
        norm.weight,
        norm.bias,
        mean,
        var,
        norm.eps,
        of_batch,
        activation,
        list(activation_args),
    )


def _statistics(norm, x: Tensor) -> Statistics:
    """The statistics this call normalises with; in training the running ones move, exactly once."""
    if not norm.training and norm.running_mean is not None:
        return Statistics(norm.running_mean, norm.running_var, of_batch=False)
    mean, var = torch.ops.normpass.moments.default(x.detach())
    if norm.training and norm.track_running_stats:
        _update_running_statistics(norm, mean, var, x.numel() // x.size(1))
    return Statistics(mean, var, of_batch=True)


def _update_running_statistics(norm, mean: Tensor, var: Tensor, count: int) -> None:
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if momentum is None:  # the cumulative average, as nn.BatchNorm does it
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
    if norm.running_mean is None:
        return
    new = torch.ops.normpass.updated_running_stats.default(
        norm.running_mean, norm.running_var, mean, var, momentum, count
    )
    norm.running_mean.copy_(new[0])
    norm.running_var.copy_(new[1])


def _is_fusible(norm, x: Tensor, residual: Tensor | None, activation: str) -> bool:
    if under_other_derivatives():
        return False
    if type(norm) is not FunctionalBatchNorm and (any(hooks_of(norm)) or not is_supported_norm(norm)):
        return False
    if x.dim() not in _DIMS.get(type(norm), (2, 3, 4, 5)) or not _dtypes_fit(norm, x):
        return False
    if activation == "softplus" and torch.is_autocast_enabled(x.device.type):
        return False  # autocast may run softplus in float32
    if x.numel() == 0 or (norm.running_mean is None) != (norm.running_var is None):
        return False
    if (norm.training or norm.running_mean is None) and x.numel() == x.size(1):
        return False  # one value per channel: nn.BatchNorm raises its own error
    features = norm.running_mean if norm.running_mean is not None else norm.weight
    if features is not None and features.numel() != x.size(1):
        return False
    return residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)


def _dtypes_fit(norm, x: Tensor) -> bool:
    allowed = {
        torch.float64: (torch.float64,),
        torch.float32: (torch.float32,),
        torch.bfloat16: (torch.float32, torch.bfloat16),
        torch.float16: (torch.float32, torch.float16),
    }.get(x.dtype, ())
    given = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return bool(allowed) and all(t is None or t.dtype in allowed for t in given)
