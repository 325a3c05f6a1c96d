"""What a rewritten graph calls where the residual of a join is itself a norm's result that nobody else reads.

    prepared    where that norm stood: its moments, and its running statistics move; x' is normalized where it is read
    joined      where the join stood (`normpass.ops.norm_act_join`); also for two readers

Decided when the graph runs: where the kernels cannot, the residual is made after all, and all is as it was without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.ops.eager import eager_device
from normpass.ops.norm_act import norm_act_on, rebuild_norm_act
from normpass.ops.norm_act_join import Half, can_join, join_norms, join_norms_twice, rebuild_join
from normpass.ops.norm_act_twice import hands_out_twice
from normpass.recipe.notes import copying, notes_now, tag
from normpass.runtime.functional import fused_norm_act, is_fusible, op_args, split_norm_act
from normpass.runtime.two_readers import Twice, fused_norm_act_twice, split_norm_act_twice


class Prepared(NamedTuple):
    """A norm without activation whose result is not there yet."""

    device: str
    half: Half
    bias: Tensor | None
    is_rebuilt: bool

    def made(self) -> Tensor:
        """The result after all, noted as if it had been made at once."""
        notes = notes_now() if self.is_rebuilt else None
        if notes is not None:
            notes.begin()
        with copying(self.bias) if self.is_rebuilt else nullcontext():
            z = norm_act_on(self.device, *self.half)
            if notes is not None:
                tag(z, rebuild_norm_act, self.half)
        return z


def _prepared(norm: Any, x: Tensor, is_rebuilt: bool) -> Tensor | Prepared:
    device, makes = eager_device(x), split_norm_act if is_rebuilt else fused_norm_act
    kernels = None if device is None or not torch.is_grad_enabled() else kernels_for(device)
    wants_gradient = any([t is not None and t.requires_grad for t in (x, norm.weight, norm.bias)])
    can = kernels is not None and kernels.normalizes_residuals and wants_gradient
    if device is None or not can or not is_fusible(norm, x, None, "identity"):
        result: Tensor = makes(norm, x)
        return result
    return Prepared(device, op_args(device, norm, x, None, "identity", ()), norm.bias, is_rebuilt)


def prepared_split(norm: Any, x: Tensor, *others: Any, **more: Any) -> Tensor | Prepared:
    """In the place of a `split_norm_act` without residual and activation."""
    return _prepared(norm, x, True)


def prepared_fused(norm: Any, x: Tensor, *others: Any, **more: Any) -> Tensor | Prepared:
    """In the place of such a `fused_norm_act`."""
    return _prepared(norm, x, False)


def _joined(
    plain: Callable[..., Any],
    makes: Callable[..., Any],
    is_rebuilt: bool,
    norm: Any,
    x: Tensor,
    residual: Tensor | Prepared,
    activation: str = "identity",
    activation_args: Any = (),
    sum_into: str = "",
) -> Any:
    """z, or z twice, by `makes`; by `plain` where the two norms cannot be joined."""
    if isinstance(residual, Prepared) and not _fits(norm, x, residual, activation, activation_args):
        residual = residual.made()
    if not isinstance(residual, Prepared):
        return plain(norm, x, residual, activation, activation_args, sum_into)
    own = op_args(residual.device, norm, x, None, activation, activation_args)
    notes = notes_now() if is_rebuilt else None
    if notes is not None:
        notes.begin()
    with copying(norm.bias, residual.bias):
        result = makes(residual.device, own, residual.half)
        if notes is not None:
            tag(result if isinstance(result, Tensor) else result[0], rebuild_join, (own, residual.half))
    return result


def _fits(norm: Any, x: Tensor, residual: Prepared, activation: str, activation_args: Any) -> bool:
    """Asked before the running statistics move."""
    if eager_device(x) != residual.device or not is_fusible(norm, x, None, activation):
        return False
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    own = x, None, *vectors, norm.eps, norm.training, activation, activation_args
    return can_join(residual.device, own, residual.half)


def joined_split(*args: Any, **more: Any) -> Tensor:
    """In the place of a `split_norm_act` whose residual is prepared."""
    z: Tensor = _joined(split_norm_act, join_norms, True, *args, **more)
    return z


def joined_fused(*args: Any, **more: Any) -> Tensor:
    """In the place of such a `fused_norm_act`."""
    z: Tensor = _joined(fused_norm_act, join_norms, False, *args, **more)
    return z


def joined_split_twice(*args: Any, **more: Any) -> Twice:
    """`joined_split` for two readers."""
    both: Twice = _joined(split_norm_act_twice, _twice, True, *args, **more)
    return both


def joined_fused_twice(*args: Any, **more: Any) -> Twice:
    """`joined_fused` for two readers."""
    both: Twice = _joined(fused_norm_act_twice, _twice, False, *args, **more)
    return both


def _twice(device: str, own: Half, other: Half) -> Twice:
    if hands_out_twice(device):
        return join_norms_twice(device, own, other)
    z = join_norms(device, own, other)
    return z, z


PREPARED: dict[Any, Callable[..., Any]] = {split_norm_act: prepared_split, fused_norm_act: prepared_fused}
"""What makes a residual -> the same, that leaves it to the join."""
JOINED: dict[Any, Callable[..., Any]] = {split_norm_act: joined_split, fused_norm_act: joined_fused}
"""What joins -> the same, that may be given what is prepared."""
TWICE_JOINED: dict[Any, Callable[..., Twice]] = {joined_split: joined_split_twice, joined_fused: joined_fused_twice}
"""What has one result -> the same with two."""
