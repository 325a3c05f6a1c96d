"""`normpass::norm_act`: normalize, scale and shift, add a residual, activate; keeps its input for backward.

Per channel, with m = N·spatial values and r = 1/sqrt(var + eps):

    x̂ = (x − mean)·r      a = weight·r      y = a·(x − mean) + bias      z = act(y + residual)

Backward from g = dL/dz. dy = g·act'(y + residual), which is the residual's gradient too; S1 = Σdy, S2 =
Σdy·x̂; dbias = S1, dweight = S2, and

    dx = A·dy + B·x + C    A = a,  B = −a·r·S2/m,  C = −a·S1/m − B·mean    (mean and var are x's own moments)
    dx = a·dy                                                              (running statistics)

(Ioffe and Szegedy 2015). With `batch_statistics` the op owns the gradient of mean and var: it is inside dx,
and their own gradients are None. So autograd keeps x (and the residual, where act' needs it) and never z: y
is rebuilt in backward by the code of forward, bit for bit, so a ReLU's mask is the same in both.

Where act' is one of two numbers (ReLU, hardtanh, leaky ReLU) and the kernels have masks, as CUDA's do, forward writes
one bit an element, and that is kept and read in the place of the residual.

In 16 bits y, the sum and z are each rounded to x's dtype, as in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels, Layout
from normpass.kernels.masks import bytes_of_mask

from .activation import activate_
from .eager import eager_device, no_gradients
from .layout import activated_format, check_like, dense_in, memory_format_of, new_result, statistics_dtype
from .library import declare
from .norm_act_backward import _norm_act_backward, norm_act_gradients, unmasked
from .normalize import check_has_values, check_site, normalize, refuse_statistics_gradient
from .operands import Options, Values, can_run, dense, layout_of, norm_operand
from .vectors import Vectors


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
) -> Tensor:
    """z = act((x − mean)·rsqrt(var + eps)·weight + bias + residual).

    Args:
        x: (N, C, *), floating.
        residual: None, or shape and dtype of `x`, in any layout.
        weight, bias: None or (C,), any floating dtype.
        mean, var: (C,), the biased variance; float32 for 16-bit `x` to keep its accuracy.
        eps: added to `var`.
        batch_statistics: `mean` and `var` are the moments of this `x`, and the gradient of `x` goes through
            them. Otherwise they are constants.
        activation, activation_args: a name of `normpass.ops.Activation` and its arguments.

    Returns:
        (N, C, *), dtype of `x`, in the memory format in which ATen's functions give it.

    Raises:
        ValueError: a shape, dtype or activation other than these; an empty `x` with `batch_statistics`;
            `mean` or `var` that require a gradient without `batch_statistics`, which this op would not give
            them.
    """
    z: Tensor = _norm_act(x, residual, weight, bias, mean, var, eps, batch_statistics, activation, activation_args)
    return z


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation: str,
    activation_args: Sequence[float],
) -> None:
    check_site("norm_act", x, activation, activation_args, weight=weight, bias=bias, mean=mean, var=var)
    check_like("norm_act", x, "residual", residual)


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, residual, weight, bias, mean, var, activation, activation_args)
    check_has_values("norm_act", x, batch_statistics)
    x = dense_in(x, activated_format(x, activation))
    return activate_(normalize(x, residual, weight, bias, mean, var, eps), activation, activation_args)


def _kernel(
    kernels: Kernels | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *options: Any,
) -> Tensor:
    return _computed(kernels, False, x, residual, (weight, bias, mean, var), options)[0]


def _computed(
    kernels: Kernels | None,
    wants_mask: bool,
    x: Tensor,
    residual: Tensor | None,
    values: Values,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """z, and the mask that backward reads in the place of the residual, where one is wanted and there can be one."""
    activation = options[2]
    if kernels is None or not can_run(kernels, x, (residual,), values, activation, options[3]):
        return _reference(x, residual, *values, *options), None
    memory_format = memory_format_of(x)
    z, layout = new_result(x, activation), layout_of(x, memory_format)
    given, added = dense(x, memory_format), dense(residual, memory_format)
    mask = new_mask(kernels, given, added, activation, layout) if wants_mask and added is not None else None
    kernels.norm_act(
        z,
        given,
        added,
        norm_operand(values, options, statistics_dtype(x)),
        layout,
        *((mask,) if mask is not None else ()),
    )
    return z, mask


def new_mask(kernels: Kernels, x: Tensor, residual: Tensor, activation: str, layout: Layout) -> Tensor | None:
    """Memory for the mask of a join of two dense tensors, where the kernels write one."""
    if activation not in kernels.masks or (x.data_ptr() | residual.data_ptr()) % 16:
        return None
    return x.new_empty(bytes_of_mask(layout, x.element_size()), dtype=torch.uint8)


def has_mask(kernels: Kernels | None, x: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether backward of these, at 16-byte addresses, reads a mask."""
    return kernels is not None and residual is not None and activation in kernels.masks and kernels.supports(x.dtype)


