"""The formulas of `SampleNorms` in plain torch: what runs in the place of a kernel that cannot, as in `plain.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import Groups, Norm, Rows


def group_norm_act(z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, groups: Groups) -> None:
    _forward(z, x, residual, norm, is_given, groups, True)


def group_norm_act_backward(
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    groups: Groups,
) -> None:
    _backward((dx, dresidual, dweight, dbias), grad, x, residual, norm, groups, True)


def row_norm_act(z: Tensor, x: Tensor, norm: Norm, is_given: bool, rows: Rows) -> None:
    _forward(z, x, None, norm, is_given, _as_groups(rows), rows.is_centred)


def row_norm_act_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    rows: Rows,
) -> None:
    _backward((dx, None, dweight, dbias), grad, x, None, norm, _as_groups(rows), rows.is_centred)


def _forward(
    z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, groups: Groups, is_centred: bool
) -> None:
    wide = _wide(x, groups)
    assert norm.mean is not None
    if not is_given:
        norm.mean.view(-1).copy_(wide.mean((2, 3)).view(-1) if is_centred else torch.zeros_like(norm.mean).view(-1))
        norm.var.view(-1).copy_((wide - _of_groups(norm.mean, groups)).square().mean((2, 3)).view(-1))
    y = _y(_normalized(wide, norm, groups), norm, groups)
    if residual is not None:
        y = y + _wide(residual, groups)
    _view(z, groups).copy_(RULES[norm.activation].forward(y, *norm.activation_args))


def _backward(
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    groups: Groups,
    is_centred: bool,
) -> None:
    dx, dresidual, dweight, dbias = outputs
    rule, args, normalized = RULES[norm.activation], norm.activation_args, _normalized(_wide(x, groups), norm, groups)
    y = _y(normalized, norm, groups)
    if residual is not None:
        y = y + _wide(residual, groups)
    dy = rule.backward(_wide(grad, groups), rule.forward(y, *args) if rule.backward_reads_output else y, *args)
    if dresidual is not None:
        _view(dresidual, groups).copy_(dy)
    if dweight is not None:
        dweight.view(-1).copy_((dy * normalized).sum((0, 3)).view(-1))
    if dbias is not None:
        dbias.view(-1).copy_(dy.sum((0, 3)).view(-1))
    if dx is None:
        return
    scaled = dy if norm.weight is None else dy * _of_channels(norm.weight, groups)
    rest = scaled - normalized * (scaled * normalized).mean((2, 3), keepdim=True)
    if is_centred:
        rest = rest - scaled.mean((2, 3), keepdim=True)
    _view(dx, groups).copy_(_rstd(norm, groups) * rest)


def _as_groups(rows: Rows) -> Groups:
    return Groups(rows.rows, 1, rows.width, 1, True)


def _view(t: Tensor, groups: Groups) -> Tensor:
    """`t` as (samples, groups, channels of a group, spatial)."""
    samples, count, channels, spatial, is_rows = groups
    of_channel, of_spatial = (1, channels) if is_rows else (spatial, 1)
    size, of_sample, of_group = channels // count, channels * spatial, channels // count * of_channel
    return t.as_strided(
        (samples, count, size, spatial), (of_sample, of_group, of_channel, of_spatial), t.storage_offset()
    )


def _wide(t: Tensor, groups: Groups) -> Tensor:
    """The values in the statistics dtype."""
    return _view(t, groups).to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _of_groups(values: Tensor, groups: Groups) -> Tensor:
    return values.view(groups.samples, groups.groups, 1, 1)


def _of_channels(values: Tensor, groups: Groups) -> Tensor:
    return values.view(1, groups.groups, -1, 1)


def _rstd(norm: Norm, groups: Groups) -> Tensor:
    return torch.rsqrt(_of_groups(norm.var, groups) + norm.eps)


def _normalized(x: Tensor, norm: Norm, groups: Groups) -> Tensor:
    assert norm.mean is not None
    return (x - _of_groups(norm.mean, groups)) * _rstd(norm, groups)


def _y(normalized: Tensor, norm: Norm, groups: Groups) -> Tensor:
    y = normalized if norm.weight is None else normalized * _of_channels(norm.weight, groups)
    return y if norm.bias is None else y + _of_channels(norm.bias, groups)
