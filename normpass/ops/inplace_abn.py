"""`normpass::inplace_abn`: norm and activation that keep their output for backward (Rota Bulò et al. 2018).

Forward is `norm_act` without a residual. Backward gets back, from z and with the signed weight,

    y = act⁻¹(z)      x̂ = (y − bias)/weight      dy = g·act'(y)      S1 = Σdy      S2 = Σ dy·x̂

    dx = weight·r·(dy − S1/m − x̂·S2/m)      dweight = S2      dbias = S1      r = 1/sqrt(var + eps)

and dx = weight·r·dy for running statistics. The consumer of z keeps z anyway, so the site keeps nothing more;
the op is functional all the same, and nothing is written over. LOSSY: z is rounded, so x̂ is off by about
ulp(z)·|bias/weight|, measured for bias = 1 as 6e-6 RMS at weight 1e-2 in float32 and 0.015 at weight 1 in
bfloat16. The division alone is bounded, see `inplace_abn_backward`: the function stays that of the signed
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels

from .activation import activate_
from .eager import eager_device, no_gradients
from .inplace_abn_backward import _inplace_abn_backward, can_invert, check_invertible_site, inplace_abn_gradients
from .layout import activated_format, dense_in, memory_format_of, new_result, statistics_dtype
from .library import declare
from .normalize import check_has_values, normalize, refuse_statistics_gradient
from .operands import Options, dense, layout_of, norm_operand


def inplace_abn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
) -> Tensor:
    """z = act((x − mean)·rsqrt(var + eps)·weight + bias), an op that saves z and not `x`.

    Args:
        x: (N, C, *), floating.
        weight, bias: None or (C,), any floating dtype.
        mean, var, eps, batch_statistics: as for `norm_act`.
        activation, activation_args: an invertible `normpass.ops.Activation`.

    Returns:
        (N, C, *), dtype of `x`, channels_last where `x` is, otherwise contiguous. It must not be written to.

    Raises:
        ValueError: as `norm_act`, or the activation has no inverse.
        NotImplementedError: when a second derivative is taken.
    """
    z: Tensor = _inplace_abn(x, weight, bias, mean, var, eps, batch_statistics, activation, activation_args)
    return z


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation: str,
    activation_args: Sequence[float],
) -> None:
    values = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    check_invertible_site("inplace_abn", x, activation, activation_args, **values)


def _reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, weight, bias, mean, var, activation, activation_args)
    check_has_values("inplace_abn", x, batch_statistics)
    x = dense_in(x, activated_format(x, activation))
    return activate_(normalize(x, None, weight, bias, mean, var, eps), activation, activation_args)


def _kernel(
    kernels: Kernels | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    values, options = (weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    if kernels is None or not can_invert(kernels, x, (), values, activation, activation_args):
        return _reference(x, *values, *options)
    memory_format = memory_format_of(x)
    z = new_result(x, activation)
    kernels.norm_act(
        z,
        dense(x, memory_format),
        None,
        norm_operand(values, options, statistics_dtype(x)),
        layout_of(x, memory_format),
    )
    return z


class InplaceAbn(torch.autograd.Function):
    """The op and its gradient without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        device: str,
        options: Options,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options = options
        z = _kernel(kernels_for(device), x, weight, bias, mean, var, *options)
        ctx.save_for_backward(z, weight, bias, var)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        options: Options = ctx.options
        needs, tensors = ctx.needs_input_grad[:3], ctx.saved_tensors
        device = None if torch.is_grad_enabled() else eager_device(grad)
        if device is None:
            return *_gradients_by_op(grad, tensors, options, needs), *[None] * 4
        z, weight, bias, var = tensors
        results = inplace_abn_gradients(kernels_for(device), grad, z, weight, bias, var, *options, needs)
        return *results, None, None, None, None


def inplace_abn_on(
    device: str | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    """`inplace_abn` without the dispatcher where `device`, from `eager_device` of `x`, is not None."""
    tensors, options = (x, weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    if device is None or (not batch_statistics and (mean.requires_grad or var.requires_grad)):
        z: Tensor = _inplace_abn(*tensors, *options)
    elif torch.is_grad_enabled():
        z = InplaceAbn.apply(*tensors, device, options)
    else:
        z = _kernel(kernels_for(device), *tensors, *options)
    return z


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, weight, bias, mean, var, activation, activation_args)
    return new_result(x, activation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, _, var, *options = inputs
    refuse_statistics_gradient("inplace_abn", ctx, 3, options[1])
    ctx.options = options
    ctx.save_for_backward(output, weight, bias, var)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    return *_gradients_by_op(grad, ctx.saved_tensors, ctx.options, needs), *[None] * 6


def _gradients_by_op(
    grad: Tensor, tensors: Sequence[Tensor | None], options: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    gradients: Any = _inplace_abn_backward(grad, *tensors, *options, needs)
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


_inplace_abn = declare(
    "inplace_abn(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