def _save(
    ctx: Any,
    activation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None = None,
    vectors: Vectors | None = None,
) -> None:
    """Keep what backward reads: bias, and residual or mask, only for an activation's derivative."""
    rebuilds_y = activation != "identity" and mask is None
    ctx.vectors, ctx.is_masked, ctx.bias_dtype = vectors, mask is not None, None
    if vectors is not None:
        ctx.save_for_backward(x, residual if rebuilds_y else mask)
        return
    ctx.bias_dtype = None if bias is None or rebuilds_y else bias.dtype
    ctx.save_for_backward(x, residual if rebuilds_y else mask, weight, bias if rebuilds_y else None, mean, var)


Saved = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", Tensor, Tensor]


def _saved(ctx: Any) -> tuple[Saved, Tensor | None]:
    """x, residual, weight, bias, mean, var; for a bias that was not kept one of its shape and dtype. And the mask."""
    if ctx.vectors is not None:
        x, residual = ctx.saved_tensors
        weight, bias, mean, var = ctx.vectors.read_attached() if torch.is_grad_enabled() else ctx.vectors.read()
    else:
        x, residual, weight, bias, mean, var = ctx.saved_tensors
    if ctx.bias_dtype is not None:
        bias = mean.detach().to(ctx.bias_dtype)
    if ctx.is_masked:
        return (x, None, weight, bias, mean, var), residual
    return (x, residual, weight, bias, mean, var), None


def _forward(
    ctx: Any,
    device: str,
    options: Options,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    vectors: Vectors | None = None,
) -> Tensor:
    """z, with what backward reads kept."""
    ctx.options = options
    wants_mask = residual is not None and any(ctx.needs_input_grad[:4])
    z, mask = _computed(kernels_for(device), wants_mask, x, residual, (weight, bias, mean, var), options)
    _save(ctx, options[2], x, residual, weight, bias, mean, var, mask, vectors)
    return z


class NormAct(torch.autograd.Function):
    """The op and its gradient without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        device: str,
        options: Options,
        vectors: Vectors | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        return _forward(ctx, device, options, x, residual, weight, bias, mean, var, vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        options: Options = ctx.options
        needs, (tensors, mask) = ctx.needs_input_grad[:4], _saved(ctx)
        device = None if torch.is_grad_enabled() else eager_device(grad)
        if device is None:
            return *_gradients_by_op(grad, tensors, options, needs, mask), *[None] * 5
        x, residual, weight, bias, mean, var = tensors
        is_sum = needs[1] and options[2] == "identity"  # then the residual's gradient is `grad` itself
        if is_sum:
            needs = needs[0], False, *needs[2:]
        dx, dresidual, dweight, dbias = norm_act_gradients(
            kernels_for(device), grad, x, residual, weight, bias, mean, var, *options, needs, None, mask
        )
        return dx, grad if is_sum else dresidual, dweight, dbias, None, None, None, None, None


def norm_act_on(
    device: str | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
    vectors: Vectors | None = None,
) -> Tensor:
    """`norm_act` without the dispatcher where `device`, from `eager_device` of `x` and `residual`, is not None.

    With `vectors`, which are of these weight, bias, mean and var, it keeps those in their place.
    """
    tensors, options = (x, residual, weight, bias, mean, var), (eps, batch_statistics, activation, activation_args)
    if device is None or (not batch_statistics and (mean.requires_grad or var.requires_grad)):
        z: Tensor = _norm_act(*tensors, *options)
    elif torch.is_grad_enabled():
        z = NormAct.apply(*tensors, device, options, vectors)
    else:
        z = _kernel(kernels_for(device), *tensors, *options)
    return z


def rebuild_norm_act(x: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
    """`norm_act` by the shortest way: what a recipe calls."""
    return norm_act_on(eager_device(x, residual), x, residual, *others)


def rebuild_from_vectors(x: Tensor, residual: Tensor | None, vectors: Values, *options: Any) -> Tensor:
    """`rebuild_norm_act` where a recipe has weight, bias, mean and var as one."""
    return norm_act_on(eager_device(x, residual), x, residual, *vectors, *options)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    _check(x, residual, weight, bias, mean, var, activation, activation_args)
    return new_result(x, activation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, bias, mean, var, *options = inputs
    _, batch_statistics, activation, _ = options
    refuse_statistics_gradient("norm_act", ctx, 4, batch_statistics)
    ctx.options = options
    _save(ctx, activation, x, residual, weight, bias, mean, var)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    return *_gradients_by_op(grad, _saved(ctx)[0], ctx.options, needs), *[None] * 6


def _gradients_by_op(
    grad: Tensor,
    tensors: Saved,
    options: Sequence[Any],
    needs: Sequence[bool],
    mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    if mask is not None:
        grad, options = unmasked(mask, grad, tensors[0], options)
    gradients: Any = _norm_act_backward(grad, *tensors, *options, needs)
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


_norm_act = declare(
    "norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
