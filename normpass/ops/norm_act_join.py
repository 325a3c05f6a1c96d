"""A residual join of two norms: z = act(norm(x) + norm'(x')), x' normalized as it is read.

Backward is that of its two halves: of `norm_act` with the mask of act', whose gradient of the residual is dy, and of
norm' alone from dy. So norm'(x') is neither written, kept nor rebuilt: two array moves fewer in forward, and two in
every rebuild of z. Each gradient is the same to the bit.

For kernels that normalize residuals, of activations with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels

from .eager import eager_device
from .layout import memory_format_of, new_result, statistics_dtype
from .norm_act import _gradients_by_op, new_mask, norm_act_on
from .norm_act_backward import norm_act_gradients
from .operands import can_run, layout_of, norm_operand

Half = tuple[Any, ...]
"""The arguments of `norm_act`, without a residual: x, None, weight, bias, mean, var, eps, batch_statistics, …"""

_TENSORS = 5  # of a half: x, weight, bias, mean, var


def can_join(device: str | None, own: Half, other: Half) -> bool:
    """Whether `join_norms` takes these, whose sum lies as either of them."""
    kernels = None if device is None else kernels_for(device)
    if kernels is None or not kernels.normalizes_residuals or own[8] not in kernels.masks:
        return False
    x, residual = own[0], other[0]
    memory_format = memory_format_of(x)
    if 1 in x.shape or not all([t.is_contiguous(memory_format=memory_format) for t in (x, residual)]):
        return False
    if (x.data_ptr() | residual.data_ptr()) % 16 or any([_refuses(half) for half in (own, other)]):
        return False
    return can_run(kernels, x, (residual,), (*own[2:6], *other[2:6]), *own[8:])


def _refuses(half: Half) -> bool:
    """Whether the statistics want a gradient that is not theirs."""
    return not half[7] and any([t is not None and t.requires_grad for t in half[4:6]])


def join_norms(device: str, own: Half, other: Half) -> Tensor:
    """z of two halves for which `can_join`."""
    z: Tensor = _JoinNorms.apply(*_tensors(own), *_tensors(other), device, own[6:], other[6:])
    return z


def join_norms_twice(device: str, own: Half, other: Half) -> tuple[Tensor, Tensor]:
    """The same for two readers, as `norm_act_twice`."""
    both: tuple[Tensor, Tensor] = _JoinNormsTwice.apply(*_tensors(own), *_tensors(other), device, own[6:], other[6:])
    return both


def rebuild_join(own: Half, other: Half) -> Tensor:
    """z once more: what a recipe calls."""
    device = eager_device(own[0], other[0])
    if device is None or not can_join(device, own, other):
        return norm_act_on(device, own[0], norm_act_on(device, *other), *own[2:])
    return _computed(kernels_for(device), False, own, other)[0]


def _tensors(half: Half) -> tuple[Tensor | None, ...]:
    return half[0], *half[2:6]


def _computed(kernels: Kernels | None, wants_mask: bool, own: Half, other: Half) -> tuple[Tensor, Tensor | None]:
    x, residual, dtype = own[0], other[0], statistics_dtype(own[0])
    z, layout = new_result(x, own[8]), layout_of(x, memory_format_of(x))
    assert kernels is not None
    mask = new_mask(kernels, x, residual, own[8], layout) if wants_mask else None
    norm, of_residual = (norm_operand(half[2:6], half[6:], dtype) for half in (own, other))
    kernels.norm_act(z, x, residual, norm, layout, mask, of_residual)
    return z, mask


def _forward(ctx: Any, *args: Any) -> Tensor:
    own, other, device, options, options_of_other = (
        args[:_TENSORS],
        args[_TENSORS : 2 * _TENSORS],
        *args[2 * _TENSORS :],
    )
    halves = [(t[0], None, *t[1:], *more) for t, more in ((own, options), (other, options_of_other))]
    z, mask = _computed(kernels_for(device), True, *halves)
    ctx.options, ctx.bias_dtypes = (
        (options, options_of_other),
        [t if t is None else t.dtype for t in (own[2], other[2])],
    )
    saved = [(x, weight, mean, var) for x, weight, _, mean, var in (own, other)]
    ctx.save_for_backward(mask, *saved[0], *saved[1])
    return z


def _backward(ctx: Any, grad: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        grad, more = more, None
    if grad is None:
        return (None,) * 13
    mask, *saved = ctx.saved_tensors
    own, other = (_half(saved[4 * i : 4 * i + 4], ctx.bias_dtypes[i]) for i in (0, 1))
    needs, needs_of_other = ctx.needs_input_grad[:3], ctx.needs_input_grad[_TENSORS : _TENSORS + 3]
    device = None if torch.is_grad_enabled() else eager_device(grad, more)
    needs = needs[0], any(needs_of_other), *needs[1:]
    dx, dy, *of_values = _gradients(device, grad, own, ctx.options[0], needs, more, mask)
    found: list[Tensor | None] = [None, None, None]
    if dy is not None:
        of_norm = needs_of_other[0], False, *needs_of_other[1:]
        first, _, *rest = _gradients(device, dy, other, ctx.options[1], of_norm)
        found = [first, *rest]
    return dx, *of_values, None, None, *found, *[None] * 5


def _half(saved: Sequence[Any], bias_dtype: torch.dtype | None) -> Half:
    """x, no residual, weight, bias, mean, var; a bias of its shape and dtype, which no backward here reads."""
    x, weight, mean, var = saved
    return x, None, weight, None if bias_dtype is None else mean.detach().to(bias_dtype), mean, var


def _gradients(
    device: str | None,
    grad: Tensor,
    half: Half,
    options: Sequence[Any],
    needs: Sequence[bool],
    more: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    if device is None:
        whole = grad if more is None else grad + more
        return _gradients_by_op(whole, half, options, needs, mask)  # type: ignore[arg-type]
    x, residual, weight, bias, mean, var = half
    values = weight, bias, mean, var
    eps, of_batch, name, args = options
    return norm_act_gradients(
        kernels_for(device), grad, x, residual, *values, eps, of_batch, name, args, needs, more, mask
    )


class _JoinNorms(torch.autograd.Function):
    """Both norms, each with its tensors, then the device and the options of each."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        return _forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, None)


class _JoinNormsTwice(torch.autograd.Function):
    """The same with two results of one memory."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # a reader that no gradient goes through has none
        z = _forward(ctx, *args)
        return z, z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, other)
