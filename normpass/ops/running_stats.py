"""`normpass::updated_running_stats`: one step of BatchNorm's running statistics, as new tensors.

    running_mean' = (1 − momentum)·running_mean + momentum·mean
    running_var'  = (1 − momentum)·running_var  + momentum·var·m/(m − 1)

with m values per channel: PyTorch keeps the unbiased variance though it normalizes with the biased one. The
caller copies the result into its buffers, exactly once a step (`move_running_stats`); a recomputed region then has
nothing to update twice. In plain eager mode `update_running_stats` writes the buffers themselves. For `momentum=None`
(the cumulative average) the caller passes 1/num_batches_tracked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normpass.kernels.contract import Kernels, Running

from .layout import STATISTICS_DTYPES
from .library import declare
from .moves import count_move, move_lock
from .operands import PLAIN_TYPES


def updated_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> tuple[Tensor, Tensor]:
    """The running statistics after one more batch. No gradient.

    Args:
        running_mean, running_var: (C,), any floating dtype.
        mean, var: (C,), the batch's mean and biased variance.
        momentum: the new batch's share, in [0, 1].
        count: values per channel in the batch, m = N·spatial.

    Returns:
        New `running_mean` and `running_var`, in the dtypes of the old.

    Raises:
        ValueError: `count` is below 2 (there is no unbiased variance), or the shapes differ.
    """
    new_mean, new_var = _updated_running_stats(running_mean, running_var, mean, var, momentum, count)
    return new_mean, new_var


def move_running_stats(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """The running statistics after one more batch, through the dispatcher."""
    old_mean, old_var, momentum = running
    new = torch.ops.normpass.updated_running_stats.default(old_mean, old_var, mean, var, momentum, count)
    write_running_stats(running, new[0], new[1])


def update_running_stats(kernels: Kernels | None, running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Write the running statistics after one more batch over the old ones. Not for buffers that require a gradient."""
    _check(running.mean, running.var, mean, var)
    if kernels is not None and _fits(running, mean):
        _check_count(count)
        kernels.running_stats(running, mean, var, count)
        note_written(running)
        return
    new_mean, new_var = _reference(running.mean, running.var, mean, var, running.momentum, count)
    with torch.no_grad():
        write_running_stats(running, new_mean, new_var)


def write_running_stats(running: Running, mean: Tensor, var: Tensor) -> None:
    if torch.compiler.is_compiling():  # nobody watches there, and a compiler knows no locks
        running.mean.copy_(mean)
        running.var.copy_(var)
        return
    with move_lock:
        for old, new in ((running.mean, mean), (running.var, var)):
            old.copy_(new)
            count_move(old)


def is_writable(running: Running, shape: Sequence[int], dtype: torch.dtype, device: int) -> bool:
    """Whether a kernel on `device` may write these buffers in place: dense, in the dtype of the statistics."""
    for t in (running.mean, running.var):
        fits = t.shape == shape and t.dtype == dtype and t.get_device() == device
        if not fits or type(t) not in PLAIN_TYPES or not t.is_contiguous():
            return False
    return dtype in STATISTICS_DTYPES


def _fits(running: Running, mean: Tensor) -> bool:
    return is_writable(running, mean.shape, mean.dtype, mean.get_device())


def note_written(running: Running) -> None:
    """Tell autograd that a kernel wrote the buffers: it compares versions of what it saved."""
    if not running.mean.is_inference():
        with move_lock:
            increment_version((running.mean, running.var))
            count_move(running.mean)
            count_move(running.var)


def _check(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> None:
    tensors = {"running_mean": running_mean, "running_var": running_var, "var": var}
    for name, values in tensors.items():
        if values.shape != mean.shape:
            raise ValueError(
                f"normpass::updated_running_stats: `{name}` must have the shape of `mean`, "
                f"{tuple(mean.shape)}, got {tuple(values.shape)}"
            )


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(
            "normpass::updated_running_stats: `count` must be at least 2, more than one value per channel, "
            f"for a running variance in training, got {count}"
        )


def _reference(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> tuple[Tensor, Tensor]:
    _check(running_mean, running_var, mean, var)
    _check_count(count)
    unbiased_share = momentum * count / (count - 1)
    return _mix(running_mean, mean, momentum, momentum), _mix(running_var, var, momentum, unbiased_share)


def _mix(old: Tensor, new: Tensor, momentum: float, share: float) -> Tensor:
    wide = torch.promote_types(old.dtype, new.dtype)
    return old.to(wide).mul(1 - momentum).add_(new, alpha=share).to(old.dtype)


def _kernel(
    kernels: Kernels | None,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    _check(running_mean, running_var, mean, var)
    new = Running(running_mean.clone(), running_var.clone(), momentum)
    if kernels is None or not (_fits(new, mean) and _fits(Running(mean, var, momentum), mean)):
        return _reference(running_mean, running_var, mean, var, momentum, count)
    _check_count(count)
    kernels.running_stats(new, mean, var, count)
    return new.mean, new.var


def _fake(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> tuple[Tensor, Tensor]:
    _check(running_mean, running_var, mean, var)
    return torch.empty_like(running_mean), torch.empty_like(running_var)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: None) -> tuple[None, ...]:
    return (None,) * 6


_updated_running_stats = declare(
    "updated_running_stats(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, "
    "float momentum, SymInt count) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
