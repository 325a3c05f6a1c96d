"""The formulas of the kernels in plain torch: what runs in the place of a kernel that cannot.

Same contract as `Kernels`: results are written to the tensors named first. All is computed in the statistics dtype,
whole tensors at a time, so these need several times the memory that the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import InputNorm, Layout, Running
from normpass.kernels.masks import gradient_by_mask, packed, unpacked


def moments(mean: Tensor, var: Tensor, x: Tensor, layout: Layout, running: Running | None = None) -> None:
    of_x = torch.var_mean(_wide(x, layout), (0, 2), correction=0)
    var.copy_(of_x[0])
    mean.copy_(of_x[1])
    if running is not None:
        running_stats(running, mean, var, layout.outer * layout.inner)


def running_stats(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    momentum = running.momentum
    running.mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running.var.mul_(1 - momentum).add_(var, alpha=momentum * count / max(count - 1, 1))


def norm_act(
    z: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    layout: Layout,
    mask: Tensor | None = None,
    of_residual: InputNorm | None = None,
) -> None:
    y = _y(_wide(x, layout), _scale(weight, var, eps), bias, mean)
    if residual is not None:
        added = _wide(residual, layout)
        if of_residual is not None:
            other = of_residual
            added = _y(added, _scale(other.weight, other.var, other.eps), other.bias, other.mean)
        y = y + added.to(x.dtype)
    slopes = RULES[activation].two_slopes
    if mask is not None and slopes is not None:
        mask.copy_(packed(slopes.passes(y, *activation_args), x.element_size()))
    _view(z, layout).copy_(RULES[activation].forward(y, *activation_args))


def norm_act_backward(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
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
    layout: Layout,
    other: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    scale, wide = _scale(weight, var, eps), _wide(x, layout)
    if other is not None:
        grad = _view(grad, layout) + _view(other, layout)
    if mask is not None:
        passes = unpacked(mask, layout, x.element_size())
        dy = gradient_by_mask(_wide(grad, layout), passes, activation, activation_args)
    else:
        y = _y(wide, scale, bias, mean)
        if residual is not None:
            y = y + _wide(residual, layout)
        dy = _dy(_wide(grad, layout), y, activation, activation_args)
    if dresidual is not None:
        _view(dresidual, layout).copy_(dy)
    normalized = (wide - mean[:, None]) * torch.rsqrt(var + eps)[:, None]
    _write_gradients(dx, dweight, dbias, dy, normalized, scale, batch_statistics, layout)


def cat_norm_act(
    z: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    layout: Layout,
) -> None:
    y = _y(_concatenated(xs, layout), _scale(weight, var, eps), bias, mean)
    _view(z, layout).copy_(RULES[activation].forward(y, *activation_args))


def cat_norm_act_backward(
    dxs: Sequence[Tensor | None],
    adds: Sequence[bool],
    totals: Sequence[Tensor | None],
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    layout: Layout,
) -> None:
    scale, wide = _scale(weight, var, eps), _concatenated(xs, layout)
    rstd = torch.rsqrt(var + eps)
    dy = _dy(_wide(grad, layout), _y(wide, scale, bias, mean), activation, activation_args)
    s1, s2 = dy.sum((0, 2)), (dy * (wide - mean[:, None]) * rstd[:, None]).sum((0, 2))
    if dweight is not None:
        dweight.copy_(s2)
    if dbias is not None:
        dbias.copy_(s1)
    count = layout.outer * layout.inner
    through_statistics = torch.stack([-scale * rstd * (s2 / count), -scale * (s1 / count)])
    first = 0
    for dx, add, total, x in zip(dxs, adds, totals, xs, strict=True):
        own = slice(first, first + x.shape[1])
        if dx is not None:
            target, part = _view(dx, _of_piece(x, layout)), scale[own, None] * dy[:, own]
            target.copy_(target + part if add else part)
        if total is not None:
            total.add_(through_statistics[:, own])
        first = own.stop


def add_statistics_gradient(dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, layout: Layout) -> None:
    slope, shift = total.to(mean.dtype)[..., None]
    target = _view(dx, layout)
    target.copy_(target + (_wide(x, layout) - mean[:, None]) * slope + shift)


def inplace_abn_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    layout: Layout,
) -> None:
    inverse = RULES[activation].inverse
    assert inverse is not None
    y = inverse(_wide(z, layout), *activation_args)
    dy = _dy(_wide(grad, layout), y, activation, activation_args)
    normalized = y if bias is None else y - bias[:, None]
    if weight is not None:
        magnitude = weight.abs().clamp(min=torch.finfo(weight.dtype).eps)
        normalized = normalized / torch.where(weight < 0, -magnitude, magnitude)[:, None]
    _write_gradients(dx, dweight, dbias, dy, normalized, _scale(weight, var, eps), batch_statistics, layout)


def _view(t: Tensor, layout: Layout) -> Tensor:
    """`t` as (outer, channels, inner), as it lies in memory."""
    return t.as_strided(layout, (layout.channels * layout.inner, layout.inner, 1), t.storage_offset())


def _wide(t: Tensor, layout: Layout) -> Tensor:
    """The values in the statistics dtype."""
    return _view(t, layout).to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _of_piece(x: Tensor, layout: Layout) -> Layout:
    return layout._replace(channels=x.shape[1])


def _concatenated(xs: Sequence[Tensor], layout: Layout) -> Tensor:
    return torch.cat([_wide(x, _of_piece(x, layout)) for x in xs], 1)


def _scale(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    return rstd if weight is None else weight * rstd


def _y(x: Tensor, scale: Tensor, bias: Tensor | None, mean: Tensor) -> Tensor:
    y = (x - mean[:, None]) * scale[:, None]
    return y if bias is None else y + bias[:, None]


def _dy(grad: Tensor, y: Tensor, activation: str, args: Sequence[float]) -> Tensor:
    rule = RULES[activation]
    return rule.backward(grad, rule.forward(y, *args) if rule.backward_reads_output else y, *args)


def _write_gradients(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dy: Tensor,
    normalized: Tensor,
    scale: Tensor,
    batch_statistics: bool,
    layout: Layout,
) -> None:
    """From dy, x̂ and a. Without the batch's statistics dx does not read x̂: 0·∞ would be NaN."""
    through_sums = batch_statistics and dx is not None
    s1 = dy.sum((0, 2)) if through_sums or dbias is not None else dy
    s2 = (dy * normalized).sum((0, 2)) if through_sums or dweight is not None else dy
    if dbias is not None:
        dbias.copy_(s1)
    if dweight is not None:
        dweight.copy_(s2)
    if dx is None:
        return
    if batch_statistics:
        count = layout.outer * layout.inner
        dy = dy - (s1 / count)[:, None] - normalized * (s2 / count)[:, None]
    _view(dx, layout).copy_(scale[:, None] * dy)
