"""`normpass::norm_act_backward`: the gradients of `norm_act` (its docstring has the algebra) from its input.

y is rebuilt by the code of forward and dy = grad·act'(y + residual). The kernels do this twice, in one pass for
the two sums and one for dx = a·(dy − S1/m − x̂·S2/m), and write nothing but the results. In the reference ATen's
BatchNorm backward does the sums and dx from a dy that is written out: at most two activation-sized tensors live
beside the results, none where the activation is the identity and the layouts agree. `grad` is never written to:
autograd may hand over an expanded one.

The gradient of this gradient differentiates a plain formula of `norm_act` twice, so it is right but keeps
what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels
from normpass.kernels.masks import gradient_by_mask, unpacked

from .activation import activate, activation_backward
from .layout import (
    check_like,
    in_statistics_dtype,
    memory_format_of,
    or_empty,
    per_channel,
    reduced_dims,
    statistics_dtype,
)
from .library import declare
from .normalize import check_has_values, check_site, normalize, refuse_statistics_gradient
from .operands import Options, can_run, dense, in_dtype_of, layout_of, new_like, new_per_channel, norm_operand

aten = torch.ops.aten

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, residual, weight and bias."""


def norm_act_backward(
    grad: Tensor,
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
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias.

    Args:
        grad: dL/dz, shape and dtype of `x`, any strides.
        residual: as given to `norm_act`; where the activation is the identity None will do.
        needs: which of the four gradients to compute; that of an absent weight or bias is not computed.
        The others: as given to `norm_act`.

    Returns:
        dx and dresidual in shape, dtype and memory format of `x`; dweight and dbias in shape and dtype of
        theirs. What is not needed is an empty tensor of shape (0,).

    Raises:
        ValueError: as `norm_act`, or `grad` does not match `x`.
    """
    dx, dresidual, dweight, dbias = _norm_act_backward(
        grad, x, residual, weight, bias, mean, var, eps, batch_statistics, activation, activation_args, needs
    )
    return dx, dresidual, dweight, dbias


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """dx, dweight and dbias from dy, each in its own dtype, None where `mask` is False."""
    targets = (x, weight, bias)
    if not any(mask) or x.numel() == 0:  # ATen divides by the number of values
        return [torch.zeros_like(t) if m and t is not None else None for t, m in zip(targets, mask, strict=True)]
    mean, var = mean.to(statistics_dtype(x)), var.to(statistics_dtype(x))
    scale, rstd = in_statistics_dtype(weight, x), torch.rsqrt(var + eps)
    results = aten.native_batch_norm_backward(dy, x, scale, mean, var, mean, rstd, batch_statistics, eps, mask)
    return [g.to(t.dtype) if m and t is not None else None for g, t, m in zip(results, targets, mask, strict=True)]


def _check(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation: str,
    activation_args: Sequence[float],
) -> None:
    op = "norm_act_backward"
    check_site(op, x, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    check_like(op, x, "grad", grad)
    check_like(op, x, "residual", residual)


def _reference(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernel(None, grad, *others)


def _reference_gradients(
    grad: Tensor,
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
    needs: Sequence[bool],
) -> Gradients:
    _check(grad, x, residual, weight, bias, mean, var, activation, activation_args)
    check_has_values("norm_act_backward", x, batch_statistics)
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    dy = grad
    if activation != "identity":
        y = normalize(x, residual, weight, bias, mean, var, eps)
        dy = activation_backward(grad, y, activation, activation_args, owns_y=True).to(x.dtype)
        del y  # before dx is allocated
    dy = dy.contiguous(memory_format=memory_format)
    mask = (needs[0], needs[2] and weight is not None, needs[3] and bias is not None)
    dx, dweight, dbias = _gradients(dy, x, weight, bias, mean, var, eps, batch_statistics, mask)
    if dy is grad and needs[1]:
        dy = grad.clone(memory_format=memory_format)  # an op must not return its argument
    return dx, dy if needs[1] else None, dweight, dbias


def norm_act_gradients(
    kernels: Kernels | None,
    grad: Tensor,
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
    needs: Sequence[bool],
    other: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """What `norm_act_backward` returns, not differentiable, with None for what is not needed or absent.

    Args:
        other: what is to be added to `grad`, in shape and dtype of x.
        mask: what forward's kernel wrote in the place of `residual`, which is None then.
    """
    values, options = (weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    runs = kernels is not None and can_run(kernels, x, (grad, other, residual), values, activation, activation_args)
    if other is not None and not (runs and kernels.adds_gradients):
        grad, other = grad + other, None
    if kernels is None or not runs or (mask is not None and activation not in kernels.masks):
        if mask is not None:
            grad, options = unmasked(mask, grad, x, options)
        return _reference_gradients(grad, x, residual, *values, *options, needs)
    memory_format, dtype = memory_format_of(x), statistics_dtype(x)
    dx, dresidual = new_like(x, memory_format, needs[0]), new_like(x, memory_format, needs[1])
    dweight, dbias = new_per_channel(weight, dtype, needs[2]), new_per_channel(bias, dtype, needs[3])
    if not any(needs):
        return None, None, None, None
    kernels.norm_act_backward(
        dx,
        dresidual,
        dweight,
        dbias,
        dense(grad, memory_format),
        dense(x, memory_format),
        dense(residual, memory_format),
        norm_operand(values, options, dtype),
        batch_statistics,
        layout_of(x, memory_format),
        *_more(dense(other, memory_format), mask),
    )
    return dx, dresidual, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)


def _more(other: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """The last arguments of the kernels, which not all of them take."""
    if mask is not None:
        return other, mask
    return () if other is None else (other,)


def unmasked(mask: Tensor, grad: Tensor, x: Tensor, options: Sequence[Any]) -> tuple[Tensor, Options]:
    """dy, differentiable in `grad`, and the options of what is left: a norm and the identity."""
    eps, batch_statistics, activation, activation_args = options
    memory_format = memory_format_of(x)
    passes = unpacked(mask, layout_of(x, memory_format), x.element_size())
    if memory_format is torch.contiguous_format:
        in_place = passes.view(x.shape)
    else:
        in_place = passes.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    dy = gradient_by_mask(grad, in_place, activation, activation_args)
    return dy, (eps, batch_statistics, "identity", ())


def _kernel(kernels: Kernels | None, grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = norm_act_gradients(kernels, grad, *others)
    dx, dresidual, dweight, dbias = (or_empty(result, grad) for result in results)
    return dx, dresidual, dweight, dbias


def _fake(
    grad: Tensor,
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
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(grad, x, residual, weight, bias, mean, var, activation, activation_args)
    memory_format = memory_format_of(x)
    results = []
    for like, needed in zip((x, x, weight, bias), needs, strict=True):
        if like is None or not needed:
            results.append(grad.new_empty(0))
        elif like is x:
            results.append(torch.empty_like(x, memory_format=memory_format))
        else:
            results.append(like.new_empty(like.shape))
    return results[0], results[1], results[2], results[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    refuse_statistics_gradient("norm_act_backward", ctx, 5, inputs[8])
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, residual, weight, bias, mean, var = ctx.saved_tensors
    *options, needs = ctx.options
    if residual is None and needs[1]:  # the identity does not need it: any value will do
        residual = torch.zeros_like(x)
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else _leaf(t) for t in (grad, x, residual, weight, bias)]
        z = norm_act_formula(leaves[1:], mean.detach(), var.detach(), *options)
        wanted = [
            (leaf, outer)
            for leaf, outer, needed in zip(leaves[1:], grads, needs, strict=True)
            if needed and leaf is not None and outer is not None
        ]
        if not wanted:
            return (None,) * 12
        inner = [leaf for leaf, _ in wanted]
        first = torch.autograd.grad(z, inner, leaves[0], create_graph=True, materialize_grads=True)
        sources = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
        second = torch.autograd.grad(
            first, sources, [outer for _, outer in wanted], create_graph=keep_graph, allow_unused=True
        )
    remaining = iter(second)
    return *(next(remaining) if needed else None for needed in ctx.needs_input_grad[:5]), *[None] * 7


def _leaf(t: Tensor) -> Tensor:
    """`t` at the root of a new graph, from which a third derivative still reaches `t`."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def norm_act_formula(
    tensors: Sequence[Any],
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    """`norm_act` of x, residual, weight and bias in differentiable operations."""
    x, residual, weight, bias = tensors
    wide = x.to(statistics_dtype(x))
    if batch_statistics:
        var, mean = torch.var_mean(wide, reduced_dims(x), correction=0)
    y = (wide - per_channel(mean, x)) * per_channel(torch.rsqrt(var + eps), x)
    if weight is not None:
        y = y * per_channel(weight, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    if residual is not None:
        y = y + residual
    return activate(y, activation, activation_args).to(x.dtype)


_norm_act_backward = declare(
    "norm_act_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, bool batch_statistics, str activation, float[] activation_args, bool[4] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_double_backward,
    setup_context=_setup_context,
)
