"""Running a region of a graph sub-batch by sub-batch, forward and backward.

    forward     out[i : i + s] = region(x[i : i + s])                         x is kept, nothing else
    backward    each sub-batch again, with gradients; dx[i : i + s] is its own, those of what else is read are summed

The region computes every sample by itself (`normpass.serialize.per_sample`), so this is the plain result: its
convolutions see fewer samples at a time, and weight gradients are summed in another order, which rounds differently.
What lies between the region's layers exists for one sub-batch only and stays in the cache (mini-batch serialization,
arXiv 1810.00307; there backward reads what forward stored, here forward is run again).

The region runs whole where it may not be divided: in torch.compile and export, under `torch.func` and forward-mode
derivatives, for tensors of other kinds, for a batch that is no larger than the sub-batch. A backward with
`create_graph=True` runs it whole too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from normpass.onlookers import is_compiling, is_exporting, is_traced, under_other_derivatives
from normpass.ops.eager import gradients_of, no_gradients
from normpass.recipe.autocast import autocast_state, same_autocast
from normpass.recipe.notes import copying


@dataclass(frozen=True)
class Region:
    """A part of a graph with one input and one output."""

    part: Callable[..., Tensor]
    """`part(x, *extras)`, with what else it reads: weights, running statistics, numbers"""
    sub_batch: int
    copied: tuple[int, ...] = ()
    """which extras are kept as copies: plain layers do not keep them, so they may change before backward"""


def run_region(region: Region, x: Tensor, *extras: Any) -> Tensor:
    """The region's result for x (N, *), by sub-batches where that is possible."""
    if not _is_divisible(region, x):
        return region.part(x, *extras)
    with copying(*[extras[index] for index in region.copied]):
        result: Tensor = SerialisedRegion.apply(region, x, *extras)
    return result


def _is_divisible(region: Region, x: Tensor) -> bool:
    # Without memory it is asked for the facts, while Dynamo compiles: these are to be those of what runs.
    if (is_compiling() and type(x) is not FakeTensor) or is_exporting() or under_other_derivatives() or is_traced():
        return False
    return type(x) in (Tensor, Parameter, FakeTensor) and x.shape[0] > region.sub_batch


class SerialisedRegion(torch.autograd.Function):
    """The region with all that it reads as inputs, so that autograd knows and checks it."""

    @staticmethod
    def forward(ctx: Any, region: Region, x: Tensor, *extras: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.region, ctx.autocast = region, autocast_state((x,))
        ctx.save_for_backward(x, *(e if isinstance(e, Tensor) else None for e in extras))
        ctx.numbers = [None if isinstance(e, Tensor) else e for e in extras]
        # Detached, or autocast would remember a weight's cast, made here without gradients, for layers to come.
        constants = [e.detach() if isinstance(e, Tensor) else e for e in extras]
        out: Tensor | None = None
        for start, part in _parts(region, x.detach()):
            y = region.part(part, *constants)
            if out is None:
                out = _room_for(y, x.shape[0])
            out[start : start + len(y)] = y
        assert out is not None  # the batch is larger than the sub-batch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        x, *tensors = ctx.saved_tensors
        extras = [number if t is None else t for t, number in zip(tensors, ctx.numbers, strict=True)]
        run = _differentiable if torch.is_grad_enabled() else _by_sub_batch
        # Without the cache: a remembered cast would belong to the graph of one sub-batch.
        with same_autocast(ctx.autocast, cached=False):
            return None, *run(ctx.region, x, extras, grad, ctx.needs_input_grad[1:])


def _parts(region: Region, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = len(x) if isinstance(x, FakeTensor) else region.sub_batch  # without memory there is none to save
    for start in range(0, len(x), step):
        yield start, x[start : start + step]


def _room_for(first: Tensor, count: int) -> Tensor:
    """Memory for `count` samples, laid out as those of the first block are: what follows may take a view of it."""
    sample = torch.empty_like(first[0], device="meta")  # whose strides are those of a whole tensor
    return first.new_empty_strided((count, *sample.shape), (sample.numel(), *sample.stride()))


def _by_sub_batch(
    region: Region, x: Tensor, extras: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and of what else needs one."""
    dx = torch.empty_like(x) if needs[0] else None
    leaves = [e.detach().requires_grad_() if n else e for e, n in zip(extras, needs[1:], strict=True)]
    wanted = [leaf for leaf, needed in zip(leaves, needs[1:], strict=True) if needed]
    sums: list[Tensor | None] = [None] * len(wanted)
    for start, part in _parts(region, x):
        part = part.detach().requires_grad_(needs[0])
        with torch.enable_grad():
            y = region.part(part, *leaves)
        sources = [part, *wanted] if needs[0] else wanted
        found = list(torch.autograd.grad(y, sources, grad[start : start + len(part)], allow_unused=True))
        del y
        if dx is not None:
            of_part = found.pop(0)
            dx[start : start + len(part)] = 0 if of_part is None else of_part
        sums = [_sum(total, g, start) for total, g in zip(sums, found, strict=True)]
    totals = (total if total is None else total.to(leaf.dtype) for total, leaf in zip(sums, wanted, strict=True))
    return [dx, *(next(totals) if needed else None for needed in needs[1:])]


def _sum(total: Tensor | None, gradient: Tensor | None, start: int) -> Tensor | None:
    """`total + gradient`, in float32 for narrower ones. The first is autograd's own and is not written to."""
    if gradient is None:
        return total
    wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
    if total is None:
        return wide.clone() if start == 0 else wide
    return total.add_(wide)


def _differentiable(
    region: Region, x: Tensor, extras: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients, with a graph of their own: keeps what plain layers keep."""
    return gradients_of(region.part, (x, *extras), grad, needs, allow_unused=True)
