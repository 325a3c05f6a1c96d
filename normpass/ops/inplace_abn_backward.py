"""`normpass::inplace_abn_backward`: the gradients of `inplace_abn` (algebra: there) from its output.

x̂ = (y − bias)/weight keeps the sign of the weight. Its magnitude is bounded below in this division alone, by
the machine epsilon of the statistics' dtype (zero counts as positive), so that nothing is infinite or NaN; at
weight 0 dx is 0, as it should be, and float32's error in x̂ is of the order of |bias|.

No x̂ is ever written out. In the reference ATen's BatchNorm backward, given bias for the mean and 1/weight for the
inverse deviation, computes x̂, both sums and dx in its own passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels

from .activation import RULES, Activation, activation_backward, deactivate, is_invertible
from .layout import check_like, memory_format_of, or_empty, statistics_dtype
from .library import declare
from .normalize import check_has_values, check_site
from .operands import can_run, dense, in_dtype_of, layout_of, new_like, new_per_channel, norm_operand

aten = torch.ops.aten

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight and bias."""


def inplace_abn_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from the output of `inplace_abn`.

    Args:
        grad: dL/dz, shape and dtype of `z`, any strides.
        z: (N, C, *), what `inplace_abn` returned.
        needs: which of the three gradients to compute; that of an absent weight or bias is not computed.
        The others: as given to `inplace_abn`.

    Returns:
        dx in shape, dtype and memory format of `z`; dweight and dbias in shape and dtype of theirs. What is
        not needed is an empty tensor of shape (0,).

    Raises:
        ValueError: as `inplace_abn`, or `grad` does not match `z`.
    """
    dx, dweight, dbias = _inplace_abn_backward(
        grad, z, weight, bias, var, eps, batch_statistics, activation, activation_args, needs
    )
    return dx, dweight, dbias


def check_invertible_site(
    op: str, x: Tensor, activation: str, activation_args: Sequence[float], **values: Tensor | None
) -> None:
    """Raise ValueError unless these are one norm's arguments and its activation has an inverse."""
    check_site(op, x, activation, activation_args, **values)
    if not is_invertible(activation, activation_args):
        invertible = ", ".join(name for name, rule in RULES.items() if rule.inverse is not None)
        raise ValueError(
            f"normpass::{op}: the activation must be invertible ({invertible}; slope and alpha above 0), "
            f"got {Activation(activation, tuple(activation_args))}"
        )


def can_invert(
    kernels: Kernels,
    x: Tensor,
    likes: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    activation: str,
    activation_args: Sequence[float],
) -> bool:
    """`can_run`, and the activation has an inverse."""
    return can_run(kernels, x, likes, values, activation, activation_args) and is_invertible(
        activation, activation_args
    )


def _check(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    activation: str,
    activation_args: Sequence[float],
) -> None:
    values = {"weight": weight, "bias": bias, "var": var}
    check_invertible_site("inplace_abn_backward", z, activation, activation_args, **values)
    check_like("inplace_abn_backward", z, "grad", grad)


def _reference(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernel(None, grad, *others)


def _reference_gradients(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> Gradients:
    _check(grad, z, weight, bias, var, activation, activation_args)
    check_has_values("inplace_abn_backward", z, batch_statistics)
    memory_format = memory_format_of(z)
    z = z.contiguous(memory_format=memory_format)
    y = deactivate(z, activation, activation_args)
    dy = activation_backward(grad, y, activation, activation_args).contiguous(memory_format=memory_format)
    scale = torch.ones_like(var) if weight is None else weight
    shift = torch.zeros_like(var) if bias is None else bias
    mask = (needs[0], needs[1] and weight is not None, needs[2] and bias is not None)
    return _gradients(dy, y, scale, shift, var, eps, batch_statistics, mask)


def _gradients(
    dy: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    mask: Sequence[bool],
) -> Gradients:
    """dx, dweight and dbias from dy and y, each in its own dtype, None where `mask` is False."""
    targets = (y, scale, shift)
    if y.numel() == 0:  # ATen divides by the number of values
        dx, dweight, dbias = (torch.zeros_like(t) if m else None for t, m in zip(targets, mask, strict=True))
        return dx, dweight, dbias
    dtype = statistics_dtype(y)
    scale, shift = scale.to(dtype), shift.to(dtype)
    slope = scale * torch.rsqrt(var.to(dtype) + eps)
    divisor = _away_from_zero(scale)
    results: list[Any] = [None, None, None]
    through_sums = (mask[0] and batch_statistics, mask[1], mask[2])
    if any(through_sums):  # dx = invstd·weight·(dy − S1/m − x̂·S2/m), and here invstd·weight = slope
        results = list(
            aten.native_batch_norm_backward(
                dy, y, slope * divisor, None, None, shift, 1 / divisor, True, eps, through_sums
            )
        )
    if mask[0] and not batch_statistics:  # dx = slope·dy: unit running variance leaves ATen only the weight
        unit, zero = torch.ones_like(slope), torch.zeros_like(slope)
        only_dx = (True, False, False)
        results[0], _, _ = aten.native_batch_norm_backward(dy, y, slope, zero, unit, None, None, False, 0.0, only_dx)
    dx, dweight, dbias = (g.to(t.dtype) if m else None for g, t, m in zip(results, targets, mask, strict=True))
    return dx, dweight, dbias


def _away_from_zero(scale: Tensor) -> Tensor:
    smallest = torch.finfo(scale.dtype).eps
    magnitude = scale.abs().clamp_(min=smallest)
    return torch.where(scale < 0, -magnitude, magnitude)


def inplace_abn_gradients(
    kernels: Kernels | None,
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> Gradients:
    """What `inplace_abn_backward` returns, not differentiable, with None for what is not needed or absent."""
    values, options = (weight, bias, var), (eps, batch_statistics, activation, activation_args)
    if kernels is None or not can_invert(kernels, z, (grad,), values, activation, activation_args):
        return _reference_gradients(grad, z, weight, bias, var, *options, needs)
    memory_format, dtype = memory_format_of(z), statistics_dtype(z)
    dx = new_like(z, memory_format, needs[0])
    dweight, dbias = new_per_channel(weight, dtype, needs[1]), new_per_channel(bias, dtype, needs[2])
    kernels.inplace_abn_backward(
        dx,
        dweight,
        dbias,
        dense(grad, memory_format),
        dense(z, memory_format),
        norm_operand((weight, bias, None, var), options, dtype),
        batch_statistics,
        layout_of(z, memory_format),
    )
    return dx, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)


def _kernel(kernels: Kernels | None, grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (or_empty(t, grad) for t in inplace_abn_gradients(kernels, grad, *others))
    return dx, dweight, dbias


def _fake(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    eps: float,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(grad, z, weight, bias, var, activation, activation_args)
    dx = torch.empty_like(z, memory_format=memory_format_of(z)) if needs[0] else grad.new_empty(0)
    dweight = grad.new_empty(0) if weight is None or not needs[1] else weight.new_empty(weight.shape)
    dbias = grad.new_empty(0) if bias is None or not needs[2] else bias.new_empty(bias.shape)
    return dx, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass  # nothing is kept: there is no second derivative


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "normpass::inplace_abn: a second derivative needs x, which this op does not keep; use the exact "
        "rewrite instead (leave out allow_lossy)"
    )


_inplace_abn_backward = declare(
    "inplace_abn_backward(Tensor grad, Tensor z, Tensor? weight, Tensor? bias, Tensor var, float eps, "
    "bool batch_statistics, str activation, float[] activation_args, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_no_double_backward,
    setup_context=_setup_context,
)
