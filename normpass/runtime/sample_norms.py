"""What a rewritten graph calls where a norm with a sample's own statistics and its activation stood.

    split_sample_norm_act   z = act(norm(x) + residual); notes how z is made again: x is all that is kept
    fused_sample_norm_act   the same, without a recipe: who saves the result keeps it

The norm is the arguments of the call that stood there, of group norm and instance norm (`FunctionalGroupNorm`) or of
layer norm and RMS norm (`FunctionalRowNorm`). Where they cannot be fused (one value a group, an empty batch, mixed
dtypes, somebody looking on) the plain functions run: same numbers, no saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels.contract import SampleNorms
from normpass.onlookers import is_exporting, under_other_derivatives
from normpass.ops.eager import eager_device
from normpass.ops.group_norm_act import (
    GroupNormOptions,
    format_of,
    group_norm_act_on,
    rebuild_group_norm_act,
    result_format,
)
from normpass.ops.layout import is_canonical, is_dense_in_both
from normpass.ops.row_norm_act import RowNormOptions, rebuild_row_norm_act, row_norm_act_on
from normpass.ops.sample_norm import on_one_device, sample_norms_of
from normpass.recipe.notes import copied, copying, notes_now, tag
from normpass.runtime.functional import dtypes_fit, noted_norm_act, plain_norm_act

Run = tuple[Tensor, Callable[..., Tensor], tuple]
"""z, and the function and the arguments that make it again."""


@dataclass
class FunctionalGroupNorm:
    """The arguments of a group norm or, where `groups` is None, an instance norm with x's own statistics."""

    groups: int | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1

    def __call__(self, x: Tensor) -> Tensor:
        if self.groups is not None:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        running = self.running_mean, self.running_var
        return F.instance_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)

    def is_fusible(self, x: Any, residual: Any, activation: str) -> bool:
        """Whether the kernels take these. x: a tensor, or a fake one."""
        groups, shape = self.groups_of(x), x.shape
        if not 2 <= len(shape) <= 5 or x.numel() == 0 or groups <= 0 or shape[1] % groups or not self.eps > 0:
            return False
        if x.numel() == shape[0] * groups and (groups == 1 or self.groups is None):
            return False  # one value a group: ATen raises its own error, or divides by none
        if not all([t is None or tuple(t.shape) == (shape[1],) for t in (self.weight, self.bias)]):
            return False
        if (self.running_mean is None) != (self.running_var is None):
            return False
        memory_format = format_of(x, self._options(x, activation, ()))
        if x.device.type == "cuda" and memory_format is not torch.contiguous_format and not is_dense_in_both(shape):
            return False  # there is no kernel for groups in channels_last on CUDA
        if self.groups is not None and not _has_dtypes_of_aten(x, self.weight, self.bias):
            return False
        return residual is None or _adds_alike(x, residual, memory_format)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that have a dtype that must fit x's."""
        return self.weight, self.bias, self.running_mean, self.running_var

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """The running statistics, which move."""
        return () if self.running_mean is None or self.running_var is None else (self.running_mean, self.running_var)

    def count_of_moments(self, x: Any) -> int:
        """How many means there are."""
        groups: int = x.shape[0] * self.groups_of(x)
        return groups

    def new_result(self, x: Tensor, activation: str) -> Tensor:
        """Memory for z."""
        return torch.empty_like(x, memory_format=result_format(x, self._options(x, activation, ())))

    def run(
        self, kernels: SampleNorms, x: Tensor, residual: Tensor | None, activation: str, args: Sequence[float]
    ) -> Run:
        options = self._options(x, activation, args)
        z, mean, var = group_norm_act_on(kernels, x, residual, self.weight, self.bias, None, options)
        self.move(mean, var, x.numel() // mean.numel())
        return z, rebuild_group_norm_act, (x, residual, self.weight, self.bias, mean, var, options)

    def groups_of(self, x: Any) -> int:
        """Of the channels of a sample."""
        channels: int = x.shape[1]
        return channels if self.groups is None else self.groups

    def _options(self, x: Any, activation: str, args: Sequence[float]) -> GroupNormOptions:
        return GroupNormOptions(self.groups_of(x), self.eps, activation, tuple(args), self.groups is None)

    def move(self, mean: Tensor, var: Tensor, count: int) -> None:
        """The running statistics, by the average over the samples."""
        if self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        with torch.no_grad():
            self.running_mean.copy_((1 - share) * self.running_mean + share * mean.mean(0))
            self.running_var.copy_((1 - share) * self.running_var + share * count / (count - 1) * var.mean(0))


@dataclass
class FunctionalRowNorm:
    """The arguments of an `F.layer_norm` or `F.rms_norm` call."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = 1e-5
    is_rms_norm: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_rms_norm:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        assert self.eps is not None
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def is_fusible(self, x: Any, residual: Any, activation: str) -> bool:
        """Whether the kernels take these. x: a tensor, or a fake one."""
        shape = tuple(self.normalized_shape)
        if residual is not None or x.numel() == 0 or not shape or tuple(x.shape[-len(shape) :]) != shape:
            return False
        if not self._eps(x) > 0 or not all([t is None or tuple(t.shape) == shape for t in (self.weight, self.bias)]):
            return False
        if not _has_dtypes_of_aten(x, self.weight, self.bias):
            return False
        return not self.is_rms_norm or (x.is_contiguous() and (self.weight is None or self.weight.dtype == x.dtype))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that have a dtype that must fit x's."""
        return self.weight, self.bias

    moved = ()

    def count_of_moments(self, x: Any) -> int:
        """How many means there are."""
        rows: int = x.numel() // math.prod(self.normalized_shape)
        return rows

    def new_result(self, x: Tensor, activation: str) -> Tensor:
        """Memory for z."""
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def run(
        self, kernels: SampleNorms, x: Tensor, residual: Tensor | None, activation: str, args: Sequence[float]
    ) -> Run:
        shape = tuple(self.normalized_shape)
        options = RowNormOptions(shape, self._eps(x), activation, tuple(args), self.is_rms_norm)
        z, mean, var = row_norm_act_on(kernels, x, self.weight, self.bias, None, options)
        return z, rebuild_row_norm_act, (x, self.weight, self.bias, mean, var, options)

    def _eps(self, x: Any) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps


SampleNorm = FunctionalGroupNorm | FunctionalRowNorm


def fused_sample_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x. residual: like x."""
    device = _fusible_on(norm, x, residual, activation)
    if device is None:
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    with copying(None if activation == "identity" else norm.bias):
        return norm.run(sample_norms_of(device), x, residual, activation, activation_args)[0]


def split_sample_norm_act(norm, x, residual=None, activation="identity", activation_args=(), sum_into=""):
    """act(norm(x) + residual) in one op that keeps x; who saves the result saves its recipe instead."""
    device = _fusible_on(norm, x, residual, activation)
    if device is None:
        return noted_norm_act(split_sample_norm_act, norm, x, residual, activation, activation_args, sum_into)
    notes = notes_now()
    if notes is not None:
        notes.begin()
    with copying(norm.bias):
        z, function, args = norm.run(sample_norms_of(device), x, residual, activation, activation_args)
        if not z.requires_grad:  # autograd keeps nothing here: the vectors may change, what they were is copied
            args = tuple([copied(a) if a is norm.weight or a is norm.bias else a for a in args])
        tag(z, function, args)
    return z


def _fusible_on(norm: SampleNorm, x: Tensor, residual: Tensor | None, activation: str) -> str | None:
    """The device whose kernels run; None where the plain functions must."""
    device = eager_device(x, residual, norm.weight, norm.bias)
    if device is None or sample_norms_of(device) is None or not is_fusible(norm, x, residual, activation):
        return None
    return device if on_one_device(x, residual, norm.weight, norm.bias) else None


def is_fusible(norm: SampleNorm, x: Any, residual: Any, activation: str) -> bool:
    """Whether the op takes these as they are now. x: a tensor, or a fake one."""
    if under_other_derivatives() or is_exporting() or not dtypes_fit(norm.tensors, x):
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device) and (activation == "softplus" or device != "cpu"):
        return False  # autocast may run these in float32, whatever x is
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    return norm.is_fusible(x, residual, activation)


def _has_dtypes_of_aten(x: Any, *parameters: Tensor | None) -> bool:
    """On CUDA ATen's group and layer norm refuse parameters of another dtype than x's: theirs is the error."""
    return x.device.type != "cuda" or all([t is None or t.dtype == x.dtype for t in parameters])


def _adds_alike(x: Any, residual: Any, memory_format: torch.memory_format) -> bool:
    """Whether the norm's result plus `residual` lies as the norm's result, along dimensions of one value too."""
    if 1 not in x.shape:
        return bool(residual.is_contiguous(memory_format=memory_format))
    if memory_format is not torch.contiguous_format and is_dense_in_both(x.shape):
        return False  # which of the two formats the sum has depends on both
    return is_canonical(residual, memory_format)
