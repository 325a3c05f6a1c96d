"""What a rewritten graph calls where a convolution stood whose weight gradient has a kernel of its own.

As in `normpass.functional` the layer is read when the graph runs. Where it cannot be done so (a hook was registered,
other dtypes, no gradient for the weight), the layer itself runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.graph import hooks_of
from normpass.kernels import kernels_for
from normpass.ops.depthwise_conv2d import STRIDES, WIDTHS, DepthwiseConv2d, depthwise_conv2d
from normpass.ops.eager import eager_device, under_other_derivatives
from normpass.ops.library import is_exporting

_NARROWED = {torch.float32, torch.bfloat16, torch.float16}
_DTYPES = {torch.float64, *_NARROWED}


def depthwise_layer(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)`. x: (N, C, H, W)."""
    if type(layer) is not nn.Conv2d or any(hooks_of(layer)) or layer.padding_mode != "zeros":
        y: Tensor = layer(x)
        return y
    weight, bias = layer.weight, layer.bias
    return depthwise_function(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def depthwise_function(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` of the same arguments."""
    step, border = _pair(stride), _pair(padding)
    if border is None or step is None or _pair(dilation) != (1, 1) or not _fits(input, weight, step, groups):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dtypes = {_dtype_of(t) for t in (input, weight, bias) if t is not None}
    is_traced = torch.compiler.is_compiling()
    is_eager = not is_traced and eager_device(input, weight, bias) == "cpu" and kernels_for("cpu") is not None
    if len(dtypes) > 1 or not dtypes <= _DTYPES or not (is_traced or is_eager):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dtype = dtypes.pop()
    x, w, b = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if is_traced:
        return depthwise_conv2d(x, w, b, step, border)
    y: Tensor = DepthwiseConv2d.apply(x, w, b, step, border, "cpu")
    return y


def _dtype_of(t: Tensor) -> torch.dtype:
    """That in which a convolution on the CPU takes `t`: under autocast another than its own."""
    is_narrowed = t.dtype in _NARROWED and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if is_narrowed else t.dtype


def has_kernel(kernel_size: Any, stride: Any, groups: int, channels: int) -> bool:
    """Whether a convolution of this kind is one that `depthwise_layer` is for."""
    step = _pair(stride)
    return groups == channels > 1 and kernel_size[1] in WIDTHS and step is not None and step[1] in STRIDES


def _fits(x: Tensor, weight: Tensor, stride: tuple[int, int], groups: int) -> bool:
    if not (torch.is_grad_enabled() and weight.requires_grad) or under_other_derivatives() or is_exporting():
        return False
    if x.device.type != "cpu" or x.dim() != 4:
        return False
    if weight.dim() != 4 or not weight.is_contiguous() or weight.shape[1] != 1 or weight.shape[0] != x.shape[1]:
        return False
    return x.numel() > 0 and has_kernel(weight.shape[2:], stride, groups, x.shape[1])


def _pair(value: Any) -> tuple[int, int] | None:
    """Rows and columns of what is given as one number or two; None for anything else, as `padding="same"`."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(isinstance(v, int) for v in value):
        return value[0], value[-1]
    return None
