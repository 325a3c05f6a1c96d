"""`normpass::depthwise_conv2d`: a convolution with a kernel of its own for every channel, and its weight's gradient.

    y[n, c, i, j] = Σ x[n, c, i·stride + p − padding, j·stride + q − padding] · weight[c, 0, p, q] + bias[c]

    dx[n, c, i·stride + p − padding, j·stride + q − padding] += grad[n, c, i, j] · weight[c, 0, p, q]
    dweight[c, 0, p, q] = Σ grad[n, c, i, j] · x[n, c, i·stride + p − padding, j·stride + q − padding]

Forward is ATen's. The gradients have kernels on the CPU, dx in channels_last: there oneDNN takes twice as long, and for
dweight with 5 or 7 columns 10 to 20 times as long as reading its arguments does. The gradient of the weight is an op of
its own.

The kernels' loops have no borders but zeros around the images, and 0·∞ is NaN. So with a weight that is not finite, or
a dweight that comes out so, ATen's functions run, which have an infinity or a NaN in fewer places.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Depthwise, Kernels

from .eager import eager_device, no_gradients
from .layout import memory_format_of, statistics_dtype
from .library import declare
from .operands import PLAIN_TYPES, dense

aten = torch.ops.aten

Pair = Sequence[int]
_ONE, _NONE = [1, 1], [0, 0]


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """The convolution of `x` with one kernel for each channel.

    Args:
        x: (N, C, H, W), floating.
        weight: (C, 1, kernel height, kernel width), dtype of `x`.
        bias: None or (C,), dtype of `x`.
        stride, padding: rows and columns, (2,) each.

    Returns:
        (N, C, *), as `torch.nn.functional.conv2d` with `groups=C` gives it.

    Raises:
        ValueError: `x` or `weight` has another shape or dtype.
    """
    y: Tensor = _depthwise_conv2d(x, weight, bias, stride, padding)
    return y


def depthwise_weight_gradient(grad: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of `depthwise_conv2d` with respect to its weight.

    Args:
        grad: dL/dy, (N, C, *), dtype of `x`, any strides.
        x, stride, padding: as given to `depthwise_conv2d`.
        kernel_size: rows and columns of the weight.

    Returns:
        (C, 1, *kernel_size), dtype and memory format of `x`.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
    """
    dweight: Tensor = _depthwise_weight_gradient(grad, x, kernel_size, stride, padding)
    return dweight


def output_size(size: Sequence[int], kernel_size: Pair, stride: Pair, padding: Pair) -> tuple[int, int]:
    """Rows and columns of the result for an input of `size` rows and columns."""
    rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True))
    return rows, columns


# --- the weight's gradient ------------------------------------------------------------------------


