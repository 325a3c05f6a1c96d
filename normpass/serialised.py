"""Running a region of a graph sub-batch by sub-batch, forward and backward.

    forward     out[i : i + s] = region(x[i : i + s])                         x is kept, nothing else
    backward    each sub-batch again, with gradients; dx[i : i + s] is its own, the weights' gradients are summed

The region computes every sample by itself (`normpass.per_sample`), so this is the plain result: its convolutions see
fewer samples at a time, and weight gradients are summed in another order, which rounds differently. What lies
between the region's layers exists for one sub-batch only and stays in the cache (mini-batch serialisation, arXiv
1810.00307; there backward reads what forward stored, here forward is run again).

The region runs whole, as plain layers do, where it may not be divided: in torch.compile and export, under `torch.func`
and forward-mode derivatives, while a layer has a hook or a norm is in train mode, for a batch that is no larger than
the sub-batch. A backward with `create_graph=True` runs it whole too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.autocast import autocast_state, same_autocast
from normpass.nn.norm import BATCH_NORMS
from normpass.ops.eager import under_other_derivatives
from normpass.ops.layout import empty_for_blocks
from normpass.ops.library import is_exporting
from normpass.per_sample import CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED, reason_not_now

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Region:
    """A part of a graph with one input and one output.

    `layers` are the modules that it calls, `extras` the tensors from outside that no layer holds.
    """

    whole: Callable[..., Tensor]
    """`whole(None, x, *layers, *extras)`: the layers called as they are"""
    part: Callable[..., Tensor]
    """`part(None, x, *layers, *tensors, *extras)`: the layers run on the given tensors"""
    layers: int
    """how many layers there are"""
    held: tuple[tuple[int, str], ...]
    """(index of a layer, name of a tensor) of every parameter and buffer that `part` takes"""
    sub_batch: int


def run_region(region: Region, x: Tensor, *operands: Any) -> Tensor:
    """The region's result for x (N, *), by sub-batches where that is possible.

    Args:
        operands: the region's layers, then its extra tensors.
    """
    layers, extras = operands[: region.layers], operands[region.layers :]
    if not _is_divisible(region, x, layers):
        return region.whole(None, x, *operands)
    tensors = [getattr(layers[index], name) for index, name in region.held]
    result: Tensor = SerialisedRegion.apply(region, layers, x, *tensors, *extras)
    return result


def _is_divisible(region: Region, x: Tensor, layers: Sequence[nn.Module]) -> bool:
    if torch.compiler.is_compiling() or is_exporting() or under_other_derivatives() or torch._C._is_tracing():
        return False
    return x.shape[0] > region.sub_batch and all(reason_not_now(layer) is None for layer in layers)


class SerialisedRegion(torch.autograd.Function):
    """The region with its layers' tensors as inputs, so that autograd knows and checks all that it reads."""

    @staticmethod
    def forward(ctx: Any, region: Region, layers: Sequence[nn.Module], x: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.region, ctx.layers, ctx.autocast = region, layers, autocast_state((x,))
        ctx.save_for_backward(x, *tensors)
        # Detached, or autocast would remember a weight's cast, made here without gradients, for layers to come.
        constants = [t if t is None else t.detach() for t in tensors]
        out: Tensor | None = None
        for start, part in _parts(region, x.detach()):
            y = region.part(None, part, *layers, *constants)
            if out is None:
                out = empty_for_blocks(y, x.shape[0])
            out[start : start + len(y)] = y
        assert out is not None  # the batch is larger than the sub-batch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        run = _differentiable if torch.is_grad_enabled() else _by_sub_batch
        # Without the cache: a remembered cast would belong to the graph of one sub-batch.
        with same_autocast(ctx.autocast, cached=False):
            return None, None, *run(ctx.region, ctx.layers, x, tensors, grad, needs)


def _parts(region: Region, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, x.shape[0], region.sub_batch):
        yield start, x[start : start + region.sub_batch]


def _by_sub_batch(
    region: Region, layers: Sequence[nn.Module], x: Tensor, tensors: Tensors, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and of the tensors that need one."""
    dx = torch.empty_like(x) if needs[0] else None
    leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs[1:], strict=True)]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    sums: list[Tensor | None] = [None] * len(wanted)
    for start, part in _parts(region, x):
        part = part.detach().requires_grad_(needs[0])
        with torch.enable_grad():
            y = region.part(None, part, *layers, *leaves)
        sources = [part, *wanted] if needs[0] else wanted
        found = list(torch.autograd.grad(y, sources, grad[start : start + len(part)], allow_unused=True))
        del y
        if dx is not None:
            of_part = found.pop(0)
            dx[start : start + len(part)] = 0 if of_part is None else of_part
        sums = [_sum(total, g, start) for total, g in zip(sums, found, strict=True)]
    return [dx, *_spread(sums, leaves)]


def _sum(total: Tensor | None, gradient: Tensor | None, start: int) -> Tensor | None:
    """`total + gradient`, in float32 for narrower ones. The first is autograd's own and is not written to."""
    if gradient is None:
        return total
    wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
    if total is None:
        return wide.clone() if start == 0 else wide
    return total.add_(wide)


def _spread(sums: Sequence[Tensor | None], leaves: Tensors) -> Iterator[Tensor | None]:
    remaining = iter(sums)
    for leaf in leaves:
        total = next(remaining) if leaf is not None and leaf.requires_grad else None
        yield total if total is None or leaf is None else total.to(leaf.dtype)


def _differentiable(
    region: Region, layers: Sequence[nn.Module], x: Tensor, tensors: Tensors, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients, with a graph of their own: keeps what plain layers keep."""
    inputs = [t if t is None else t.view_as(t) for t in (x, *tensors)]
    y = region.part(None, inputs[0], *layers, *inputs[1:])
    sources = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(y, sources, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed and t is not None else None for t, needed in zip(inputs, needs, strict=True)]


# --- layers on given tensors ----------------------------------------------------------------------


def tensor_names(layer: nn.Module) -> tuple[str, ...]:
    """The parameters and buffers that `run_layer` takes for this layer, in order."""
    if isinstance(layer, BATCH_NORMS + INSTANCE_NORMS):
        return "running_mean", "running_var", "weight", "bias"
    return ("weight",) if isinstance(layer, nn.PReLU) else ("weight", "bias")


def call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer as it is, with its hooks."""
    return layer(*args, **kwargs)


def run_layer(layer: Any, x: Tensor, *tensors: Any) -> Tensor:
    """What `layer` computes of x with other tensors for those that `tensor_names` has."""
    if isinstance(layer, BATCH_NORMS):
        mean, var, weight, bias = tensors
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=layer.eps)
    if isinstance(layer, INSTANCE_NORMS):
        mean, var, weight, bias = tensors
        of_sample = layer.training or not layer.track_running_stats
        return F.instance_norm(x, mean, var, weight, bias, use_input_stats=of_sample, eps=layer.eps)
    weight, bias = (*tensors, None)[:2]
    if isinstance(layer, CONVOLUTIONS):
        return layer._conv_forward(x, weight, bias)
    if isinstance(layer, TRANSPOSED):
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        options: Any = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return run(x, weight, bias, *options)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.prelu(x, weight)
