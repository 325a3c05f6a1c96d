"""Batch norm, activation, convolution and the moments of the result, block by block.

    z = act(norm(x));  c = conv(z);  mean, var = moments(c)        for one block of rows or samples after another

Between two norms in train mode this is all that can be divided, since a norm needs the moments of its whole input:
the exact region between two barriers. A block of z is still in the cache when the convolution reads it, and a block
of c when its moments are taken, so x is read and c written once, where separate layers move x, z twice and c twice:
the traffic of batch norm restructured (arXiv 1807.01702: statistics with the producer's write, normalization with
the consumer's read), with the vendor's convolutions. Blocks are rows of a 1×1 convolution in channels_last, samples
otherwise; the moments of blocks are merged by Chan's formula.

Backward, with dc = dL/dc, rebuilds each block of z from x and sums the weight's gradient; dz of the block gives
dy = dz·act'(y), of which a·dy is written and S1 = Σdy, S2 = Σdy·x̂ are summed. With those of all blocks

    dx = a·dy − a·S1/m − (a·r·S2/m)·(x − mean)                       (x̂ = (x − mean)·r, a = weight·r)

Kept: x. `normpass.ops.norm_act` has the algebra; c's moments have no gradient of their own, since the norm that
takes them owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.ops.eager import eager_device, gradients_of
from normpass.ops.layout import empty_for_blocks, memory_format_of, statistics_dtype
from normpass.ops.moments import moments_with_update
from normpass.ops.norm_act import norm_act, norm_act_on, rebuild_norm_act
from normpass.ops.norm_act_backward import norm_act_gradients
from normpass.ops.operands import Options
from normpass.recipe.notes import copied, is_recording, tag
from normpass.runtime.convolution import convolution_function
from normpass.runtime.functional import FunctionalBatchNorm, prepare_norm_act

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance, each (C,)."""


@dataclass(frozen=True)
class Geometry:
    """A convolution without its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(dims: int, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
        """The arguments of a convolution over `dims` dimensions; each may be one number for all of them."""
        given = ((v,) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
        step, border, spread = (v * (dims // len(v)) for v in given)
        return Geometry(step, border, spread, groups)

    @property
    def args(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


def serial_norm_act_conv(
    norm: FunctionalBatchNorm,
    x: Tensor,
    moments: Moments | None,
    activation: str,
    activation_args: Sequence[float],
    block_bytes: int,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Moments | None]:
    """conv(act(norm(x))) and the moments of the result (None where it was not made block by block).

    Args:
        x: (N, C, *).
        moments: of x, where they are known.
        block_bytes: what a block of x, z and c may take together.
        weight, bias, stride, padding, dilation, groups: of the convolution.
    """
    geometry = Geometry.of(x.dim() - 2, stride, padding, dilation, groups)
    prepared = prepare_norm_act(norm, x, None, activation, activation_args, "", moments)
    if isinstance(prepared, Tensor):
        return _convolve(prepared, weight, bias, geometry), None
    device, tensors = eager_device(x, weight, bias), _cast(weight, bias, x)
    step = None if device is None or tensors is None else _step(tensors[0], geometry, x, block_bytes)
    if device is None or tensors is None or step is None:
        return _convolve(_whole(eager_device(x), prepared), weight, bias, geometry), None
    _, _, norm_weight, norm_bias, mean, var, *options = prepared
    c, *of_c = NormActConv.apply(x, norm_weight, norm_bias, mean, var, *tensors, tuple(options), geometry, step, device)
    return c, (of_c[0], of_c[1])


def norm_act_with_moments(
    norm: FunctionalBatchNorm,
    x: Tensor,
    moments: Moments | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
    sum_into: str,
) -> Tensor:
    """`split_norm_act` of an x whose moments are known: where a chain of blocks ends."""
    prepared = prepare_norm_act(norm, x, residual, activation, activation_args, sum_into, moments)
    return prepared if isinstance(prepared, Tensor) else _whole(eager_device(x, residual), prepared)


def _whole(device: str | None, prepared: tuple) -> Tensor:
    z: Tensor = norm_act_on(device, *prepared)
    if is_recording():  # autograd keeps all of these but the bias
        tag(z, rebuild_norm_act, (*prepared[:3], copied(prepared[3]), *prepared[4:]))
    return z


def _cast(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias in the dtype that the convolution computes in, as autocast has it; None where x has another."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast and x.dtype != torch.float64 else weight.dtype
    return (weight.to(dtype), None if bias is None else bias.to(dtype)) if dtype == x.dtype else None


def _step(weight: Tensor, geometry: Geometry, x: Tensor, block_bytes: int) -> int | None:
    """Rows or samples in a block; None where all of x is one block."""
    count = x.numel() // x.shape[1] if _by_rows(weight, geometry, x) else x.shape[0]
    of_c = x.numel() // x.shape[1] * weight.shape[0]  # at most: a stride makes it smaller
    step = max(1, block_bytes * count // ((2 * x.numel() + of_c) * x.element_size()))
    return step if step < count else None


def _by_rows(weight: Tensor, geometry: Geometry, x: Tensor) -> bool:
    """Whether c is a matrix product of rows of C values that lie one behind the other."""
    pointwise = weight[0, 0].numel() == 1 and geometry.groups == 1 and set(geometry.stride) == {1}
    if not pointwise or set(geometry.padding) != {0}:
        return False
    memory_format = memory_format_of(x)
    is_last = x.dim() > 2 and memory_format is not torch.contiguous_format
    return is_last and x.is_contiguous(memory_format=memory_format)


def _rows(x: Tensor) -> Tensor:
    """(N, C, *) in channels_last as (N·spatial, C), the same memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


