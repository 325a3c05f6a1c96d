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

_NARROWED = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (torch.float64, *_NARROWED)


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
    x, w, b = (_as_autocast(t) for t in (input, weight, bias))
    if border is None or step is None or _pair(dilation) != (1, 1) or not _fits(x, w, b, step, groups):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        return depthwise_conv2d(x, w, b, step, border)
    if eager_device(x, w, b) != "cpu" or kernels_for("cpu") is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y: Tensor = DepthwiseConv2d.apply(x, w, b, step, border, "cpu")
    return y


def _as_autocast(t: Any) -> Any:
    """`t` as autocast would give it to a convolution on the CPU."""
    if t is None or not torch.is_autocast_enabled("cpu") or t.device.type != "cpu" or t.dtype not in _NARROWED:
        return t
    return t.to(torch.get_autocast_dtype("cpu"))


def has_kernel(kernel_size: Any, stride: Any, groups: int, channels: int) -> bool:
    """Whether a convolution of this kind is one that `depthwise_layer` is for."""
    step = _pair(stride)
    return groups == channels > 1 and kernel_size[1] in WIDTHS and step is not None and step[1] in STRIDES


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], groups: int) -> bool:
    if not (torch.is_grad_enabled() and weight.requires_grad) or under_other_derivatives() or is_exporting():
        return False
    if x.device.type != "cpu" or x.dim() != 4 or x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return False
    if bias is not None and bias.dtype != x.dtype:
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
