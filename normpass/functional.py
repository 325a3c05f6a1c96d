"""What a rewritten graph calls where a norm and its activation stood.

    fused_norm_act   z = act(norm(x) + residual); keeps x (the consumer keeps z)
    split_norm_act   the same, and z carries its recipe: x is all that is kept
    inplace_abn      z = act(norm(x)); keeps z alone and reconstructs x̂ from it

Each takes the norm *module* and reads it when it runs: `train()`/`eval()`, a single frozen norm,
replaced parameters and changed momentum all keep working. Where the norm can no longer be fused (a
hook was registered, it was replaced by a SyncBatchNorm, the batch is empty, dtypes are mixed), the
plain layers run instead: same numbers, no saving.

Each asks `eager_device` once whether anyone but autograd is looking on; if not, neither the statistics nor the
op goes through the dispatcher, and the running statistics are written where the moments are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.graph import hooks_of
from normpass.kernels import Running, kernels_for
from normpass.nn.switchable import is_batch_norm_by_choice
from normpass.ops.activation import activate
from normpass.ops.eager import eager_device, under_other_derivatives
from normpass.ops.inplace_abn import inplace_abn_on
from normpass.ops.library import is_exporting
from normpass.ops.moments import moments_with_update
from normpass.ops.norm_act import norm_act, norm_act_on, rebuild_norm_act
from normpass.ops.running_stats import move_running_stats, update_running_stats
from normpass.recipe import is_recording, rebuilt_when_compiled, tag

_DIMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_ANY_DIMS = (2, 3, 4, 5)
_PARAMETER_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
}
"""By the dtype of x: the dtypes that a norm's parameters and buffers may have."""


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


class NormTensors(NamedTuple):
    """The parameters, each (C,), and buffers of one norm."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


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
    known = type(norm) in _DIMS or type(norm) is FunctionalBatchNorm or is_norm_act_module(norm)
    return known or is_batch_norm_by_choice(norm)


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
    tensors = fusible(norm, x, residual, activation)
    if tensors is None:
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    device = eager_device(x, residual)
    return norm_act_on(device, *op_args(device, norm, tensors, x, residual, activation, activation_args))


def split_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x; who saves the result saves its recipe instead."""
    tensors = fusible(norm, x, residual, activation)
    if tensors is None:
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    device = eager_device(x, residual)
    args = op_args(device, norm, tensors, x, residual, activation, activation_args)
    if torch.compiler.is_compiling():
        return rebuilt_when_compiled(norm_act, *args)
    z = norm_act_on(device, *args)
    if is_recording():
        tag(z, rebuild_norm_act, args)
    return z


def prepare_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into="", moments=None):
    """What of `split_norm_act` is to run once a step: the moments, and the running statistics' move.

    `moments`: mean and biased variance of x, where they are known already.

    Returns what `finish_norm_act` takes: the arguments of its op, or the plain layers' result where the norm
    cannot be fused. A compiler that runs `finish_norm_act` again in backward rebuilds z from x bit for bit.
    """
    tensors = fusible(norm, x, residual, activation)
    if tensors is None:
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    return op_args(eager_device(x, residual), norm, tensors, x, residual, activation, activation_args, moments)


def finish_norm_act(prepared):
    """z = act(norm(x) + residual) from what `prepare_norm_act` returned."""
    return prepared if isinstance(prepared, Tensor) else norm_act(*prepared)


def inplace_abn(norm, x, activation="identity", activation_args=()):
    """act(norm(x)) that keeps only its result. The activation must be invertible."""
    tensors = fusible(norm, x, None, activation)
    if tensors is None:
        return plain_norm_act(norm, x, None, activation, activation_args, "")
    device = eager_device(x)
    args = op_args(device, norm, tensors, x, None, activation, activation_args)
    return inplace_abn_on(device, args[0], *args[2:])


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


