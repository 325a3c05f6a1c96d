"""What a rewritten graph calls where a norm and a PReLU stood: z = prelu(norm(x), slope).

    split_norm_prelu   notes how z is made again: x is all that is kept
    fused_norm_prelu   the same, without a recipe: who saves the result keeps it

The norm is the arguments of a batch norm's call, a group norm's or an instance norm's. Where the kernels do not take
these, or somebody is looking on, the plain functions run: same numbers, no saving.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.ops.eager import eager_device
from normpass.ops.group_norm_act import GroupNormOptions
from normpass.ops.layout import activated_format, memory_format_of
from normpass.ops.norm_prelu import (
    PLACEHOLDER,
    BatchNormCall,
    Call,
    GroupNormCall,
    norm_prelu_on,
    rebuild_norm_prelu,
    takes,
)
from normpass.ops.sample_norm import on_one_device
from normpass.recipe.notes import copied, copying, notes_now, tag
from normpass.runtime import functional, sample_norms
from normpass.runtime.functional import FunctionalBatchNorm, op_args
from normpass.runtime.sample_norms import FunctionalGroupNorm

Norm = FunctionalBatchNorm | FunctionalGroupNorm


def fused_norm_prelu(norm: Any, x: Tensor, slope: Tensor) -> Tensor:
    """prelu(norm(x), slope) in one op that keeps x. x: (N, C, *); slope: (C,) or (1,)."""
    device = _fusible_on(norm, x, slope)
    if device is None:
        return F.prelu(norm(x), slope)
    with copying(norm.bias):
        return _run(device, norm, x, slope)[0]


def split_norm_prelu(norm: Any, x: Tensor, slope: Tensor) -> Tensor:
    """prelu(norm(x), slope) in one op that keeps x; who saves the result saves its recipe instead."""
    device = _fusible_on(norm, x, slope)
    if device is None:
        return F.prelu(norm(x), slope)
    notes = notes_now()
    if notes is not None:
        notes.begin()
    with copying(norm.bias):
        z, args = _run(device, norm, x, slope)
        if not z.requires_grad:  # autograd keeps nothing here: the vectors may change, what they were is copied
            args = (args[0], *map(copied, args[1:-1]), args[-1])
        tag(z, rebuild_norm_prelu, args)
    return z


def is_fusible(norm: Any, x: Any, slope: Any) -> bool:
    """Whether the op takes these as they are now. x, slope: tensors, or fake ones."""
    device, are_groups = x.device.type, isinstance(norm, FunctionalGroupNorm)
    if torch.is_autocast_enabled(device) or not takes(device, x, slope, are_groups):
        return False  # autocast runs a PReLU in 16 bits
    if isinstance(norm, FunctionalGroupNorm):
        return sample_norms.is_fusible(norm, x, None, PLACEHOLDER[0])
    if not isinstance(norm, FunctionalBatchNorm) or activated_format(x, PLACEHOLDER[0]) is not memory_format_of(x):
        return False
    fixed = functional.running_statistics_of(norm)
    is_differentiated = fixed is not None and (fixed.mean.requires_grad or fixed.var.requires_grad)
    return not is_differentiated and functional.is_fusible(norm, x, None, PLACEHOLDER[0])


def _fusible_on(norm: Norm, x: Tensor, slope: Tensor) -> str | None:
    """The device whose kernels run; None where the plain functions must."""
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    device = eager_device(x, slope, *vectors)
    if device is None or not is_fusible(norm, x, slope) or not on_one_device(x, *vectors):
        return None
    return device


def _run(device: str, norm: Norm, x: Tensor, slope: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """z, and the arguments of `rebuild_norm_prelu`. In training the running statistics move."""
    if isinstance(norm, FunctionalBatchNorm):
        _, _, weight, bias, mean, var, eps, of_batch, *_ = op_args(device, norm, x, None, "identity", ())
        call: Call = BatchNormCall(eps, of_batch)
        z, *_ = norm_prelu_on(device, x, weight, bias, slope, mean, var, call)
        return z, (x, weight, bias, slope, mean, var, call)
    groups = norm.groups_of(x)
    call = GroupNormCall(GroupNormOptions(groups, norm.eps, *PLACEHOLDER, norm.groups is None))
    z, mean, var = norm_prelu_on(device, x, norm.weight, norm.bias, slope, None, None, call)
    norm.move(mean, var, x.numel() // mean.numel())
    return z, (x, norm.weight, norm.bias, slope, mean, var, call)
