"""What a rewritten graph calls where a convolution stood for which there are kernels of our own.

Decided when the graph runs: with other dtypes, or shapes at which the vendor's are as fast, torch's function runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import DEPTHWISE_STRIDES, DEPTHWISE_WIDTHS, Kernels
from normpass.onlookers import is_compiling, is_exporting, under_other_derivatives
from normpass.ops.depthwise_conv2d import DepthwiseConv2d, depthwise_conv2d
from normpass.ops.eager import eager_device
from normpass.ops.layout import memory_format_of
from normpass.ops.norm_act import norm_act_on
from normpass.ops.norm_act_depthwise import norm_act_depthwise_on
from normpass.ops.winograd_conv2d import DTYPES, KERNEL_SIZE, LARGEST_PADDING, WinogradConv2d, pays, winograd_conv2d
from normpass.recipe.notes import copying
from normpass.runtime.functional import FunctionalBatchNorm, is_fusible, op_args

_NARROWED = {torch.float32, torch.bfloat16, torch.float16}
_FLOATING = {torch.float64, *_NARROWED}
_ONCE = (1, 1)

Pair = tuple[int, int]


def convolution_function(
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
    if border is not None and step is not None and _pair(dilation) == _ONCE and _fits(input, weight):
        kernel = weight.shape[2:]
        y = None
        if is_depthwise(kernel, step, groups, input.shape[1]):
            y = _depthwise(input, weight, bias, step, border)
        elif is_winograd(kernel, step, groups, border):
            y = _winograd(input, weight, bias, border)
        if y is not None:
            return y
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def norm_act_convolution(
    norm_act: Callable[..., Tensor],
    norm: FunctionalBatchNorm,
    x: Tensor,
    activation: str,
    activation_args: Sequence[float],
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """`F.conv2d(act(norm(x)), weight, …)`; where one kernel does both, the result of the norm is never written.

    x: (N, C, H, W). norm_act: what makes that result elsewhere, `split_norm_act` or `fused_norm_act`.
    """
    steps = _joined_steps(x, weight, bias, stride, padding, dilation, groups)
    if steps is None or not is_fusible(norm, x, None, activation):
        z = norm_act(norm, x, None, activation, activation_args)
        return convolution_function(z, weight, bias, stride, padding, dilation, groups)
    args = op_args("cpu", norm, x, None, activation, activation_args)
    with copying(norm.bias):
        joined = norm_act_depthwise_on("cpu", x, args[2:6], args[6:], weight, bias, *steps)
        if joined is not None:
            return joined
        z = norm_act_on("cpu", *args)
    return convolution_function(z, weight, bias, stride, padding, dilation, groups)


def is_depthwise(kernel_size: Sequence[int], stride: Any, groups: int, channels: int) -> bool:
    """Whether there are kernels for convolutions of this kind."""
    step = _pair(stride)
    return (
        groups == channels > 1
        and kernel_size[1] in DEPTHWISE_WIDTHS
        and step is not None
        and step[1] in DEPTHWISE_STRIDES
    )


def is_winograd(kernel_size: Sequence[int], stride: Any, groups: int, padding: Any) -> bool:
    """Whether convolutions of this kind have kernels; these run where they are the faster ones."""
    border = _pair(padding)
    is_three = tuple(kernel_size) == KERNEL_SIZE and _pair(stride) == _ONCE and groups == 1
    return is_three and border is not None and all(0 <= p <= LARGEST_PADDING for p in border)


def runs_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether `convolution_function` of tensors like these runs kernels of ours; they may be without memory."""
    border, kernels = _pair(padding), kernels_for("cpu")
    if kernels is None or border is None or _pair(dilation) != _ONCE or not _fits(x, weight):
        return False
    fits = is_winograd(weight.shape[2:], stride, groups, border) and _dtype(x, weight, bias) == x.dtype
    return fits and pays(kernels.winograd, x, weight.shape[0], border)


