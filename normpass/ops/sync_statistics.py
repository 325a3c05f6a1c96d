"""The statistics of a batch that is spread over processes, as `nn.SyncBatchNorm` has them.

    nᵢ, meanᵢ, varᵢ  ──all_gather, 2C + 1 values──►  N = Σnᵢ,  mean = Σnᵢ·meanᵢ/N,  var = Σnᵢ·(varᵢ + (meanᵢ − mean)²)/N

per channel (Chan, Golub, LeVeque 1979), in the same order and so to the same bit on every process. A process with an
empty batch has nᵢ = 0. What normalizes with them afterwards is a norm with fixed statistics: it makes a·dy and, as the
gradients of weight and bias, the sums S2 = Σ dy·x̂ and S1 = Σ dy of its own process. What is missing is here:

    S1, S2  ──all_reduce, 2C values──►  dx = a·dy + B·(x − mean) + C     a = weight·r,  B = −a·r·S2/N,  C = −a·S1/N

with r = 1/sqrt(var + eps). The gradients of weight and bias stay those of the process: DistributedDataParallel
averages them. So there is one collective in forward and one in backward, in the order of the graph, and none where the
norm's result is made again.

They are torch's functional collectives: Dynamo's graphs have them, AOTAutograd's partitioner does not repeat them, and
Inductor leaves their order alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Running

from .eager import eager_device
from .layout import memory_format_of, per_channel, statistics_dtype
from .moments import moments_with_update
from .operands import can_run, layout_of
from .running_stats import write_running_stats

ALONE = ""
"""the group of a process that asks no other"""

_TWICE = (
    "normpass: the gradient of a SyncBatchNorm's gradient would need collectives that are not there; train with "
    "nn.BatchNorm where gradients are differentiated, or give each process the whole batch"
)

Synced = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, mean, biased variance, weight and bias, for a norm with these as its running statistics."""


def synced_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    group: str,
) -> Synced:
    """What a norm with fixed statistics takes to be the batch norm of all processes; the running statistics move.

    Every process of the group has to call this, and to run its backward, in the same order.

    Args:
        x: (N, C, *), floating; N may be 0 and differ between processes.
        running_mean, running_var: None or (C,); they become the same on every process if they were.
        weight, bias: None or (C,).
        counter: how many batches there have been with this one, for `momentum=None`.
        momentum: the new batch's share of the running statistics; None for 1/counter.
        eps: of the norm.
        group: the name of a process group, or `ALONE`.

    Raises:
        ValueError: there is one value per channel in all processes together (on a CPU; elsewhere the running variance
            becomes NaN, as with `nn.SyncBatchNorm`).
        RuntimeError: of torch.distributed, where a process does not answer.
    """
    with torch.no_grad():
        mean, var, count = _merged(_gathered(_moments(x), group), x.shape[1])
        mean, var = mean.to(statistics_dtype(x)), var.to(statistics_dtype(x))
        _refuse_one_value(x, count)
        if running_mean is not None and running_var is not None:
            running = Running(running_mean, running_var, momentum or 0.0)
            _move(running, mean, var, count, counter if momentum is None else None)
    same, weight, bias = WithStatistics.apply(x, weight, bias, mean, var, count, eps, group)
    return same, mean, var, weight, bias


# --- forward ----------------------------------------------------------------------------------------


def _moments(x: Tensor) -> Tensor:
    """(2C + 1,): mean, biased variance and how many values each channel has; zeros of an empty batch."""
    dtype, channels = statistics_dtype(x), x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(2 * channels + 1, dtype=dtype)
    device = eager_device(x)
    if device is None:
        mean, var = torch.ops.normpass.moments.default(x.detach())
    else:
        mean, var = moments_with_update(kernels_for(device), x, None)
    return torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)])


def _gathered(values: Tensor, group: str) -> Tensor:
    """(processes, 2C + 1)."""
    if group == ALONE:
        return values[None]
    ops = torch.ops._c10d_functional
    gathered: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(values, size_of(group), group))
    return gathered.view(-1, values.numel())


