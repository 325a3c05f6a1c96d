"""Group norm, and instance norm, with the activation behind it; keeps its input for backward.

Per group k of the channels of one sample, with m values and r = 1/sqrt(var + eps):

    x̂ = (x − mean)·r      y = weight·x̂ + bias      z = act(y + residual)

Backward from g = dL/dz, with dy = g·act'(y + residual), which is the residual's gradient too:

    S1 = Σ weight·dy      S2 = Σ weight·dy·x̂      (over the group)      dx = r·(weight·dy − S1/m − x̂·S2/m)
    dweight = Σ dy·x̂      dbias = Σ dy            (per channel, over the samples)

(Wu and He 2018; Ulyanov, Vedaldi and Lempitsky 2016.) Autograd keeps x and the moments, and the residual where act'
needs it; y is made again by the code of forward, bit for bit. Moments are merged by Chan's formula.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from normpass.kernels.contract import Groups, SampleNorms

from .activation import activate
from .eager import eager_device
from .layout import is_dense_in_both, suggested_format
from .operands import dense, in_dtype_of, new_like, new_per_channel
from .sample_norm import Moments, new_moments, norm_of, normalized, sample_norms_of


@dataclass(slots=True)  # no tuple: recipes look for tensors in those
class GroupNormOptions:
    """What belongs to the call and is no tensor."""

    groups: int
    """of the channels of a sample; as many as there are channels for an instance norm"""
    eps: float
    activation: str
    activation_args: Sequence[float]
    is_instance_norm: bool
    """whether the result is contiguous, as ATen's instance norm gives it, whatever x is"""

    def computed(
        self,
        kernels: SampleNorms,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z and the moments of x, (N, groups) each."""
        mean, var = new_moments(x, (x.shape[0], self.groups)) if moments is None else moments
        memory_format = format_of(x, self)
        z = torch.empty_like(x, memory_format=result_format(x, self))
        norm = norm_of(weight, bias, mean, var, self.eps, self.activation, self.activation_args)
        operands = dense(x, memory_format), dense(residual, memory_format)
        groups = groups_of(x, self.groups, memory_format)
        kernels.group_norm_act(z, *operands, norm, moments is not None, groups)
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
        """Of x, residual, weight and bias; None for what is not needed."""
        memory_format = format_of(x, self)
        dx, dresidual = new_like(x, memory_format, needs[0]), new_like(x, memory_format, needs[1])
        dweight, dbias = new_per_channel(weight, mean.dtype, needs[2]), new_per_channel(bias, mean.dtype, needs[3])
        kernels.group_norm_act_backward(
            dx,
            dresidual,
            dweight,
            dbias,
            dense(grad, memory_format),
            dense(x, memory_format),
            dense(residual, memory_format),
            norm_of(weight, bias, mean, var, self.eps, self.activation, self.activation_args),
            groups_of(x, self.groups, memory_format),
        )
        return [dx, dresidual, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)]

    def formula(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """z in ATen's operators."""
        y = F.group_norm(x, self.groups, weight, bias, self.eps)
        return activate(y if residual is None else y + residual, self.activation, self.activation_args)


def group_norm_act_on(
    kernels: SampleNorms,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments | None,
    options: GroupNormOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(norm(x) + residual), and the mean and biased variance of each group, (N, groups), which have no gradient.

    Args:
        kernels: of x's device.
        x: (N, C, *), floating, not empty, a plain tensor.
        residual: None, or like x.
        weight, bias: None or (C,).
        moments: those of x, where they are known: z is made again.
    """
    return normalized(kernels, x, residual, weight, bias, moments, options)


def rebuild_group_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    options: GroupNormOptions,
) -> Tensor:
    """z again, bit for bit: what a recipe calls."""
    kernels = sample_norms_of(eager_device(x, residual))
    if kernels is None:  # switched off meanwhile
        return options.formula(x, residual, weight, bias)
    return group_norm_act_on(kernels, x, residual, weight, bias, (mean, var), options)[0]


def format_of(x: Tensor, options: GroupNormOptions) -> torch.memory_format:
    """The memory format in which ATen gives the norm's result; x may be a fake tensor."""
    if options.is_instance_norm or (x.device.type == "cuda" and not keeps_channels_last_on_cuda()):
        return torch.contiguous_format
    return suggested_format(x)


@functools.lru_cache(maxsize=1)
def keeps_channels_last_on_cuda() -> bool:
    """Whether ATen's group norm on CUDA gives what is channels_last as that: from torch 2.15 on.

    Its formula for tensors without memory names the devices that do, and these are as CUDA is.
    """
    with _disable_current_modes():
        x = torch.empty((2, 4, 2, 2), device="meta", memory_format=torch.channels_last)
        return F.group_norm(x, 2).is_contiguous(memory_format=torch.channels_last)


def result_format(x: Tensor, options: GroupNormOptions) -> torch.memory_format:
    """That of the activation's result: a pointwise function gives what is dense in both formats as contiguous."""
    if options.activation != "identity" and is_dense_in_both(x.shape):
        return torch.contiguous_format
    return format_of(x, options)


def groups_of(x: Tensor, groups: int, memory_format: torch.memory_format) -> Groups:
    """How x lies once it is dense in `memory_format`."""
    samples, channels = x.shape[:2]
    spatial = x.numel() // (samples * channels)
    return Groups(samples, groups, channels, spatial, memory_format is not torch.contiguous_format or spatial == 1)
