"""What the norms whose statistics are a sample's own have in common: `group_norm_act` and `row_norm_act`.

Both are autograd functions and no operators of `torch.ops`: they run in eager mode alone. A compiler gets ATen's norms,
which it decomposes and fuses with what stands around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Norm, SampleNorms

from .operands import norm_operand

Differentiable = Callable[..., Tensor]
"""x, residual, weight, bias -> z, in ATen's operators."""


def sample_norms_of(device: str | None) -> SampleNorms | None:
    """The kernels of a device; None where there are none."""
    kernels = None if device is None else kernels_for(device)
    return None if kernels is None else kernels.sample_norms


def on_one_device(x: Tensor, *others: Tensor | None) -> bool:
    """Whether plain tensors of one device type (see `eager_device`) are on the same device."""
    device = x.get_device()
    return all([t is None or t.get_device() == device for t in others])


def norm_of(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
) -> Norm:
    """A norm as kernels read it."""
    return norm_operand((weight, bias, mean, var), (eps, True, activation, activation_args), mean.dtype)


def differentiable_gradients(
    formula: Differentiable, tensors: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of `tensors` with a graph of their own: `formula` says what forward computed."""
    inputs = [t if t is None else t.view_as(t) for t in tensors]
    sources = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(formula(*inputs), sources, grad, create_graph=True))
    return [next(found) if needed and t is not None else None for t, needed in zip(inputs, needs, strict=True)]


def keep(
    ctx: Any,
    activation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> None:
    """Keep what backward reads: residual and bias only for an activation's derivative."""
    rebuilds_y = activation != "identity"
    ctx.bias_dtype = None if bias is None or rebuilds_y else bias.dtype
    ctx.save_for_backward(x, residual if rebuilds_y else None, weight, bias if rebuilds_y else None, mean, var)


def kept(ctx: Any) -> list[Any]:
    """x, residual, weight, bias, mean, var; for a bias that was not kept zeros, of which the gradient is the same."""
    x, residual, weight, bias, mean, var = ctx.saved_tensors
    if ctx.bias_dtype is not None:
        bias = x.new_zeros(ctx.bias_shape, dtype=ctx.bias_dtype).requires_grad_()
    return [x, residual, weight, bias, mean, var]
