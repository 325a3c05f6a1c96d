"""`normpass::cat_norm_act`: `norm_act` of a concatenation along the channels, from its pieces.

    z = act((cat(x₁, …, xₙ) − mean)·a + bias)        a = weight·rsqrt(var + eps)

The concatenation itself is never kept, and the kernels never store it: every piece is read where it lies and
normalized straight into its channels of z. The algebra is `norm_act`'s, channel by channel: mean and var of a
concatenated channel are those of its piece, so whoever computes them needs each piece only once however many norms
read it (arXiv 1807.01702, "inter-composite-layer fusion" of DenseNet). Backward is `cat_norm_act_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels

from .cat_norm_act_backward import _cat_norm_act_backward
from .layout import statistics_dtype
from .library import declare
from .norm_act import _reference as _norm_act_reference
from .norm_act_backward import _norm_act_backward
from .normalize import check_site, refuse_statistics_gradient
from .operands import Options, Values, dense, layout_of, norm_operand
from .pieces import (
    can_run_pieces,
    check_pieces,
    concatenated,
    memory_format_of_pieces,
    new_concatenation,
)


def cat_norm_act(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
) -> Tensor:
    """z = act((cat(xs) − mean)·rsqrt(var + eps)·weight + bias), the concatenation along dimension 1.

    Args:
        xs: (N, Cᵢ, *) each, floating, of one dtype and one shape but for Cᵢ; one at least. C = ΣCᵢ.
        weight, bias: None or (C,), any floating dtype.
        mean, var: (C,), the biased variance; float32 for 16-bit `xs` to keep its accuracy.
        eps: added to `var`.
        batch_statistics: `mean` and `var` are the moments of these `xs`, and the gradient goes through them.
            Otherwise they are constants.
        activation, activation_args: a name of `normpass.ops.Activation` and its arguments.

    Returns:
        (N, C, *), dtype of `xs`, channels_last where all of `xs` are, otherwise contiguous.

    Raises:
        ValueError: no pieces, or a shape, dtype or activation other than these; empty `xs` with
            `batch_statistics`; `mean` or `var` that require a gradient without `batch_statistics`.
    """
    z: Tensor = _cat_norm_act(
        list(xs), weight, bias, mean, var, eps, batch_statistics, activation, list(activation_args)
    )
    return z


def _reference(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    check_pieces("cat_norm_act", xs)
    options = eps, batch_statistics, activation, activation_args
    whole = concatenated(xs)
    check_site("cat_norm_act", whole, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    return _norm_act_reference(whole, None, weight, bias, mean, var, *options)


def cat_norm_act_by(
    kernels: Kernels | None,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    """The op by `kernels`, by the reference where they are None or cannot; not differentiable."""
    values, options = (weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    if kernels is None or not can_run_pieces(kernels, xs, values, activation, activation_args):
        return _reference(xs, *values, *options)
    memory_format = memory_format_of_pieces(xs)
    return run_cat_norm_act(kernels, [dense(x, memory_format) for x in xs], memory_format, values, options)


def run_cat_norm_act(
    kernels: Kernels,
    xs: Sequence[Tensor],
    memory_format: torch.memory_format,
    values: Values,
    options: Options,
) -> Tensor:
    """The op by `kernels`, of pieces that are known to be dense in `memory_format`; not differentiable."""
    z = new_concatenation(xs, memory_format)
    kernels.cat_norm_act(z, xs, norm_operand(values, options, statistics_dtype(z)), layout_of(z, memory_format))
    return z


def _fake(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    check_pieces("cat_norm_act", xs)
    z = new_concatenation(xs, memory_format_of_pieces(xs))
    check_site("cat_norm_act", z, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    return z


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, weight, bias, mean, var, *options = inputs
    refuse_statistics_gradient("cat_norm_act", ctx, len(xs) + 2, options[1])  # counted one by one
    ctx.options = options
    ctx.save_for_backward(*xs, weight, bias, mean, var)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, weight, bias, mean, var = ctx.saved_tensors
    of_pieces, *of_parameters = ctx.needs_input_grad[:3]
    needs = [*of_pieces, *of_parameters]
    dxs, dweight, dbias = gradients_by_op(grad, xs, (weight, bias, mean, var), ctx.options, needs)
    of_arguments: list[None] | None = None if ctx.options[3] else []  # PyTorch takes an empty list for one of tensors
    return dxs, dweight, dbias, *[None] * 5, of_arguments


def gradients_by_op(
    grad: Tensor,
    xs: Sequence[Tensor],
    values: Sequence[Tensor | None],
    options: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """The gradients through the dispatcher; where a gradient of them may be asked for, those of the concatenation."""
    *of_pieces, of_weight, of_bias = needs
    if torch.is_grad_enabled():
        whole = torch.cat(list(xs), 1)
        wanted = (any(of_pieces), False, of_weight, of_bias)
        dx, _, dweight, dbias = _norm_act_backward(grad, whole, None, *values, *options, wanted)
        dxs = dx.split([x.shape[1] for x in xs], 1) if wanted[0] else [None] * len(xs)
    else:
        dxs, dweight, dbias = _cat_norm_act_backward(grad, list(xs), *values, *options, needs)
    some = [dx if needed else None for dx, needed in zip(dxs, of_pieces, strict=True)]
    return some, dweight if of_weight else None, dbias if of_bias else None


_cat_norm_act = declare(
    "cat_norm_act(Tensor[] xs, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=cat_norm_act_by,
    backward=_backward,
    setup_context=_setup_context,
)
