"""`normpass::norm_act`: normalise, scale and shift, add a residual, activate; keeps its input for backward.

Per channel, with m = N·spatial values and r = 1/sqrt(var + eps):

    x̂ = (x − mean)·r      a = weight·r      y = a·(x − mean) + bias      z = act(y + residual)

Backward from g = dL/dz. dy = g·act'(y + residual), which is the residual's gradient too; S1 = Σdy, S2 =
Σdy·x̂; dbias = S1, dweight = S2, and

    dx = A·dy + B·x + C    A = a,  B = −a·r·S2/m,  C = −a·S1/m − B·mean    (mean and var are x's own moments)
    dx = a·dy                                                              (running statistics)

(Ioffe and Szegedy 2015). With `batch_statistics` the op owns the gradient of mean and var: it is inside dx,
and their own gradients are None. So autograd keeps x (and the residual, where act' needs it) and never z: y
is rebuilt in backward by the code of forward, bit for bit, so a ReLU's mask is the same in both.

In 16 bits y, the sum and z are each rounded to x's dtype, as in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import activate_
from .layout import check_like, memory_format_of
from .library import declare
from .norm_act_backward import _norm_act_backward
from .normalise import check_has_values, check_site, normalise, refuse_statistics_gradient


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
) -> Tensor:
    """z = act((x − mean)·rsqrt(var + eps)·weight + bias + residual).

    Args:
        x: (N, C, *), floating.
        residual: None, or shape and dtype of `x`, in any layout.
        weight, bias: None or (C,), any floating dtype.
        mean, var: (C,), the biased variance; float32 for 16-bit `x` to keep its accuracy.
        eps: added to `var`.
        batch_statistics: `mean` and `var` are the moments of this `x`, and the gradient of `x` goes through
            them. Otherwise they are constants.
        activation, activation_args: a name of `normpass.ops.Activation` and its arguments.

    Returns:
        (N, C, *), dtype of `x`, channels_last where `x` is, otherwise contiguous.

    Raises:
        ValueError: a shape, dtype or activation other than these; an empty `x` with `batch_statistics`;
            `mean` or `var` that require a gradient without `batch_statistics`, which this op would not give
            them.
    """
    z: Tensor = _norm_act(x, residual, weight, bias, mean, var, eps, batch_statistics, activation, activation_args)
    return z


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation: str,
    activation_args: Sequence[float],
) -> None:
    check_site("norm_act", x, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    check_like("norm_act", x, "residual", residual)


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, residual, weight, bias, mean, var, activation, activation_args)
    check_has_values("norm_act", x, batch_statistics)
    x = x.contiguous(memory_format=memory_format_of(x))
    return activate_(normalise(x, residual, weight, bias, mean, var, eps), activation, activation_args)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, residual, weight, bias, mean, var, activation, activation_args)
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, bias, mean, var, *options = inputs
    _, batch_statistics, activation, _ = options
    refuse_statistics_gradient("norm_act", ctx, 4, batch_statistics)
    ctx.options = options
    ctx.save_for_backward(x, None if activation == "identity" else residual, weight, bias, mean, var)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    gradients: Any = _norm_act_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 6


_norm_act = declare(
    "norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
