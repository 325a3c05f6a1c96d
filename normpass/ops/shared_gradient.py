"""The gradient of a tensor that many norms read as a piece of their concatenations, in plain eager mode.

Read by k norms, a piece has the gradient Σₖ (aₖ·dyₖ + Bₖ·(x − mean) + Cₖ). Autograd would add k tensors, each made in
two passes. Here the norms add aₖ·dyₖ to one tensor while they read x for their sums, and Bₖ and Cₖ, which are numbers
per channel, to a total; (ΣBₖ)·(x − mean) + ΣCₖ follows once, when the last of them is done: two thirds of the memory
traffic is saved.

`Reader` stands between the piece and the norms in autograd's graph: its backward runs after all of theirs. What they
hand over is not a gradient of autograd's but lies in a `GradientSum` that both know, for one running backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import Kernels, kernels_for

from .cat_norm_act import cat_norm_act_by, gradients_by_op
from .cat_norm_act_backward import accumulate, can_run_gradient, new_total
from .eager import eager_device
from .layout import memory_format_of
from .operands import Options, dense, layout_of
from .pieces import memory_format_of_pieces

_running_backward = torch._C._current_graph_task_id


class GradientSum:
    """What the norms that read one tensor have added up in one running backward."""

    __slots__ = ("dx", "task", "total")

    def __init__(self) -> None:
        self.task = -1
        self.dx: Tensor | None = None
        self.total: Tensor | None = None

    def begin(self, task: int) -> None:
        """Forget what another backward left; it may have raised, or not have wanted this tensor's gradient."""
        if self.task != task:
            self.task, self.dx, self.total = task, None, None
            torch.autograd.Variable._execution_engine.queue_callback(self.forget)

    def forget(self) -> None:
        self.task, self.dx, self.total = -1, None, None

    def target(self, x: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, bool]:
        """Where to put dx, dense in `memory_format`, and whether it is to be added to what is there."""
        if self.dx is None:
            self.dx = torch.empty_like(x, memory_format=memory_format)
            return self.dx, False
        if not self.dx.is_contiguous(memory_format=memory_format):
            self.dx = self.dx.contiguous(memory_format=memory_format)
        return self.dx, True

    def total_of(self, x: Tensor) -> Tensor:
        if self.total is None:
            self.total = new_total(x)
        return self.total

    def take(self, task: int) -> tuple[Tensor | None, Tensor | None]:
        """dx and the total of the running backward; None where the norms left none."""
        if self.task != task:
            return None, None
        dx, total = self.dx, self.total
        self.dx = self.total = None
        return dx, total


class Reader(torch.autograd.Function):
    """x itself, to be read by norms that add their gradients to `shared`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor | None, shared: GradientSum) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        dx, total = ctx.shared.take(_running_backward())
        if dx is not None and total is not None:
            x, mean = ctx.saved_tensors
            memory_format = memory_format_of(dx)
            kernels = kernels_for(x.device.type)
            assert kernels is not None and mean is not None  # the norms have used both
            kernels.add_statistics_gradient(dx, dense(x, memory_format), mean, total, layout_of(dx, memory_format))
        if dx is None or grad is None:
            return grad if dx is None else dx, None, None
        return dx + grad, None, None


class CatNormAct(torch.autograd.Function):
    """`cat_norm_act` of what `Reader`s gave, without the dispatcher. `shared` has their sums, in the order of `xs`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        kernels: Kernels,
        options: Options,
        shared: Sequence[GradientSum | None],
        *xs: Tensor,
    ) -> Tensor:
        ctx.options, ctx.shared = options, shared
        ctx.save_for_backward(weight, bias, mean, var, *xs)
        return cat_norm_act_by(kernels, xs, weight, bias, mean, var, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, mean, var, *xs = ctx.saved_tensors
        options: Options = ctx.options
        needs = [*ctx.needs_input_grad[7:], *ctx.needs_input_grad[:2]]
        device = None if torch.is_grad_enabled() else eager_device(grad)
        kernels = None if device is None else kernels_for(device)
        values = weight, bias, mean, var
        if kernels is None or not can_run_gradient(kernels, grad, xs, values, *options[2:]):
            dxs, dweight, dbias = gradients_by_op(grad, xs, values, options, needs)
            return dweight, dbias, None, None, None, None, None, *dxs
        targets = _targets(ctx.shared, xs, needs, options[1])
        dweight, dbias = accumulate(
            kernels, grad, xs, *targets, *values, options[0], options[2], options[3], needs[-2:]
        )
        return dweight, dbias, *[None] * (5 + len(xs))


def _targets(
    shared: Sequence[GradientSum | None], xs: Sequence[Tensor], needs: Sequence[bool], batch_statistics: bool
) -> tuple[list[Tensor | None], list[bool], list[Tensor | None]]:
    """Of each piece: where its gradient goes, whether it is added there, and where its B and C are added."""
    memory_format, task = memory_format_of_pieces(xs), _running_backward()
    dxs: list[Tensor | None] = []
    adds: list[bool] = []
    totals: list[Tensor | None] = []
    for own, x, needed in zip(shared, xs, needs, strict=False):
        dx, add, total = None, False, None
        if needed and own is not None:
            own.begin(task)
            dx, add = own.target(x, memory_format)
            total = own.total_of(x) if batch_statistics else None
        dxs.append(dx)
        adds.append(add)
        totals.append(total)
    return dxs, adds, totals