def op_args(device, norm, tensors: NormTensors, x, residual, activation, activation_args, moments: Any = None) -> tuple:
    """The arguments of `norm_act` for this call; in training the running statistics move."""
    mean, var, of_batch = _statistics(device, norm, tensors, x, moments)
    return x, residual, tensors.weight, tensors.bias, mean, var, norm.eps, of_batch, activation, list(activation_args)


def _statistics(device: str | None, norm, tensors: NormTensors, x: Tensor, moments: Any = None) -> Statistics:
    """The statistics this call normalises with; in training the running ones move, exactly once."""
    fixed = running_statistics_of(norm, tensors)
    if fixed is not None:
        return fixed
    running = next_running(norm, tensors)
    if device is not None and moments is not None:
        mean, var = moments
        if running is not None:
            update_running_stats(kernels_for(device), running, mean, var, x.numel() // x.shape[1])
        return Statistics(mean, var, of_batch=True)
    if device is not None:
        return Statistics(*moments_with_update(kernels_for(device), x, running), of_batch=True)
    mean, var = torch.ops.normpass.moments.default(x.detach())
    if running is not None:
        move_running_stats(running, mean, var, x.numel() // x.size(1))
    return Statistics(mean, var, of_batch=True)


def running_statistics_of(norm, tensors: NormTensors) -> Statistics | None:
    """The running statistics, where this call normalises with them; None where with the batch's own."""
    mean, var = tensors.running_mean, tensors.running_var
    if norm.training or mean is None or var is None:
        return None
    return Statistics(mean, var, of_batch=False)


def next_running(norm, tensors: NormTensors) -> Running | None:
    """Count the batch; what of the running statistics is to move with it, and how far."""
    if not (norm.training and norm.track_running_stats):
        return None
    momentum = _next_momentum(norm, tensors)
    mean, var = tensors.running_mean, tensors.running_var
    return None if mean is None or var is None else Running(mean, var, momentum)


def _next_momentum(norm, tensors: NormTensors) -> float:
    """The share of this batch in the running statistics, after it has been counted."""
    momentum, count = norm.momentum, tensors.num_batches_tracked
    if count is not None:
        count.add_(1)
    if momentum is not None:
        return momentum
    return 1.0 / float(count) if count is not None else 0.0  # the cumulative average, as nn.BatchNorm does it


def tensors_of(norm) -> NormTensors:
    if not torch.compiler.is_compiling() and isinstance(norm, nn.Module):
        p, b = norm._parameters, norm._buffers  # ten times faster than a module's attributes
        try:
            return NormTensors(p["weight"], p["bias"], b["running_mean"], b["running_var"], b["num_batches_tracked"])
        except KeyError:
            pass  # one was replaced by a tensor that is not registered
    return NormTensors(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)


def fusible(norm, x, residual: Tensor | None, activation: str) -> NormTensors | None:
    """What of `norm` the op needs, if these can be fused as they are now; None if not.

    x: a tensor, or what has the dtype, device and shape of one.
    """
    kind = type(norm)
    if under_other_derivatives() or is_exporting():
        return None  # an exported graph is to have standard operators
    if kind is not FunctionalBatchNorm and (any(hooks_of(norm)) or not is_supported_norm(norm)):
        return None
    tensors = tensors_of(norm)
    if x.dim() not in _DIMS.get(kind, _ANY_DIMS) or not _dtypes_fit(tensors, x):
        return None
    if activation == "softplus" and torch.is_autocast_enabled(x.device.type):
        return None  # autocast may run softplus in float32
    running_mean = tensors.running_mean
    values, channels = x.numel(), x.shape[1]
    if values == 0 or (running_mean is None) != (tensors.running_var is None):
        return None
    if values == channels and (norm.training or running_mean is None):
        return None  # one value per channel: nn.BatchNorm raises its own error
    features = running_mean if running_mean is not None else tensors.weight
    if features is not None and features.numel() != channels:
        return None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return None
    return tensors


def _dtypes_fit(tensors: NormTensors, x) -> bool:
    allowed = _PARAMETER_DTYPES.get(x.dtype, ())
    return bool(allowed) and all([t is None or t.dtype in allowed for t in tensors[:4]])
