"""The formulas of the kernels in plain torch: what runs in the place of a kernel that cannot.

Same contract as `Kernels`: results are written to the tensors named first. All is computed in the statistics dtype,
whole tensors at a time, so these need several times the memory that the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import Layout, Norm, Running
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
    norm: Norm,
    layout: Layout,
    mask: Tensor | None = None,
    of_residual: Norm | None = None,
) -> None:
    y = _y(_wide(x, layout), norm)
    if residual is not None:
        added = _wide(residual, layout)
        if of_residual is not None:
            added = _y(added, of_residual)
        y = y + added.to(x.dtype)
    rule = RULES[norm.activation]
    if mask is not None and rule.two_slopes is not None:
        mask.copy_(packed(rule.two_slopes.passes(y, *norm.activation_args), x.element_size()))
    _view(z, layout).copy_(rule.forward(y, *norm.activation_args))


def norm_act_backward(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    batch_statistics: bool,
    layout: Layout,
    other: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    wide = _wide(x, layout)
    if other is not None:
        grad = _view(grad, layout) + _view(other, layout)
    if mask is not None:
        passes = unpacked(mask, layout, x.element_size())
        dy = gradient_by_mask(_wide(grad, layout), passes, norm.activation, norm.activation_args)
    else:
        y = _y(wide, norm)
        if residual is not None:
            y = y + _wide(residual, layout)
        dy = _dy(_wide(grad, layout), y, norm)
    if dresidual is not None:
        _view(dresidual, layout).copy_(dy)
    normalized = (wide - _mean(norm)) * _rstd(norm)[:, None]
    _write_gradients(dx, dweight, dbias, dy, normalized, _scale(norm), batch_statistics, layout)


def cat_norm_act(
    z: Tensor,
    xs: Sequence[Tensor],
    norm: Norm,
    layout: Layout,
) -> None:
    y = _y(_concatenated(xs, layout), norm)
    _view(z, layout).copy_(RULES[norm.activation].forward(y, *norm.activation_args))


def cat_norm_act_backward(
    dxs: Sequence[Tensor | None],
    adds: Sequence[bool],
    totals: Sequence[Tensor | None],
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    xs: Sequence[Tensor],
    norm: Norm,
    layout: Layout,
) -> None:
    wide, scale, rstd = _concatenated(xs, layout), _scale(norm), _rstd(norm)
    dy = _dy(_wide(grad, layout), _y(wide, norm), norm)
    s1, s2 = dy.sum((0, 2)), (dy * (wide - _mean(norm)) * rstd[:, None]).sum((0, 2))
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
    norm: Norm,
    batch_statistics: bool,
    layout: Layout,
) -> None:
    inverse, weight, bias = RULES[norm.activation].inverse, norm.weight, norm.bias
    assert inverse is not None
    y = inverse(_wide(z, layout), *norm.activation_args)
    dy = _dy(_wide(grad, layout), y, norm)
    normalized = y if bias is None else y - bias[:, None]
    if weight is not None:
        magnitude = weight.abs().clamp(min=torch.finfo(weight.dtype).eps)
        normalized = normalized / torch.where(weight < 0, -magnitude, magnitude)[:, None]
    _write_gradients(dx, dweight, dbias, dy, normalized, _scale(norm), batch_statistics, layout)


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


def _mean(norm: Norm) -> Tensor:
    assert norm.mean is not None
    return norm.mean[:, None]


def _rstd(norm: Norm) -> Tensor:
    return torch.rsqrt(norm.var + norm.eps)


def _scale(norm: Norm) -> Tensor:
    return _rstd(norm) if norm.weight is None else norm.weight * _rstd(norm)


def _y(x: Tensor, norm: Norm) -> Tensor:
    y = (x - _mean(norm)) * _scale(norm)[:, None]
    return y if norm.bias is None else y + norm.bias[:, None]


def _dy(grad: Tensor, y: Tensor, norm: Norm) -> Tensor:
    rule, args = RULES[norm.activation], norm.activation_args
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