def _check_gradient(grad: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> None:
    op = "normpass::depthwise_weight_gradient"
    if x.dim() != 4 or grad.dim() != 4:
        raise ValueError(f"{op}: `x` and `grad` must be (N, C, H, W), got {tuple(x.shape)} and {tuple(grad.shape)}")
    expected = (*x.shape[:2], *output_size(x.shape[2:], kernel_size, stride, padding))
    if tuple(grad.shape) != expected:
        raise ValueError(f"{op}: `grad` must have shape {expected} for an `x` of {tuple(x.shape)}, got {grad.shape}")
    if grad.dtype != x.dtype:
        raise ValueError(f"{op}: `grad` must have the dtype of `x`, {x.dtype}, got {grad.dtype}")


def _reference_gradient(grad: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    _check_gradient(grad, x, kernel_size, stride, padding)
    weight = x.new_empty((x.shape[1], 1, *kernel_size))  # its values do not matter
    dweight: Tensor = _convolution_backward(grad, x, weight, stride, padding, (False, True, False))[1]
    return dweight.contiguous(memory_format=memory_format_of(x))


def _gradient_kernel(
    kernels: Kernels | None, grad: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair
) -> Tensor:
    memory_format, depthwise = memory_format_of(x), depthwise_of(kernels, grad, x)
    if depthwise is None or not depthwise.has_weight_gradient(x.dtype, memory_format, kernel_size, stride):
        return _reference_gradient(grad, x, kernel_size, stride, padding)
    _check_gradient(grad, x, kernel_size, stride, padding)
    dweight = new_weight(x, kernel_size, statistics_dtype(x))
    operands = dense(grad, memory_format), dense(x, memory_format)
    depthwise.weight_gradient(dweight, *operands, stride, padding, memory_format)
    if not is_finite(dweight):
        return _reference_gradient(grad, x, kernel_size, stride, padding)
    return dweight if dweight.dtype == x.dtype else dweight.to(x.dtype)


def depthwise_of(kernels: Kernels | None, *tensors: Tensor) -> Depthwise | None:
    """What computes with these tensors, which must be ordinary ones with values."""
    plain = all(type(t) in PLAIN_TYPES and not t.is_neg() and t.numel() for t in tensors)
    return kernels.depthwise if plain and kernels is not None else None


def is_finite(weight: Tensor) -> bool:
    """Whether all numbers are, and so is their sum: what is asked of a weight of a few thousand numbers."""
    return math.isfinite(float(weight.detach().sum()))


def _fake_gradient(grad: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    return new_weight(x, kernel_size, x.dtype)


def new_weight(x: Tensor, kernel_size: Pair, dtype: torch.dtype) -> Tensor:
    """Memory for the weight's gradient."""
    shape = (x.shape[1], 1, *kernel_size)  # with one value per pixel both memory formats are one order
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format_of(x))


def _gradient_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, x)


def _gradient_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """Of Σ outer·dweight, which is Σ grad·conv(x, outer)."""
    grad, x = ctx.saved_tensors
    dgrad = _convolution(x, outer, None, ctx.stride, ctx.padding)
    return dgrad, input_gradient(grad, x, outer, ctx.stride, ctx.padding), None, None, None


_depthwise_weight_gradient = declare(
    "depthwise_weight_gradient(Tensor grad, Tensor x, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding) "
    "-> Tensor",
    reference=_reference_gradient,
    fake=_fake_gradient,
    kernel=_gradient_kernel,
    backward=_gradient_backward,
    setup_context=_gradient_context,
)


# --- the convolution ------------------------------------------------------------------------------


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    y: Tensor = aten.convolution.default(x, weight, bias, stride, padding, _ONE, False, _NONE, x.shape[1])
    return y


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, mask: Sequence[bool]
) -> tuple[Any, Any, Any]:
    """ATen's gradients of x, weight and bias; None where `mask` is False."""
    channels = x.shape[1]
    dx, dweight, dbias = aten.convolution_backward.default(
        grad, x, weight, [channels], stride, padding, _ONE, False, _NONE, channels, mask
    )
    return dx, dweight, dbias


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    if x.dim() != 4 or weight.dim() != 4 or tuple(weight.shape[:2]) != (x.shape[1], 1) or weight.dtype != x.dtype:
        raise ValueError(
            "normpass::depthwise_conv2d: `x` (N, C, H, W) and `weight` (C, 1, *, *) must have one dtype, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    return _convolution(x, weight, bias, stride, padding)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    return _convolution(x, weight, bias, stride, padding)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, input_gradient, _depthwise_weight_gradient), None, None


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """That of x, of which only the shape and the layout matter, by ATen: it can be differentiated."""
    dx: Tensor = _convolution_backward(grad, x, weight, stride, padding, (True, False, False))[0]
    return dx


def input_gradient_on(
    kernels: Kernels | None, grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """The same by a kernel, where there is one."""
    memory_format, depthwise = memory_format_of(x), depthwise_of(kernels, grad, weight)
    kernel_size = weight.shape[2:]
    has_kernel = depthwise is not None and depthwise.has_input_gradient(x, memory_format, kernel_size, stride, padding)
    if depthwise is None or not has_kernel or not is_finite(weight):
        return input_gradient(grad, x, weight, stride, padding)
    dx = torch.empty_like(x, memory_format=memory_format)
    depthwise.convolve(dx, dense(grad, memory_format), weight.contiguous(), None, stride, padding, transposed=True)
    return dx


def _gradients(
    ctx: Any, grad: Tensor, of_input: Callable[..., Tensor], of_weight: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, those that are needed."""
    x, weight = ctx.saved_tensors
    needs, dx, dweight, dbias = ctx.needs_input_grad, None, None, None
    if needs[0]:
        dx = of_input(grad, x, weight, ctx.stride, ctx.padding)
    if needs[1]:
        dweight = of_weight(grad, x, weight.shape[2:], ctx.stride, ctx.padding)
    if needs[2]:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


class DepthwiseConv2d(torch.autograd.Function):
    """The op and its gradient without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, device: str
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.stride, ctx.padding, ctx.device = stride, padding, device
        ctx.save_for_backward(x, weight)
        return _convolution(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        functions = input_gradient, _depthwise_weight_gradient
        if not torch.is_grad_enabled() and eager_device(grad) == ctx.device:
            kernels = kernels_for(ctx.device)
            functions = functools.partial(input_gradient_on, kernels), functools.partial(_gradient_kernel, kernels)
        return *_gradients(ctx, grad, *functions), None, None, None


def _kernel(kernels: Kernels | None, *args: Any) -> Tensor:
    return _reference(*args)


_depthwise_conv2d = declare(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
