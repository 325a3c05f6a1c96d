"""`normpass::cat_norm_act_backward`: the gradients of `cat_norm_act`, one for each piece.

The algebra is that of `norm_act_backward`, channel by channel. The kernels split it differently: with c = x − mean
and r = rsqrt(var + eps),

    dxᵢ = a·dy + B·c + C        B = −a·r²/m·Σdy·c        C = −a/m·Σdy

a·dy and both sums are taken in one pass, and B·c + C is added in another (`add_statistics_gradient`). Where several
norms read one piece, that second pass is needed once for all of them: `shared_gradient` has the autograd of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels

from .layout import check_like, or_empty, statistics_dtype
from .library import declare
from .norm_act_backward import _reference_gradients
from .normalize import check_site
from .operands import Options, Values, dense, in_dtype_of, layout_of, new_per_channel, norm_operand, per_channel_operand
from .pieces import can_run_pieces, channels_of, check_pieces, concatenated, memory_format_of_pieces

Gradients = tuple[list[Tensor | None], Tensor | None, Tensor | None]
"""Of the pieces, weight and bias."""


def cat_norm_act_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of every piece, weight and bias. Not differentiable.

    Args:
        grad: dL/dz, (N, C, *), dtype of `xs`, any strides.
        needs: which gradients to compute: of each of `xs`, of weight, of bias.
        The others: as given to `cat_norm_act`.

    Returns:
        The gradients of `xs` in their shapes and dtype, in one memory format; dweight and dbias in shape and dtype
        of theirs. What is not needed or absent is an empty tensor of shape (0,).

    Raises:
        ValueError: as `cat_norm_act`, or `grad` does not match `xs`.
    """
    dxs, dweight, dbias = _cat_norm_act_backward(
        grad, list(xs), weight, bias, mean, var, eps, batch_statistics, activation, list(activation_args), needs
    )
    return dxs, dweight, dbias


def _reference(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    check_pieces("cat_norm_act_backward", xs)
    options = eps, batch_statistics, activation, activation_args
    *needed, of_weight, of_bias = needs
    whole = (any(needed), False, of_weight, of_bias)
    dx, _, dweight, dbias = _reference_gradients(grad, concatenated(xs), None, weight, bias, mean, var, *options, whole)
    dxs = [] if dx is None else dx.split([x.shape[1] for x in xs], 1)
    results = [
        # A copy: an op returns no views of one tensor.
        dxs[i].clone(memory_format=memory_format_of_pieces(xs)) if needed[i] else grad.new_empty(0)
        for i in range(len(xs))
    ]
    return results, or_empty(dweight, grad), or_empty(dbias, grad)


def accumulate(
    kernels: Kernels,
    grad: Tensor,
    xs: Sequence[Tensor],
    memory_format: torch.memory_format,
    dxs: Sequence[Tensor | None],
    adds: Sequence[bool],
    totals: Sequence[Tensor | None],
    values: Values,
    options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The first pass by `kernels`, which can run it: `Kernels.cat_norm_act_backward`. Returns dweight and dbias.

    `xs` and `dxs` are dense in `memory_format`; `values` are weight, bias, mean and var; `needs` says whether weight
    and bias need their gradients.
    """
    dtype, (weight, bias, *_) = statistics_dtype(xs[0]), values
    dweight, dbias = new_per_channel(weight, dtype, needs[0]), new_per_channel(bias, dtype, needs[1])
    grad = dense(grad, memory_format)
    kernels.cat_norm_act_backward(
        dxs,
        adds,
        totals,
        dweight,
        dbias,
        grad,
        xs,
        norm_operand(values, options, dtype),
        layout_of(grad, memory_format),
    )
    return in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)


def new_total(x: Tensor) -> Tensor:
    """B and C of a piece, (2, Cᵢ) in float64, to be summed up."""
    return torch.zeros((2, x.shape[1]), dtype=torch.float64, device=x.device)


def cat_norm_act_gradients(
    kernels: Kernels | None,
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> Gradients:
    """What `cat_norm_act_backward` returns, with None for what is not needed or absent."""
    values, options = (weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    if kernels is None or not can_run_gradient(kernels, grad, xs, values, activation, activation_args):
        dxs, dweight, dbias = _reference(grad, xs, *values, *options, needs)
        some = [dx if n else None for dx, n in zip(dxs, needs, strict=False)]
        there = (needs[-2] and weight is not None, needs[-1] and bias is not None)
        return some, dweight if there[0] else None, dbias if there[1] else None
    *needed, of_weight, of_bias = needs
    memory_format = memory_format_of_pieces(xs)
    xs = [dense(x, memory_format) for x in xs]
    results = [torch.empty_like(x, memory_format=memory_format) if n else None for x, n in zip(xs, needed, strict=True)]
    totals = [new_total(x) if n and batch_statistics else None for x, n in zip(xs, needed, strict=True)]
    targets = results, [False] * len(xs), totals
    parameters = of_weight, of_bias
    of_parameters = accumulate(kernels, grad, xs, memory_format, *targets, values, options, parameters)
    first = 0
    for x, dx, total in zip(xs, results, totals, strict=True):
        if dx is not None and total is not None:
            of_piece = per_channel_operand(mean[first : first + x.shape[1]], statistics_dtype(x))
            kernels.add_statistics_gradient(dx, x, of_piece, total, layout_of(x, memory_format))
        first += x.shape[1]
    return results, *of_parameters


def can_run_gradient(
    kernels: Kernels,
    grad: Tensor,
    xs: Sequence[Tensor],
    values: Sequence[Tensor | None],
    activation: str,
    activation_args: Sequence[float],
) -> bool:
    """Whether `kernels` can take these arguments as they are."""
    if not can_run_pieces(kernels, xs, values, activation, activation_args):
        return False
    first = xs[0]
    shape = (first.shape[0], channels_of(xs), *first.shape[2:])
    return grad.shape == shape and can_run_pieces(kernels, (first, grad), (), activation, activation_args)


def _kernel(
    kernels: Kernels | None, grad: Tensor, xs: Sequence[Tensor], *others: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    dxs, dweight, dbias = cat_norm_act_gradients(kernels, grad, xs, *others)
    return [or_empty(dx, grad) for dx in dxs], or_empty(dweight, grad), or_empty(dbias, grad)


def _fake(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    op = "cat_norm_act_backward"
    check_pieces(op, xs)
    memory_format = memory_format_of_pieces(xs)
    whole = torch.cat(list(xs), 1)
    check_site(op, whole, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    check_like(op, whole, "grad", grad)
    dxs = [
        torch.empty_like(x, memory_format=memory_format) if needed else grad.new_empty(0)
        for x, needed in zip(xs, needs, strict=False)
    ]
    dweight, dbias = (
        t.new_empty(t.shape) if t is not None and needed else grad.new_empty(0)
        for t, needed in zip((weight, bias), needs[-2:], strict=True)
    )
    return dxs, dweight, dbias


_cat_norm_act_backward = declare(
    "cat_norm_act_backward(Tensor grad, Tensor[] xs, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "float eps, bool batch_statistics, str activation, float[] activation_args, bool[] needs) "
    "-> (Tensor[], Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
)