class _Blocks:
    """How x and c are cut: rows as matrices, or samples."""

    def __init__(self, x: Tensor, weight: Tensor, geometry: Geometry, step: int):
        self.by_rows = _by_rows(weight, geometry, x)
        self.geometry, self.step = geometry, step
        self.x = _rows(x) if self.by_rows else x
        self.weight = weight.flatten(1) if self.by_rows else weight

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, start + self.step) for start in range(0, len(self.x), self.step))

    def like_x(self, t: Tensor) -> Tensor:
        """A tensor of the shape of x or c, cut as x is. New memory only where it is not laid out as x is."""
        return _rows(t) if self.by_rows else t

    def convolve_into(self, c: Tensor | None, block: slice, z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """c with the convolution of z in its place, made with the first block where it is None; and that block."""
        if self.by_rows and c is not None:
            out = c[block]
            weight = self.weight.t()
            return c, torch.mm(z, weight, out=out) if bias is None else torch.addmm(bias, z, weight, out=out)
        of_block = _vendors(z.dim())(z, self.weight, bias, *self.geometry.args)
        if c is None:
            c = empty_for_blocks(of_block, len(self.x))
        c[block] = of_block
        return c, of_block

    def gradients(self, dc: Tensor, z: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Of z, of the weight and of the bias."""
        if self.by_rows:
            dz = dc @ self.weight if needs[0] else None
            return dz, dc.t() @ z if needs[1] else None, dc.sum(0) if needs[2] else None
        geometry, none = self.geometry, [0] * len(self.geometry.stride)
        options = geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups
        found = torch.ops.aten.convolution_backward(dc, z, self.weight, [self.weight.shape[0]], *options, list(needs))
        return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


class NormActConv(torch.autograd.Function):
    """c = conv(act(norm(x))) with its moments, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
        geometry: Geometry,
        step: int,
        device: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, var, weight, bias)
        ctx.options, ctx.geometry, ctx.step, ctx.device = options, geometry, step, device
        blocks, kernels = _Blocks(x, weight, geometry, step), kernels_for(device)
        c = x.new_empty((len(blocks.x), len(weight))) if blocks.by_rows else None
        merged: list[tuple[int, Tensor, Tensor]] = []
        with torch.autocast(device, enabled=False):
            for block in blocks:
                z = norm_act_on(device, blocks.x[block], None, norm_weight, norm_bias, mean, var, *options)
                c, of_block = blocks.convolve_into(c, block, z, bias)
                merged.append((of_block.numel() // of_block.shape[1], *moments_with_update(kernels, of_block, None)))
        assert c is not None
        if blocks.by_rows:
            c = c.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
        of_c = merge_moments(merged)
        ctx.mark_non_differentiable(*of_c)
        ctx.set_materialize_grads(False)
        return c, *of_c

    @staticmethod
    def backward(ctx: Any, dc: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dc is None:
            return (None,) * 11
        run = _differentiable if torch.is_grad_enabled() else _gradients
        with torch.autocast(ctx.device, enabled=False):
            return *run(ctx, dc), *[None] * 4


def _gradients(ctx: Any, dc: Tensor) -> list[Tensor | None]:
    """Of x, the norm's weight and bias, its statistics (none), the convolution's weight and bias."""
    x, norm_weight, norm_bias, mean, var, weight, bias = ctx.saved_tensors
    eps, of_batch, activation, activation_args = ctx.options
    needs = ctx.needs_input_grad
    kernels, blocks = kernels_for(ctx.device), _Blocks(x, weight, ctx.geometry, ctx.step)
    # Without a weight of its own the norm still needs Σdy·x̂ and Σdy.
    scale = torch.ones_like(mean) if norm_weight is None else norm_weight
    shift = torch.zeros_like(mean) if norm_bias is None else norm_bias
    values = scale, shift, mean, var
    dx = torch.empty_like(x)
    dc_blocks, dx_blocks = blocks.like_x(dc.contiguous(memory_format=memory_format_of(x))), blocks.like_x(dx)
    sums: list[Tensor | None] = [None] * 4
    for block in blocks:
        of_x = blocks.x[block]
        z = norm_act_on(ctx.device, of_x, None, *values, *ctx.options)
        dz, *of_conv = blocks.gradients(dc_blocks[block], z, (True, needs[5], needs[6]))
        assert dz is not None  # it is always asked for
        del z
        a_dy, _, s2, s1 = norm_act_gradients(
            kernels, dz, of_x, None, *values, eps, False, activation, activation_args, (True, False, True, True)
        )
        assert a_dy is not None
        dx_blocks[block] = a_dy
        sums = [_add(total, g) for total, g in zip(sums, (s2, s1, *of_conv), strict=True)]
    s2, s1, dweight, dbias = sums
    if needs[0] and of_batch:
        dx = _with_statistics(ctx.device, x, dx, values, eps, s1, s2)
    found = [dx, s2, s1, None, None, dweight, dbias]
    likes = [x, norm_weight, norm_bias, None, None, weight, bias]
    return [
        g.reshape(like.shape).to(like.dtype) if g is not None and like is not None and needed else None
        for g, like, needed in zip(found, likes, needs, strict=False)
    ]


def _differentiable(ctx: Any, dc: Tensor) -> list[Tensor | None]:
    """The same gradients, whole and with a graph of their own."""

    def formula(x: Tensor, *others: Any) -> Tensor:
        norm_weight, norm_bias, mean, var, weight, bias = others
        z = norm_act(x, None, norm_weight, norm_bias, mean.detach(), var.detach(), *ctx.options)
        c: Tensor = _vendors(z.dim())(z, weight, bias, *ctx.geometry.args)
        return c

    return gradients_of(formula, ctx.saved_tensors, dc, ctx.needs_input_grad[:7])


def _convolve(z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    function = convolution_function if z.dim() == 4 else _vendors(z.dim())
    c: Tensor = function(z, weight, bias, *geometry.args)
    return c


def _vendors(dims: int) -> Callable:
    return (F.conv1d, F.conv2d, F.conv3d)[dims - 3]


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum, in the statistics' dtype."""
    if gradient is None:
        return total
    wide = gradient.to(statistics_dtype(gradient))
    return wide if total is None else total.add_(wide)


def _with_statistics(
    device: str, x: Tensor, a_dy: Tensor, values: tuple, eps: float, s1: Tensor | None, s2: Tensor | None
) -> Tensor:
    """dx from a·dy: the part of the statistics is a norm of x with other parameters, to which a·dy is added."""
    scale, _, mean, var = values
    assert s1 is not None and s2 is not None
    a = scale.to(var.dtype) * torch.rsqrt(var + eps)
    share = -a / (x.numel() // x.shape[1])
    return norm_act_on(device, x, a_dy, share * s2, share * s1, mean, var, eps, False)


def merge_moments(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Moments:
    """Mean and biased variance of all values from (count, mean, variance) of each part (Chan, Golub, LeVeque 1979)."""
    total, dtype = sum(count for count, _, _ in parts), parts[0][1].dtype
    shares = [count / total for count, _, _ in parts]  # numbers, not a tensor: a GPU need not wait for them
    means = torch.stack([mean for _, mean, _ in parts]).double()
    mean = torch.stack([share * of_part for share, of_part in zip(shares, means, strict=True)]).sum(0)
    spread = torch.stack([var for _, _, var in parts]).double() + (means - mean).square()
    var = torch.stack([share * of_part for share, of_part in zip(shares, spread, strict=True)]).sum(0)
    return mean.to(dtype), var.to(dtype)