def _merged(gathered: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance, each (C,), and count, (1,), of all processes; in float64."""
    means, variances, counts = gathered.double().split([channels, channels, 1], 1)
    count = counts.sum(0)
    shares = counts / count.clamp(min=1)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count


def _refuse_one_value(x: Tensor, count: Tensor) -> None:
    """Where that can be known without waiting for a device; every process raises."""
    if eager_device(x) == "cpu" and float(count) == 1:
        raise ValueError(
            f"SyncBatchNorm: expected more than 1 value per channel when training, got input size {tuple(x.shape)} and "
            "no other process has one"
        )


def _move(running: Running, mean: Tensor, var: Tensor, count: Tensor, counter: Tensor | None) -> None:
    """Move running statistics by the unbiased variance; not by an empty batch. `counter`: for the cumulative mean."""
    share = running.momentum if counter is None else 1 / counter.double()
    values = mean.double(), var.double() * (count / (count - 1))
    new = [
        torch.where(count > 0, old * (1 - share) + share * value, old).to(old.dtype)
        for old, value in zip(running[:2], values, strict=True)
    ]
    write_running_stats(running, new[0], new[1])


def size_of(group: str) -> int:
    """How many processes there are in a group."""
    from torch.distributed.distributed_c10d import _get_group_size_by_name  # a build may have none

    return int(_get_group_size_by_name(group))  # type: ignore[arg-type]


# --- backward ---------------------------------------------------------------------------------------


class WithStatistics(torch.autograd.Function):
    """x, weight and bias for a norm whose statistics are constants: backward adds what goes through the statistics.

    Weight and bias are there, and require a gradient, wherever anything does: their gradients are the sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps, ctx.group, ctx.dtypes = eps, group, [None if t is None else t.dtype for t in (weight, bias)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, var, count)
        same = x.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(same)
        ones = torch.ones_like(mean) if weight is None else _as_wide(weight, x)
        return same, ones, torch.zeros_like(mean) if bias is None else _as_wide(bias, x)

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        is_differentiated = torch.is_grad_enabled()
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                own = [torch.zeros_like(mean) if s is None else s.to(mean.dtype) for s in (dbias, dweight)]
                sums = _summed(torch.cat(own), ctx.group)  # of an empty batch as well: the others wait
                if dx is not None and x.numel() > 0:
                    total = _coefficients(sums, weight, var, count, ctx.eps)
                    dx = _with_statistics(dx, x, mean, total, may_write=not is_differentiated)
            vectors = zip((dweight, dbias), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
            gradients = [dx, *(s.to(dtype) if s is not None and needed else None for s, dtype, needed in vectors)]
        if is_differentiated:
            gradients = [None if g is None else _refusing_a_gradient(g) for g in gradients]
        return *gradients, *[None] * 5


def _as_wide(vector: Tensor, x: Tensor) -> Tensor:
    """A weight or bias in which the sums lose nothing: float32 where x has 16 bits."""
    own = vector.detach()
    return own.to(statistics_dtype(x)) if own.dtype == x.dtype else own


def _summed(values: Tensor, group: str) -> Tensor:
    if group == ALONE:
        return values
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(values, "sum", group))
    return summed


def _coefficients(sums: Tensor, weight: Tensor | None, var: Tensor, count: Tensor, eps: float) -> Tensor:
    """(2, C) in float64: B and C."""
    of_bias, of_weight = sums.double().chunk(2)
    rstd = torch.rsqrt(var.double() + eps)
    scale = -(rstd if weight is None else rstd * weight.double()) / count
    return torch.stack([scale * rstd * of_weight, scale * of_bias])


def _with_statistics(dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, may_write: bool) -> Tensor:
    """dx + B·(x − mean) + C. Written to dx where kernels can: the norm has made it for this function alone."""
    device, memory_format = eager_device(dx, x, mean), memory_format_of(x)
    kernels = None if device is None else kernels_for(device)
    fits = may_write and all([t.is_contiguous(memory_format=memory_format) for t in (dx, x)])
    if kernels is not None and fits and can_run(kernels, x, (dx,), (mean,)) and not dx.is_neg():
        kernels.add_statistics_gradient(dx, x, mean, total, layout_of(x, memory_format))
        return dx
    slope, constant = total.to(mean.dtype).unbind(0)
    added = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(slope, x) + per_channel(constant, x)
    return (dx.to(mean.dtype) + added).to(x.dtype)


def _refusing_a_gradient(gradient: Tensor) -> Tensor:
    """`gradient`, of which the gradient cannot be computed: that raises."""
    refuse: Any = torch._C._functions.DelayedError(_TWICE, 1)
    refused: Tensor = refuse(gradient.detach().requires_grad_())
    return refused
