"""What a rewritten graph calls where a norm and its activation stood.

    fused_norm_act   z = act(norm(x) + residual); keeps x (the consumer keeps z)
    split_norm_act   the same, and notes how z is made again: x is all that is kept
    inplace_abn      z = act(norm(x)); keeps z alone and reconstructs x̂ from it

Each takes the arguments of the `F.batch_norm` call that stood there. Where these cannot be fused (one value per
channel, an empty batch, mixed dtypes) the plain functions run instead: same numbers, no saving.

Each asks `eager_device` once whether anyone but autograd is looking on; if not, neither the statistics nor the
op goes through the dispatcher, and the running statistics are written where the moments are taken.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.kernels import kernels_for
from normpass.kernels.contract import Running
from normpass.onlookers import is_exporting, under_other_derivatives
from normpass.ops.activation import activate
from normpass.ops.eager import eager_device
from normpass.ops.inplace_abn import inplace_abn_on
from normpass.ops.layout import sum_lies_as_norm
from normpass.ops.moments import moments_with_update
from normpass.ops.norm_act import norm_act, norm_act_on, rebuild_from_vectors, rebuild_norm_act
from normpass.ops.running_stats import move_running_stats, update_running_stats
from normpass.ops.vectors import Vectors
from normpass.recipe.notes import call_rebuilt, call_rebuilt_in_place, copied, copying, notes_now, tag, unread

_DIMS = (2, 3, 4, 5)
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

    @classmethod
    def of(cls, layer: nn.modules.batchnorm._BatchNorm) -> FunctionalBatchNorm:
        """What a captured graph has where `layer` is called, its counter moved; its momentum is a number."""
        if layer.training and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
        mean, var, momentum = layer.running_mean, layer.running_var, layer.momentum
        assert momentum is not None
        return cls(mean, var, layer.weight, layer.bias, layer.training, momentum, layer.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`. In training it keeps the running statistics and does not read them: others may move them."""
    with unread(running_mean, running_var) if training else nullcontext():
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


class Statistics(NamedTuple):
    """Mean and biased variance of one norm's input, each (C,), and whether they are the batch's own."""

    mean: Tensor
    var: Tensor
    of_batch: bool


def plain_norm_act(norm, x, residual, activation, activation_args, sum_into) -> Tensor:
    """The same layers one after the other, as the model had them.

    `sum_into` says which term the sum is written into, as in `term += other`: "norm", "residual" or "" for none;
    "residual +" for none, but the residual comes first.
    """
    y = norm(x)
    if residual is not None:
        first, second = _terms(y, residual, sum_into)
        y = first.add_(second) if sum_into in ("norm", "residual") else first + second
    return activate(y, activation, activation_args)


def noted_norm_act(split, norm, x, residual, activation, activation_args, sum_into) -> Tensor:
    """`plain_norm_act` where `split` cannot take all at once: each layer notes how its result is made again."""
    if residual is None and activation == "identity":
        z: Tensor = norm(x)
        return z
    y = split(norm, x)
    if residual is not None:
        first, second = _terms(y, residual, sum_into)
        if sum_into in ("norm", "residual"):
            y = call_rebuilt_in_place(Tensor.add_, 0, (), first, second)
        else:
            y = call_rebuilt(operator.add, (), first, second)
    return y if activation == "identity" else call_rebuilt(activate, (), y, activation, activation_args)


def _terms(y: Tensor, residual: Tensor, sum_into: str) -> tuple[Tensor, Tensor]:
    """Of the sum, in the model's order."""
    return (residual, y) if sum_into.startswith("residual") else (y, residual)


def fused_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x. x: (N, C, *); residual like x."""
    if not is_fusible(norm, x, residual, activation, sum_into):
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    device = eager_device(x, residual)
    args = op_args(device, norm, x, residual, activation, activation_args)
    with copying(None if activation == "identity" else norm.bias):
        return norm_act_on(device, *args)


def split_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x; who saves the result saves its recipe instead."""
    if not is_fusible(norm, x, residual, activation, sum_into):
        return noted_norm_act(split_norm_act, norm, x, residual, activation, activation_args, sum_into)
    device = eager_device(x, residual)
    args = op_args(device, norm, x, residual, activation, activation_args)
    notes = notes_now()
    if notes is not None:
        notes.begin()
    if notes is None or device is None:
        with copying(norm.bias):
            z = norm_act_on(device, *args)
            # Without a gradient autograd keeps nothing here: the vectors may change, what they were is copied.
            tag(z, rebuild_norm_act, args if z.requires_grad else (*args[:2], *map(copied, args[2:6]), *args[6:]))
        return z
    vectors = Vectors(*args[2:6], notes.watched_with(args[5]))
    z = norm_act_on(device, *args, vectors)
    if not z.requires_grad:
        vectors.own()
    tag(z, rebuild_from_vectors, (*args[:2], vectors, *args[6:]))
    return z