def runs_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """As `runs_winograd`, of a depthwise convolution that trains."""
    step, border, kernels = _pair(stride), _pair(padding), kernels_for("cpu")
    depthwise = None if kernels is None else kernels.depthwise
    if depthwise is None or step is None or border is None or _pair(dilation) != _ONCE or not _fits(x, weight):
        return False
    kernel, dtype, memory_format = weight.shape[2:], _dtype(x, weight, bias), memory_format_of(x)
    if not (is_depthwise(kernel, step, groups, x.shape[1]) and weight.requires_grad and dtype in _FLOATING):
        return False
    joined = dtype == x.dtype and depthwise.convolves(dtype, memory_format, kernel, step, border)
    return joined or depthwise.has_weight_gradient(dtype, memory_format, kernel, step)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor | None:
    trains = torch.is_grad_enabled() and weight.requires_grad
    if not trains or weight.shape[1] != 1 or weight.shape[0] != x.shape[1] or not weight.is_contiguous():
        return None
    dtype, is_traced = _dtype(x, weight, bias), is_compiling()
    if dtype not in _FLOATING or not (is_traced or _has_gradient(x, dtype, weight, bias, stride)):
        return None
    if is_traced and weight.shape[3] == 3:
        return None  # fused with what is around it, the vendor's does as well
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if is_traced:
        return depthwise_conv2d(x, weight, bias, stride, padding)
    y: Tensor = DepthwiseConv2d.apply(x, weight, bias, stride, padding, "cpu")
    return y


def _joined_steps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Pair, Pair] | None:
    """Stride and padding, if one kernel may normalize x and convolve it as far as the convolution is concerned."""
    stride, padding = _pair(stride), _pair(padding)
    if stride is None or padding is None or _pair(dilation) != _ONCE:
        return None
    if not _fits(x, weight) or groups != x.shape[1] or _dtype(x, weight, bias) != x.dtype:
        return None
    kernels = _kernels(x, weight, bias)
    depthwise = None if kernels is None else kernels.depthwise
    if depthwise is None or not depthwise.convolves(x.dtype, memory_format_of(x), weight.shape[2:], stride, padding):
        return None
    return stride, padding


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair) -> Tensor | None:
    if weight.shape[1] != x.shape[1] or _dtype(x, weight, bias) != x.dtype:
        return None
    if is_compiling():  # what runs is decided by the op: here the shapes may be unknown
        return winograd_conv2d(x, weight, bias, padding) if x.dtype in DTYPES else None
    kernels = _kernels(x, weight, bias)
    if kernels is None or not pays(kernels.winograd, x, weight.shape[0], padding):
        return None
    y: Tensor = WinogradConv2d.apply(x, weight, bias, padding, "cpu")
    return y


def _has_gradient(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor | None, stride: Pair) -> bool:
    kernels = _kernels(x, weight, bias)
    depthwise = None if kernels is None else kernels.depthwise
    return depthwise is not None and depthwise.has_weight_gradient(dtype, memory_format_of(x), weight.shape[2:], stride)


def _kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Kernels | None:
    """Those that can be called with these tensors without the dispatcher."""
    return kernels_for("cpu") if eager_device(x, weight, bias) == "cpu" else None


def _dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """That in which a convolution on the CPU takes its arguments, under autocast another than theirs; None if several.

    Autocast leaves float64 as it is.
    """
    dtypes = {t.dtype for t in tensors if t is not None}
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        dtypes = {narrow if d in _NARROWED else d for d in dtypes}
    return dtypes.pop() if len(dtypes) == 1 else None


def _fits(x: Tensor, weight: Tensor) -> bool:
    if under_other_derivatives() or is_exporting() or x.device.type != "cpu":
        return False
    return x.dim() == 4 and weight.dim() == 4 and x.numel() > 0


def _pair(value: Any) -> Pair | None:
    """Rows and columns of what is given as one number or two; None for anything else, as `padding="same"`."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(isinstance(v, int) for v in value):
        return value[0], value[-1]
    return None
