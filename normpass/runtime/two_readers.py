"""What a rewritten graph calls where the result of a norm and its activation has two readers.

Each gets a tensor of its own, of one memory, and backward gets both gradients unadded (`normpass.ops.norm_act_twice`).
Decided when the graph runs: without kernels that add gradients as they read them both get the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from normpass.ops.eager import eager_device
from normpass.ops.norm_act import rebuild_norm_act
from normpass.ops.norm_act_twice import hands_out_twice, norm_act_twice
from normpass.recipe.notes import copying, notes_now, tag
from normpass.runtime.functional import fused_norm_act, is_fusible, op_args, split_norm_act

Twice = tuple[Tensor, Tensor]


def split_norm_act_twice(
    norm: Any,
    x: Tensor,
    residual: Any = None,
    activation: str = "identity",
    activation_args: Any = (),
    sum_into: str = "",
) -> Twice:
    """`split_norm_act` for two readers; who saves either result saves the recipe instead."""
    device = eager_device(x, residual)
    if device is None or not _pays(device, norm, x, residual, activation, sum_into):
        z = split_norm_act(norm, x, residual, activation, activation_args, sum_into)
        return z, z
    args = op_args(device, norm, x, residual, activation, activation_args)
    notes = notes_now()
    if notes is not None:
        notes.begin()
    with copying(norm.bias):
        z, other = norm_act_twice(device, *args)
        tag(z, rebuild_norm_act, args)
    return z, other


def fused_norm_act_twice(
    norm: Any,
    x: Tensor,
    residual: Any = None,
    activation: str = "identity",
    activation_args: Any = (),
    sum_into: str = "",
) -> Twice:
    """`fused_norm_act` for two readers, who keep its result."""
    device = eager_device(x, residual)
    if device is None or not _pays(device, norm, x, residual, activation, sum_into):
        z = fused_norm_act(norm, x, residual, activation, activation_args, sum_into)
        return z, z
    args = op_args(device, norm, x, residual, activation, activation_args)
    with copying(None if activation == "identity" else norm.bias):
        return norm_act_twice(device, *args)


def _pays(device: str, norm: Any, x: Tensor, residual: Tensor | None, activation: str, sum_into: str) -> bool:
    tensors = x, residual, norm.weight, norm.bias
    is_differentiated = any([t is not None and t.requires_grad for t in tensors])
    return is_differentiated and hands_out_twice(device) and is_fusible(norm, x, residual, activation, sum_into)


TWICE: dict[Any, Callable[..., Twice]] = {split_norm_act: split_norm_act_twice, fused_norm_act: fused_norm_act_twice}
"""What has one result -> the same with two."""
