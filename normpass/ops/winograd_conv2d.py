"""`normpass::winograd_conv2d`: a convolution of 3×3 with stride 1, and its weight's gradient, of 16 products a tile.

    y[n, o, i, j] = Σ x[n, c, i + p − padding, j + q − padding] · weight[o, c, p, q] + bias[o]

A tile of 2×2 results takes 36 multiplications as it stands here and 16 as Winograd computes it (A. Lavin, S. Gray,
"Fast algorithms for convolutional neural networks", 2016: F(2×2, 3×3)); the kernels do so on a CPU, where that is
faster than the vendor's. Its matrices hold 0, ±1 and ±1/2: where the values of a tile are of about one size, it rounds
about as the sum does. Where they are not, or not finite, the vendor's convolution computes the tile, and everything
where many tiles are so or where the weight is: masked, for example (`kernels/cpu/winograd_checks.h` has the bounds).

The gradient of x is the same op with the weight transposed, and of the weight

    dweight[o, c, p, q] = Σ grad[n, o, i, j] · x[n, c, i + p − padding, j + q − padding]

The two ops are each other's derivatives, so any number of derivatives can be taken. The references are ATen's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels, Winograd

from .eager import eager_device, no_gradients
from .layout import convolution_format, memory_format_of
from .library import declare
from .operands import PLAIN_TYPES, dense
from .winograd_tiles import compute_tiles

aten = torch.ops.aten

Pair = Sequence[int]
KERNEL_SIZE = (3, 3)
DTYPES = (torch.float32, torch.float64)
LARGEST_PADDING = 2
_ONE, _NONE = [1, 1], [0, 0]


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, transposed: bool = False) -> Tensor:
    """The convolution of `x` with kernels of 3×3, stride 1.

    Args:
        x: (N, C, H, W), floating.
        weight: (O, C, 3, 3), dtype of `x`; where `transposed`, (C, O, 3, 3).
        bias: None or (O,), dtype of `x`.
        padding: rows and columns, (2,), each from 0 to 2.
        transposed: compute the transposed convolution, which is the gradient of a convolution's input.

    Returns:
        (N, O, *), as `torch.nn.functional.conv2d` (`conv_transpose2d`) gives it; channels_last where `x` or `weight`
        is.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
    """
    y: Tensor = _winograd_conv2d(x, weight, bias, padding, transposed)
    return y


def winograd_weight_gradient(grad: Tensor, x: Tensor, padding: Pair) -> Tensor:
    """The gradient of `winograd_conv2d` with respect to its weight.

    Args:
        grad: dL/dy, (N, O, *), dtype of `x`, any strides.
        x, padding: as given to `winograd_conv2d`, not transposed.

    Returns:
        (O, C, 3, 3), dtype and memory format of `x`.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
    """
    dweight: Tensor = _winograd_weight_gradient(grad, x, padding)
    return dweight


def result_size(size: Sequence[int], padding: Pair, transposed: bool = False) -> tuple[int, int]:
    """Rows and columns of the result for an input of `size` rows and columns."""
    rows, columns = ((n - 2 * p + 2) if transposed else (n + 2 * p - 2) for n, p in zip(size, padding, strict=True))
    return rows, columns


def pays(winograd: Winograd | None, x: Tensor, channels: int, padding: Pair) -> bool:
    """Whether any of the three passes over `x` (N, C, H, W) to `channels` is faster than the vendor's."""
    if winograd is None or x.dtype not in DTYPES or not _is_precise():
        return False
    tall, wide = result_size(x.shape[2:], padding)
    return winograd.pays(x, channels, (tall, wide), True)  # the weight's gradient gains the most


def _is_precise() -> bool:
    """Whether float32 is computed as such; where the user allows fewer bits, the vendor's kernels for those run."""
    return torch.backends.mkldnn.conv.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


# --- the convolution ------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, padding: Pair, transposed: bool) -> tuple[int, ...]:
    """The shape of the result."""
    fits = x.dim() == 4 and weight.dim() == 4 and tuple(weight.shape[2:]) == KERNEL_SIZE and weight.dtype == x.dtype
    if not fits or weight.shape[0 if transposed else 1] != x.shape[1]:
        expected = "(C, O, 3, 3)" if transposed else "(O, C, 3, 3)"
        raise ValueError(
            f"normpass::winograd_conv2d: `x` (N, C, H, W) and `weight` {expected} must have one dtype, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if not all(0 <= p <= LARGEST_PADDING for p in padding):
        raise ValueError(f"normpass::winograd_conv2d: `padding` must be from 0 to {LARGEST_PADDING}, got {padding}")
    return (x.shape[0], weight.shape[1 if transposed else 0], *result_size(x.shape[2:], padding, transposed))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, transposed: bool = False) -> Tensor:
    shape = _check(x, weight, padding, transposed)
    if transposed:
        y = _convolution_backward(x, x.new_empty(shape), weight, padding, (True, False, False))[0]
        y = y if bias is None else y + bias.view(1, -1, 1, 1)
    else:
        y = aten.convolution.default(x, weight, bias, _ONE, padding, _ONE, False, _NONE, 1)
    result: Tensor = y.contiguous(memory_format=convolution_format(x, weight))
    return result


