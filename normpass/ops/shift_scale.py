"""`normpass::shift_scale`: y = (x − mean)·scale + bias with statistics that have a gradient of their own.

For norms whose mean and variance are not just the moments of their own input: mean and scale may differ from
sample to sample, and autograd carries their gradients on to wherever they come from.

    dx = g·scale    dmean = −scale·Σg    dscale = Σ g·(x − mean)    dbias = Σg

It keeps x and nothing else of that size; x − mean is subtracted before it is scaled, so that a mean far from 0
costs no digits. 16-bit input is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels
from normpass.onlookers import is_exporting

from .layout import check_input, check_per_channel, memory_format_of, statistics_dtype
from .library import declare


def shift_scale(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(x − mean)·scale + bias.

    Args:
        x: (N, C, *), floating.
        mean, scale: (N, C), or (1, C) for all samples; the statistics' dtype (float64 for float64, else float32).
        bias: None or (C,), any floating dtype.

    Returns:
        (N, C, *), dtype and layout of `x`.

    Raises:
        ValueError: a shape other than these.
    """
    if is_exporting():
        return _computed(x, mean, scale, bias)
    y: Tensor = _shift_scale(x, mean, scale, bias)
    return y


def _check(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    check_input("shift_scale", x)
    check_per_channel("shift_scale", x, bias=bias)
    for name, values in {"mean": mean, "scale": scale}.items():
        if values.dim() != 2 or values.shape[1] != x.shape[1] or values.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"normpass::shift_scale: `{name}` must have shape ({x.shape[0]} or 1, {x.shape[1]}) for `x` "
                f"{tuple(x.shape)}, got {tuple(values.shape)}"
            )


def _spatial(values: Tensor, x: Tensor) -> Tensor:
    """(N, C) or (C,) as a view that broadcasts with `x`."""
    return values.reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def _computed(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = (x - _spatial(mean, x)) * _spatial(scale, x)
    return (y if bias is None else y + _spatial(bias, x)).to(x.dtype)


def _reference(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, mean, scale, bias)
    memory_format = memory_format_of(x)
    y = torch.sub(x.contiguous(memory_format=memory_format), _spatial(mean, x)).mul_(_spatial(scale, x))
    if bias is not None:
        y = y.add_(_spatial(bias, x))
    return y.to(x.dtype).contiguous(memory_format=memory_format)


def _kernel(kernels: Kernels | None, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return _reference(x, mean, scale, bias)


def _fake(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, mean, scale, bias)
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, scale, bias = inputs
    ctx.save_for_backward(x, mean, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, scale = ctx.saved_tensors
    need_x, need_mean, need_scale, need_bias = ctx.needs_input_grad
    dtype = statistics_dtype(x)
    grad_x = (grad * _spatial(scale, x)).to(x.dtype) if need_x else None
    spatial = list(range(2, x.dim()))
    sums = None
    if need_mean or need_bias:  # (N, C)
        sums = grad.sum(spatial, dtype=dtype) if spatial else grad.to(dtype)
    grad_mean = _like(-scale * sums, mean) if need_mean and sums is not None else None
    grad_scale = None
    if need_scale:
        product = grad * (x - _spatial(mean, x))
        grad_scale = _like(product.sum(spatial) if spatial else product, scale)
    grad_bias = sums.sum(0).to(ctx.bias_dtype) if need_bias and sums is not None else None
    return grad_x, grad_mean, grad_scale, grad_bias


def _like(gradient: Tensor, values: Tensor) -> Tensor:
    """Summed over the samples, where `values` are the same for all of them."""
    return gradient.sum(0, keepdim=True) if values.shape[0] == 1 and gradient.shape[0] != 1 else gradient


_shift_scale = declare(
    "shift_scale(Tensor x, Tensor mean, Tensor scale, Tensor? bias) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
