"""The normalization itself and the argument checks that the norm-activation ops share.

y = (x − mean)·rsqrt(var + eps)·weight + bias is computed by ATen's BatchNorm in inference mode: one pass of
a·x + b with eager's rounding. ATen wants the statistics and parameters of 16-bit input in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import rule_for
from .layout import check_input, check_per_channel, in_statistics_dtype


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """y + residual as a new tensor, in the memory format of `x`, which is dense in it. Not differentiable."""
    w, b, mu, sigma2 = (in_statistics_dtype(values, x) for values in (weight, bias, mean, var))
    y = torch.native_batch_norm(x, w, b, mu, sigma2, False, 0.0, eps)[0]
    return y if residual is None else y.add_(residual)


def check_site(op: str, x: Tensor, activation: str, activation_args: Sequence[float], **values: Tensor | None) -> None:
    """Raise ValueError unless these are the arguments of one norm; `values` are its per-channel tensors."""
    check_input(op, x)
    check_per_channel(op, x, **values)
    rule_for(f"normpass::{op}", activation, activation_args)


def check_has_values(op: str, x: Tensor, batch_statistics: bool) -> None:
    """Raise ValueError if `x` is empty and yet said to have moments. Not for fakes: it reads a size."""
    if batch_statistics and x.numel() == 0:
        raise ValueError(
            f"normpass::{op}: with batch_statistics=True `x` must hold at least one value per channel, "
            f"got shape {tuple(x.shape)}"
        )


def refuse_statistics_gradient(op: str, ctx: Any, mean_index: int, batch_statistics: bool) -> None:
    """Raise ValueError where constant statistics require a gradient, which would be lost without a word."""
    needed = ctx.needs_input_grad[mean_index : mean_index + 2]
    if any(needed) and not batch_statistics:
        name = "mean" if needed[0] else "var"
        raise ValueError(
            f"normpass::{op}: with batch_statistics=False `{name}` is a constant and must have "
            "requires_grad=False, got True; detach it, or normalize with plain PyTorch operations"
        )
