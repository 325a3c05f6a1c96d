"""`normpass::updated_running_stats`: one step of BatchNorm's running statistics, as new tensors.

    running_mean' = (1 − momentum)·running_mean + momentum·mean
    running_var'  = (1 − momentum)·running_var  + momentum·var·m/(m − 1)

with m values per channel: PyTorch keeps the unbiased variance though it normalises with the biased one. The
caller copies the result into its buffers, exactly once a step; a recomputed region then has nothing to update
twice. For `momentum=None` (the cumulative average) the caller passes 1/num_batches_tracked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import declare


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


def _check(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> None:
    tensors = {"running_mean": running_mean, "running_var": running_var, "var": var}
    for name, values in tensors.items():
        if values.shape != mean.shape:
            raise ValueError(
                f"normpass::updated_running_stats: `{name}` must have the shape of `mean`, "
                f"{tuple(mean.shape)}, got {tuple(values.shape)}"
            )


def _reference(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> tuple[Tensor, Tensor]:
    _check(running_mean, running_var, mean, var)
    if count < 2:
        raise ValueError(
            "normpass::updated_running_stats: `count` must be at least 2, more than one value per channel, "
            f"for a running variance in training, got {count}"
        )
    unbiased_share = momentum * count / (count - 1)
    return _mix(running_mean, mean, momentum, momentum), _mix(running_var, var, momentum, unbiased_share)


def _mix(old: Tensor, new: Tensor, momentum: float, share: float) -> Tensor:
    wide = torch.promote_types(old.dtype, new.dtype)
    return old.to(wide).mul(1 - momentum).add_(new, alpha=share).to(old.dtype)


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
    backward=_backward,
    setup_context=_setup_context,
)
