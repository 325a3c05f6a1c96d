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

from .activation import activate_
from .inplace_abn_backward import _inplace_abn_backward, check_invertible_site
from .layout import memory_format_of
from .library import declare
from .normalise import check_has_values, normalise, refuse_statistics_gradient


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
    x = x.contiguous(memory_format=memory_format_of(x))
    return activate_(normalise(x, None, weight, bias, mean, var, eps), activation, activation_args)


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
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, _, var, *options = inputs
    refuse_statistics_gradient("inplace_abn", ctx, 3, options[1])
    ctx.options = options
    ctx.save_for_backward(output, weight, bias, var)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients: Any = _inplace_abn_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 6


_inplace_abn = declare(
    "inplace_abn(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
