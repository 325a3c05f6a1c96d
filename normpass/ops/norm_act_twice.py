"""`norm_act` whose result is handed out twice: one memory, two tensors, each for one reader.

    z, z' = act(norm(x) + residual)        g = dL/dz of the one reader, g' = dL/dz' of the other

Autograd adds what comes back for one tensor in a pass of its own: it reads g and g' and writes their sum, which
backward then reads. Of two tensors the gradients come back apart, and the kernels add them while they read: two array
moves fewer. The sum of two numbers does not depend on their order, and it is rounded as if it had been stored, so every
gradient is the same to the bit.

Nobody may write to either tensor: z' is a view that autograd does not know as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for

from .eager import eager_device
from .norm_act import _forward, _gradients_by_op, _saved, norm_act_on
from .norm_act_backward import norm_act_gradients
from .operands import Options


class NormActTwice(torch.autograd.Function):
    """The op and its gradient without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        device: str,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # a reader that no gradient goes through has none
        z = _forward(ctx, device, options, x, residual, weight, bias, mean, var)
        return z, z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            grad, other = other, None
        if grad is None:
            return (None,) * 8
        options: Options = ctx.options
        needs, (tensors, mask) = ctx.needs_input_grad[:4], _saved(ctx)
        device = None if torch.is_grad_enabled() else eager_device(grad, other)
        if device is None:
            whole = grad if other is None else grad + other
            return *_gradients_by_op(whole, tensors, options, needs, mask), *[None] * 4
        return *norm_act_gradients(kernels_for(device), grad, *tensors, *options, needs, other, mask), *[None] * 4


def hands_out_twice(device: str | None) -> bool:
    """Whether it pays: where kernels add gradients while they read them, and a gradient is wanted."""
    kernels = None if device is None else kernels_for(device)
    return kernels is not None and kernels.adds_gradients and torch.is_grad_enabled()


def norm_act_twice(
    device: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """z and z', where `hands_out_twice(device)`; the arguments are those of `norm_act_on`."""
    if not options[1] and (mean.requires_grad or var.requires_grad):
        z = norm_act_on(device, x, residual, weight, bias, mean, var, *options)
        return z, z
    results: tuple[Tensor, Tensor] = NormActTwice.apply(x, residual, weight, bias, mean, var, device, options)
    return results
