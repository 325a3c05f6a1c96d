"""The gradient of a tensor that many norms read as a piece of their concatenations, in plain eager mode.

Read by k norms, a piece has the gradient Σₖ (aₖ·dyₖ + Bₖ·(x − mean) + Cₖ). Autograd would add k tensors, each made in
two passes. Here the norms add aₖ·dyₖ to one tensor while they read x for their sums, and Bₖ and Cₖ, which are numbers
per channel, to a total; (ΣBₖ)·(x − mean) + ΣCₖ follows once, when the last of them is done: half the memory traffic.

`Reader` stands between the piece and the norms in autograd's graph: its backward runs after all of theirs. What they
hand over is no gradient of autograd's but lies in its `GradientSum`, for one running backward. It also keeps the
piece, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels

from .cat_norm_act import gradients_by_op, run_cat_norm_act
from .cat_norm_act_backward import accumulate, new_total
from .eager import eager_device, no_gradients
from .operands import Options, dense, layout_of

_running_backward = torch._C._current_graph_task_id


class GradientSum:
    """What the norms that read one tensor have added up in one running backward."""

    __slots__ = ("dx", "mean", "task", "total", "x")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.task = -1
        self.x: Tensor | None = None
        self.mean: Tensor | None = None
        self.dx: Tensor | None = None
        self.total: Tensor | None = None

    def begin(self, task: int, x: Tensor) -> Tensor:
        """x in the running backward. What another one left is forgotten: it raised, or did not want this gradient."""
        self.forget()
        torch.autograd.Variable._execution_engine.queue_callback(self.forget)
        self.task, self.x = task, x
        return x


def _read(reader: Any, task: int) -> Tensor:
    """The tensor that a `Reader`'s node has kept, as long as backward has not come to it.

    It is unpacked once: under `torch.utils.checkpoint` it may not be twice.
    """
    shared: GradientSum = reader.shared
    if shared.task == task and shared.x is not None:
        return shared.x
    return shared.begin(task, dense(reader.saved_tensors[0], reader.memory_format))


class Reader(torch.autograd.Function):
    """x itself, to be read by norms that add up their gradients. x is dense in `memory_format`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        ctx.shared, ctx.memory_format = GradientSum(), memory_format
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.detach()  # autograd's own view of x would have other strides along dimensions of one value

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        shared: GradientSum = ctx.shared
        if shared.task != _running_backward() or shared.dx is None:
            return grad, None
        x, mean, dx, total = shared.x, shared.mean, shared.dx, shared.total
        shared.forget()
        if total is not None:
            assert x is not None and mean is not None
            kernels, layout = kernels_for(x.device.type), layout_of(x, ctx.memory_format)
            assert kernels is not None  # the norms have used them
            kernels.add_statistics_gradient(dx, x, mean, total, layout)
        return (dx if grad is None else dx + grad), None


class CatNormAct(torch.autograd.Function):
    """`cat_norm_act` without the dispatcher, of pieces that are dense in `memory_format`.

    Those that require a gradient come from `Reader`s, each from one of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        kernels: Kernels,
        memory_format: torch.memory_format,
        options: Options,
        *xs: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.memory_format, ctx.options = memory_format, options
        kept = [x for x, needed in zip(xs, ctx.needs_input_grad[7:], strict=True) if not needed]
        ctx.save_for_backward(weight, bias, mean, var, *kept)
        return run_cat_norm_act(kernels, xs, memory_format, (weight, bias, mean, var), options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        weight, bias, mean, var, *kept = ctx.saved_tensors
        values, options = (weight, bias, mean, var), ctx.options
        needs, wanted = ctx.needs_input_grad[7:], ctx.needs_input_grad[:2]
        count = len(needs)
        readers = [node for node, _ in ctx.next_functions[-count:]]
        device = None if torch.is_grad_enabled() or grad.is_neg() else eager_device(grad)
        kernels = None if device is None else kernels_for(device)
        if kernels is None:
            task, others = _running_backward(), iter(kept)
            xs = [_read(r, task) if n else next(others) for r, n in zip(readers, needs, strict=True)]
            dxs, dweight, dbias = gradients_by_op(grad, xs, values, options, (*needs, *wanted))
            return dweight, dbias, None, None, None, None, None, *dxs
        xs, dxs, adds, totals = _targets(readers, needs, kept, mean if options[1] else None)
        targets = dxs, adds, totals
        dweight, dbias = accumulate(kernels, grad, xs, ctx.memory_format, *targets, values, options, wanted)
        return dweight, dbias, *[None] * (5 + count)


def _targets(
    readers: Sequence[Any], needs: Sequence[bool], kept: Sequence[Tensor], mean: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None], list[bool], list[Tensor | None]]:
    """Of each piece: itself, where its gradient goes, whether it is added there, and where its B and C are added.

    `mean`: of the batch; None for running statistics.
    """
    task, others = _running_backward(), iter(kept)
    xs: list[Tensor] = []
    dxs: list[Tensor | None] = []
    adds: list[bool] = []
    totals: list[Tensor | None] = []
    first = 0
    for reader, needed in zip(readers, needs, strict=True):
        if not needed:
            xs.append(next(others))
            dxs.append(None)
            adds.append(False)
            totals.append(None)
            first += xs[-1].shape[1]
            continue
        x, own = _read(reader, task), reader.shared
        xs.append(x)
        adds.append(own.dx is not None)
        if own.dx is None:
            own.dx = torch.empty_like(x, memory_format=reader.memory_format)
        if mean is not None and own.total is None:
            own.total, own.mean = new_total(x), mean[first : first + x.shape[1]]
        dxs.append(own.dx)
        totals.append(None if mean is None else own.total)
        first += x.shape[1]
    return xs, dxs, adds, totals
