"""Layer norm and RMS norm over the last dimensions, with the activation behind them; keep their input for backward.

Per row of m values, with r = 1/sqrt(var + eps):

    x̂ = (x − mean)·r      y = weight·x̂ + bias      z = act(y)

Backward from g = dL/dz, with dy = g·act'(y) and h = weight·dy:

    dx = r·(h − Σh/m − x̂·Σ(h·x̂)/m)      dweight = Σ dy·x̂      dbias = Σ dy      (the last two over the rows)

(Ba, Kiros and Hinton 2016.) RMS norm (Zhang and Sennrich 2019) has no mean: it is 0, var is the mean square, and Σh/m
is not there. Autograd keeps x and the moments; y is made again by the code of forward, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels.contract import Rows, SampleNorms

from .activation import activate
from .eager import eager_device
from .operands import in_dtype_of, new_like, new_per_channel
from .sample_norm import Moments, new_moments, norm_of, normalized, sample_norms_of


@dataclass(slots=True)  # no tuple: recipes look for tensors in those
class RowNormOptions:
    """What belongs to the call and is no tensor."""

    normalized_shape: tuple[int, ...]
    """of the last dimensions, which are one row"""
    eps: float
    activation: str
    activation_args: Sequence[float]
    is_rms_norm: bool

    def computed(
        self,
        kernels: SampleNorms,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z and the moments of x, (rows,) each. There is no residual."""
        rows = self._rows_of(x)
        mean, var = new_moments(x, (rows.rows,)) if moments is None else moments
        z = torch.empty_like(x, memory_format=torch.contiguous_format)
        norm = norm_of(weight, bias, mean, var, self.eps, self.activation, self.activation_args)
        kernels.row_norm_act(z, x.contiguous(), norm, moments is not None, rows)
        return z, mean, var

    def gradients(
        self,
        kernels: SampleNorms,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Of x, residual (none), weight and bias; None for what is not needed."""
        dx = new_like(x, torch.contiguous_format, needs[0])
        dweight, dbias = new_per_channel(weight, mean.dtype, needs[2]), new_per_channel(bias, mean.dtype, needs[3])
        norm = norm_of(weight, bias, mean, var, self.eps, self.activation, self.activation_args)
        operands = grad.contiguous(), x.contiguous()
        kernels.row_norm_act_backward(dx, dweight, dbias, *operands, norm, self._rows_of(x))
        return [dx, None, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)]

    def formula(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """z in ATen's operators."""
        if self.is_rms_norm:
            y = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        else:
            y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return activate(y, self.activation, self.activation_args)

    def _rows_of(self, x: Tensor) -> Rows:
        width = math.prod(self.normalized_shape)
        return Rows(x.numel() // width, width, not self.is_rms_norm)


def row_norm_act_on(
    kernels: SampleNorms,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments | None,
    options: RowNormOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(norm(x)), and the mean and biased variance of each row, (rows,), which have no gradient.

    Args:
        kernels: of x's device.
        x: (*, *normalized_shape), floating, not empty, a plain tensor.
        weight, bias: None or of `normalized_shape`.
        moments: those of x, where they are known: z is made again.

    Returns:
        z is contiguous.
    """
    return normalized(kernels, x, None, weight, bias, moments, options)


def rebuild_row_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, options: RowNormOptions
) -> Tensor:
    """z again, bit for bit: what a recipe calls."""
    kernels = sample_norms_of(eager_device(x))
    if kernels is None:  # switched off meanwhile
        return options.formula(x, None, weight, bias)
    return row_norm_act_on(kernels, x, weight, bias, (mean, var), options)[0]
