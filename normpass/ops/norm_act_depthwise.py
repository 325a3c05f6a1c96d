"""act(norm(x)), convolved by channel, without the result of the norm: in one reading of x.

    y = depthwise_conv2d(norm_act(x, …), weight, bias, stride, padding)

The kernel normalizes and activates the rows that it convolves while they are in the cache (BN fission and fusion:
arXiv 1807.01702), in forward and in backward. So z = act(norm(x)) is neither written nor kept nor rebuilt; nor is its
gradient, unless it costs less to write than to compute it twice. z is computed by the formula of `norm_act`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Depthwise, Kernels

from .depthwise_conv2d import (
    _depthwise_weight_gradient,
    depthwise_of,
    input_gradient,
    is_finite,
    new_weight,
    output_size,
)
from .eager import eager_device, no_gradients
from .layout import memory_format_of, statistics_dtype
from .norm_act import norm_act
from .norm_act_backward import _norm_act_backward
from .operands import Options, Values, can_run, dense, new_like, new_per_channel, norm_operand

Pair = Sequence[int]


def norm_act_depthwise_on(
    device: str | None,
    x: Tensor,
    values: Values,
    options: Options,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
) -> Tensor | None:
    """The convolution of act(norm(x)), or None where there is no kernel that does both.

    Args:
        device: from `eager_device` of the tensors.
        x: (N, C, H, W), floating.
        values: weight, bias, mean and var of the norm, each None or (C,); options: eps, whether mean and var are the
            moments of this `x`, the activation and its arguments. As in `norm_act`.
        weight, bias, stride, padding: as in `depthwise_conv2d`.
    """
    mean, var, of_batch = values[2], values[3], options[1]
    if device is None or (not of_batch and (mean.requires_grad or var.requires_grad)):
        return None
    kernels = kernels_for(device)
    if kernels is None or _runner(kernels, x, values, options, weight, bias, stride, padding) is None:
        return None
    if not torch.is_grad_enabled():
        return _forward(kernels, x, values, options, weight, bias, stride, padding)
    y: Tensor = NormActDepthwise.apply(x, *values, weight, bias, device, options, stride, padding)
    return y


def _runner(
    kernels: Kernels,
    x: Tensor,
    values: Values,
    options: Options,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
) -> Depthwise | None:
    """What computes with these tensors."""
    if not can_run(kernels, x, (), values, *options[2:]):
        return None
    tensors = [x, weight] if bias is None else [x, weight, bias]
    depthwise, kernel_size = depthwise_of(kernels, *tensors), weight.shape[2:]
    if depthwise is None or any(t.dtype != x.dtype for t in tensors) or tuple(weight.shape[:2]) != (x.shape[1], 1):
        return None
    memory_format = memory_format_of(x)
    if not depthwise.convolves(x.dtype, memory_format, kernel_size, stride, padding):
        return None
    if not x.is_contiguous(memory_format=memory_format):
        return None
    has_values = min(output_size(x.shape[2:], kernel_size, stride, padding)) > 0
    return depthwise if has_values and is_finite(weight) else None


def _forward(
    kernels: Kernels,
    x: Tensor,
    values: Values,
    options: Options,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
) -> Tensor:
    depthwise = kernels.depthwise
    assert depthwise is not None  # `_runner` has looked
    shape = (*x.shape[:2], *output_size(x.shape[2:], weight.shape[2:], stride, padding))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    operands = x, weight.contiguous(), None if bias is None else bias.contiguous()
    depthwise.convolve(y, *operands, stride, padding, norm=norm_operand(values, options, statistics_dtype(x)))
    return y


class NormActDepthwise(torch.autograd.Function):
    """Both and their gradients, without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        device: str,
        options: Options,
        stride: Pair,
        padding: Pair,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.device, ctx.options, ctx.stride, ctx.padding = device, options, stride, padding
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, var, weight)
        kernels, values = kernels_for(device), (norm_weight, norm_bias, mean, var)
        assert kernels is not None
        return _forward(kernels, x, values, options, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        x, *others, weight = ctx.saved_tensors
        values: Values = tuple(others)
        needs = ctx.needs_input_grad
        wanted = needs[0], needs[1], needs[2], needs[5]
        kernels = None
        if not torch.is_grad_enabled() and eager_device(grad, x, weight) == ctx.device:
            kernels = kernels_for(ctx.device)
        steps = ctx.stride, ctx.padding
        dx, dnorm_weight, dnorm_bias, dweight = _gradients(
            kernels, grad, x, values, ctx.options, weight, *steps, wanted
        )
        dbias = grad.sum((0, 2, 3)) if needs[6] else None
        return dx, dnorm_weight, dnorm_bias, None, None, dweight, dbias, None, None, None, None


def _gradients(
    kernels: Kernels | None,
    grad: Tensor,
    x: Tensor,
    values: Values,
    options: Options,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of x, the norm's weight and bias, and the convolution's weight: those that are needed."""
    depthwise = None if kernels is None else _runner(kernels, x, values, options, weight, None, stride, padding)
    if depthwise is None or depthwise_of(kernels, grad) is None:
        return _gradients_by_ops(grad, x, values, options, weight, stride, padding, needs)
    memory_format, dtype = memory_format_of(x), statistics_dtype(x)
    dx = new_like(x, memory_format, needs[0])
    dnorm_weight, dnorm_bias = new_per_channel(values[0], dtype, needs[1]), new_per_channel(values[1], dtype, needs[2])
    dweight = new_weight(x, weight.shape[2:], dtype) if needs[3] else None
    operands = dense(grad, memory_format), x, weight.contiguous(), norm_operand(values, options, dtype)
    depthwise.norm_act_backward(dx, dnorm_weight, dnorm_bias, dweight, *operands, options[1], stride, padding)
    if dweight is not None and not is_finite(dweight):
        dweight = _weight_gradient_by_ops(grad, x, values, options, weight, stride, padding)
    return dx, dnorm_weight, dnorm_bias, dweight


def _gradients_by_ops(
    grad: Tensor,
    x: Tensor,
    values: Values,
    options: Options,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The same by ops that can be differentiated."""
    dx = dnorm_weight = dnorm_bias = dweight = None
    if any(needs[:3]):
        of_norm = needs[0], False, needs[1], needs[2]
        dz = input_gradient(grad, x, weight, stride, padding)
        found = _norm_act_backward(dz, x, None, *values, *options, of_norm)
        dx, _, dnorm_weight, dnorm_bias = (g if n else None for g, n in zip(found, of_norm, strict=True))
    if needs[3]:
        dweight = _weight_gradient_by_ops(grad, x, values, options, weight, stride, padding)
    return dx, dnorm_weight, dnorm_bias, dweight


def _weight_gradient_by_ops(
    grad: Tensor, x: Tensor, values: Values, options: Options, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    z = norm_act(x, None, *values, *options)
    dweight: Tensor = _depthwise_weight_gradient(grad, z, weight.shape[2:], stride, padding)
    return dweight