def _kernel(
    kernels: Kernels | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    transposed: bool = False,
) -> Tensor:
    shape = _check(x, weight, padding, transposed)
    winograd = _able(kernels, x, weight, bias)
    if winograd is None or 0 in shape or not winograd.pays(x, shape[1], shape[2:], False):
        return _reference(x, weight, bias, padding, transposed)
    memory_format = convolution_format(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    weight_format = memory_format_of(weight)
    operands = dense(x, memory_format), dense(weight, weight_format), None if bias is None else bias.contiguous()
    left = winograd.convolve(y, *operands, padding, transposed, memory_format, weight_format)
    if left is None:
        return _reference(x, weight, bias, padding, transposed)
    if left.numel() > 0:
        border, inner = ([2 - p for p in padding], [2, 2]) if transposed else (padding, _NONE)
        compute_tiles(y, left, x, border, lambda windows: _reference(windows, weight, bias, inner, transposed))
    return y


def _able(kernels: Kernels | None, *tensors: Tensor | None) -> Winograd | None:
    """What computes with these tensors, which must be ordinary ones with values."""
    given = [t for t in tensors if t is not None]
    plain = all(type(t) in PLAIN_TYPES and not t.is_neg() and t.dtype in DTYPES and t.numel() for t in given)
    return kernels.winograd if plain and kernels is not None and _is_precise() else None


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, transposed: bool = False) -> Tensor:
    shape = _check(x, weight, padding, transposed)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=convolution_format(x, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, _winograd_conv2d, _winograd_weight_gradient), None, None


def _gradients(
    ctx: Any, grad: Tensor, convolve: Callable[..., Tensor], weight_gradient: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, those that are needed."""
    x, weight = ctx.saved_tensors
    needs, dx, dweight, dbias = ctx.needs_input_grad, None, None, None
    if needs[0]:
        dx = convolve(grad, weight, None, ctx.padding, not ctx.transposed)
    if needs[1]:
        pair = (x, grad) if ctx.transposed else (grad, x)
        dweight = weight_gradient(*pair, ctx.padding)
    if needs[2]:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


# --- the weight's gradient ------------------------------------------------------------------------


def _check_gradient(grad: Tensor, x: Tensor, padding: Pair) -> None:
    op = "normpass::winograd_weight_gradient"
    if x.dim() != 4 or grad.dim() != 4:
        raise ValueError(f"{op}: `x` and `grad` must be (N, C, H, W), got {tuple(x.shape)} and {tuple(grad.shape)}")
    expected = (x.shape[0], grad.shape[1], *result_size(x.shape[2:], padding))
    if tuple(grad.shape) != expected:
        raise ValueError(f"{op}: `grad` must have shape {expected} for an `x` of {tuple(x.shape)}, got {grad.shape}")
    if grad.dtype != x.dtype:
        raise ValueError(f"{op}: `grad` must have the dtype of `x`, {x.dtype}, got {grad.dtype}")


def _reference_gradient(grad: Tensor, x: Tensor, padding: Pair) -> Tensor:
    _check_gradient(grad, x, padding)
    weight = _new_weight(grad, x)  # its values do not matter
    dweight: Tensor = _convolution_backward(grad, x, weight, padding, (False, True, False))[1]
    return dweight.contiguous(memory_format=memory_format_of(x))


def _gradient_kernel(kernels: Kernels | None, grad: Tensor, x: Tensor, padding: Pair) -> Tensor:
    _check_gradient(grad, x, padding)
    winograd = _able(kernels, grad, x)
    if winograd is None or not winograd.pays(x, grad.shape[1], grad.shape[2:], True):
        return _reference_gradient(grad, x, padding)
    memory_format = memory_format_of(x)
    dweight = _new_weight(grad, x)
    operands = dense(grad, memory_format), dense(x, memory_format)
    if not winograd.weight_gradient(dweight, *operands, padding, memory_format):
        return _reference_gradient(grad, x, padding)
    return dweight


def _new_weight(grad: Tensor, x: Tensor) -> Tensor:
    shape = (grad.shape[1], x.shape[1], *KERNEL_SIZE)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _fake_gradient(grad: Tensor, x: Tensor, padding: Pair) -> Tensor:
    return _new_weight(grad, x)


def _gradient_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, ctx.padding = inputs
    ctx.save_for_backward(grad, x)


def _gradient_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """Of Σ outer·dweight, which is Σ grad·conv(x, outer)."""
    grad, x = ctx.saved_tensors
    dgrad = _winograd_conv2d(x, outer, None, ctx.padding, False) if ctx.needs_input_grad[0] else None
    dx = _winograd_conv2d(grad, outer, None, ctx.padding, True) if ctx.needs_input_grad[1] else None
    return dgrad, dx, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Pair, mask: Sequence[bool]
) -> tuple[Any, Any, Any]:
    """ATen's gradients of x, weight and bias; None where `mask` is False."""
    dx, dweight, dbias = aten.convolution_backward.default(
        grad, x, weight, [weight.shape[0]], _ONE, padding, _ONE, False, _NONE, 1, mask
    )
    return dx, dweight, dbias


_winograd_weight_gradient = declare(
    "winograd_weight_gradient(Tensor grad, Tensor x, SymInt[2] padding) -> Tensor",
    reference=_reference_gradient,
    fake=_fake_gradient,
    kernel=_gradient_kernel,
    backward=_gradient_backward,
    setup_context=_gradient_context,
)
_winograd_conv2d = declare(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt[2] padding, bool transposed=False) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)


class WinogradConv2d(torch.autograd.Function):
    """The op, not transposed, and its gradient without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, device: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.padding, ctx.transposed, ctx.device = padding, False, device
        ctx.save_for_backward(x, weight)
        return _kernel(kernels_for(device), x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        convolve, weight_gradient = _winograd_conv2d, _winograd_weight_gradient
        if not torch.is_grad_enabled() and eager_device(grad) == ctx.device:
            kernels = kernels_for(ctx.device)
            convolve = functools.partial(_kernel, kernels)
            weight_gradient = functools.partial(_gradient_kernel, kernels)
        return *_gradients(ctx, grad, convolve, weight_gradient), None, None