def prepare_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into="", moments=None):
    """What of `split_norm_act` is to run once a step: the moments, and the running statistics' move.

    `moments`: mean and biased variance of x, where they are known already.

    Returns what `finish_norm_act` takes: the arguments of its op, or the plain layers' result where the norm
    cannot be fused. A compiler that runs `finish_norm_act` again in backward rebuilds z from x bit for bit.
    """
    if not is_fusible(norm, x, residual, activation, sum_into):
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    return op_args(eager_device(x, residual), norm, x, residual, activation, activation_args, moments)


def finish_norm_act(prepared):
    """z = act(norm(x) + residual) from what `prepare_norm_act` returned."""
    return prepared if isinstance(prepared, Tensor) else norm_act(*prepared)


def inplace_abn(norm, x, activation="identity", activation_args=()):
    """act(norm(x)) that keeps only its result. The activation must be invertible."""
    if not is_fusible(norm, x, None, activation):
        return plain_norm_act(norm, x, None, activation, activation_args, "")
    device = eager_device(x)
    args = op_args(device, norm, x, None, activation, activation_args)
    with copying(norm.bias):
        return inplace_abn_on(device, args[0], *args[2:])


def op_args(device, norm, x, residual, activation, activation_args, moments: Any = None) -> tuple:
    """The arguments of `norm_act` for this call; in training the running statistics move."""
    mean, var, of_batch = _statistics(device, norm, x, moments)
    watch_running(norm, var)
    return x, residual, norm.weight, norm.bias, mean, var, norm.eps, of_batch, activation, list(activation_args)


def _statistics(device: str | None, norm: FunctionalBatchNorm, x: Tensor, moments: Any = None) -> Statistics:
    """The statistics this call normalizes with; in training the running ones move, exactly once."""
    fixed = running_statistics_of(norm)
    if fixed is not None:
        return fixed
    running = running_of(norm)
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


def running_statistics_of(norm: FunctionalBatchNorm) -> Statistics | None:
    """The running statistics, where this call normalizes with them; None where with the batch's own."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training or mean is None or var is None:
        return None
    return Statistics(mean, var, of_batch=False)


def running_of(norm: FunctionalBatchNorm) -> Running | None:
    """What of the running statistics is to move with this batch, and how far."""
    mean, var = norm.running_mean, norm.running_var
    if not norm.training or mean is None or var is None:
        return None
    return Running(mean, var, norm.momentum)


def watch_running(norm: FunctionalBatchNorm, var: Tensor) -> None:
    """Refuse backward as plain layers do once others have written to statistics that have moved by `var`."""
    notes, running = notes_now(), running_of(norm)
    if notes is not None and running is not None:
        notes.watch(var, running.mean, running.var)


def is_fusible(norm: FunctionalBatchNorm, x: Any, residual: Tensor | None, activation: str, sum_into: str = "") -> bool:
    """Whether the op takes these as they are now. x: a tensor, or what has the dtype, device and shape of one."""
    if under_other_derivatives() or is_exporting():
        return False  # an exported graph is to have standard operators
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if x.dim() not in _DIMS or not dtypes_fit(tensors, x) or not norm.eps > 0:
        return False
    if activation == "softplus" and torch.is_autocast_enabled(x.device.type):
        return False  # autocast may run softplus in float32
    running_mean = norm.running_mean
    values, channels = x.numel(), x.shape[1]
    if values == 0 or (running_mean is None) != (norm.running_var is None):
        return False
    if values == channels and (norm.training or running_mean is None):
        return False  # one value per channel: F.batch_norm raises its own error
    features = running_mean if running_mean is not None else norm.weight
    if features is not None and features.numel() != channels:
        return False
    if residual is None:
        return True
    fits = residual.shape == x.shape and residual.dtype == x.dtype
    return fits and sum_lies_as_norm(x, residual, sum_into)


def dtypes_fit(tensors: Iterable[Tensor | None], x: Any) -> bool:
    """Whether a norm of x may have parameters and buffers of these dtypes."""
    allowed = _PARAMETER_DTYPES.get(x.dtype, ())
    return bool(allowed) and all([t is None or t.dtype in allowed for t in tensors])
