"""Depthwise convolutions of the CPU, and which of them there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from normpass.kernels.contract import DEPTHWISE_STRIDES, DEPTHWISE_WIDTHS, Norm

"""of the kernels, and from column to column: for these there are loops"""
_STREAMED_BYTES = 1 << 23
"""of a result that is written past the caches (`streamed_from` in `cpu/tile.h`)"""
_WIDE_TYPES = (torch.float32, torch.float64)
_NO_NORM = None, None, None, None, 0.0, 0, 0.0, 0.0


class CpuDepthwise:
    """The `Depthwise` of the CPU."""

    def __init__(
        self,
        convolve: Callable[..., int],
        weight_gradient: Callable[..., int],
        norm_act_backward: Callable[..., int],
        dtypes: Mapping[torch.dtype, int],
        norm: Callable[[Norm], tuple[int | float | None, ...]],
        threads: Callable[[Tensor], int],
    ):
        self._convolve, self._weight_gradient, self._backward = convolve, weight_gradient, norm_act_backward
        self._dtypes, self._norm, self._threads = dtypes, norm, threads

    def convolves(
        self,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> bool:
        if dtype not in _WIDE_TYPES or memory_format is not torch.channels_last:
            return False
        is_usual = all(0 <= p < k for p, k in zip(padding, kernel_size, strict=True))
        return is_usual and kernel_size[1] in DEPTHWISE_WIDTHS and stride[1] in DEPTHWISE_STRIDES

    def has_input_gradient(
        self,
        x: Tensor,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> bool:
        pays = kernel_size[1] > 3 or x.numel() * x.element_size() >= _STREAMED_BYTES
        return pays and self.convolves(x.dtype, memory_format, kernel_size, stride, padding)

    def convolve(
        self,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        transposed: bool = False,
        norm: Norm | None = None,
    ) -> None:
        status = self._convolve(
            y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            *(_NO_NORM if norm is None else self._norm(norm)),
            *x.shape,
            *y.shape[2:],
            *weight.shape[2:],
            *stride,
            *padding,
            transposed,
            self._dtypes[x.dtype],
            self._threads(y if transposed else x),
        )
        assert status == 0, f"no loop for a kernel of {tuple(weight.shape[2:])} with a stride of {tuple(stride)}"

    def has_weight_gradient(
        self,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
    ) -> bool:
        if kernel_size[1] not in DEPTHWISE_WIDTHS or stride[1] not in DEPTHWISE_STRIDES or dtype not in self._dtypes:
            return False
        return kernel_size[1] > 3 or memory_format is torch.channels_last  # in planes the vendor's does for 3

    def weight_gradient(
        self,
        dweight: Tensor,
        grad: Tensor,
        x: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        memory_format: torch.memory_format,
    ) -> None:
        status = self._weight_gradient(
            dweight.data_ptr(),
            grad.data_ptr(),
            x.data_ptr(),
            *x.shape,
            *grad.shape[2:],
            *dweight.shape[2:],
            *stride,
            *padding,
            memory_format is torch.channels_last,
            self._dtypes[x.dtype],
            self._threads(x),
        )
        assert status == 0, f"no loop for a kernel of {tuple(dweight.shape[2:])} with a stride of {tuple(stride)}"

    def norm_act_backward(
        self,
        dx: Tensor | None,
        dnorm_weight: Tensor | None,
        dnorm_bias: Tensor | None,
        dweight: Tensor | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        norm: Norm,
        batch_statistics: bool,
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> None:
        *values, code, first, second = self._norm(norm)
        results = (None if t is None else t.data_ptr() for t in (dx, dnorm_weight, dnorm_bias, dweight))
        status = self._backward(
            *results,
            grad.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            *values,
            batch_statistics,
            code,
            first,
            second,
            *x.shape,
            *grad.shape[2:],
            *weight.shape[2:],
            *stride,
            *padding,
            self._dtypes[x.dtype],
            self._threads(x),
        )
        assert status == 0, f"no loop for a kernel of {tuple(weight.shape[2:])} with a stride of {tuple(stride)}"
