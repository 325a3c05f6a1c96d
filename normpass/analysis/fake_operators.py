"""What the operators under one step of a graph do to tensors without memory: write, draw, multiply, take scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from normpass.analysis.facts import Step
from normpass.copies.untouched import tensors_in
from normpass.ops.layout import memory_format_of

_KNOWN_LIBRARIES = frozenset({"aten", "prim", "prims", "normpass"})
_native_batch_norm = torch.ops.aten.native_batch_norm.default
_MOVE_STATISTICS = frozenset(
    {_native_batch_norm, torch.ops.aten.cudnn_batch_norm.default, torch.ops.aten.miopen_batch_norm.default}
    | {torch.ops.aten.batch_norm_update_stats.default, torch.ops.aten.batch_norm_gather_stats.default}
    | {torch.ops.aten.batch_norm_gather_stats_with_counts.default}
)
"""operators that write to their running statistics (in training) without a word of it in their schemas"""
_DECOMPOSITIONS = frozenset({"_linalg_svd", "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "linalg_eigvals"})
"""operators of other algorithms, and other last bits, where nobody wants a gradient: not to be run again in backward"""


class Operators(TorchDispatchMode):
    """What the operators under one step do: write, draw random numbers, multiply.

    Batch norm of tensors without memory it answers itself, which is faster.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.written: list[Tensor] = []
        self.random = self.foreign = False
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        is_norm = func is _native_batch_norm and isinstance(args[0], FakeTensor)
        result = _fake_batch_norm(*args) if is_norm else func(*args, **kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.foreign = True
            return result
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self.foreign |= func.namespace not in _KNOWN_LIBRARIES or func._opname in _DECOMPOSITIONS
        if func in _MOVE_STATISTICS:
            self._note_moves(func._schema, args, kwargs)
        self._note_writes(func._schema, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result

    def _note_moves(self, schema: Any, args: tuple, kwargs: dict) -> None:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        if given.get("training", True):
            self.written += tensors_in((given["running_mean"], given["running_var"]))

    def _note_writes(self, schema: Any, args: tuple, kwargs: dict) -> None:
        if not schema.is_mutable:
            return
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            self.written += tensors_in(given)


def _fake_batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *others: Any) -> tuple:
    """What the operator returns, of tensors without memory; torch finds that out by twenty other operators."""
    dtype = next((t.dtype for t in (weight, bias, mean, var) if t is not None), x.dtype)
    statistics = (x.new_empty(x.shape[1] if training else 0, dtype=dtype) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format_of(x)), *statistics


def groups_of(args: tuple) -> int:
    """Of a convolution: the channels of its input over those of its weight."""
    tensors = tensors_in(args)
    if len(tensors) < 2 or tensors[1].dim() < 3 or tensors[0].dim() < 2:
        return 1
    return max(1, tensors[0].shape[1] // max(1, tensors[1].shape[1]))


def scratch_of(step: Step, args: tuple, result: Any) -> int:
    """Gradients of the weights; and what a convolution on the CPU takes to work on its arguments in another layout."""
    x = next(iter(tensors_in(args)), None)
    if not step.flops or x is None or x.device.type != "cpu" or not isinstance(result, Tensor):
        return step.weights
    weight = next((t for t in tensors_in(args[1:]) if t.dim() > 2), None)
    if weight is None or all(n == 1 for n in weight.shape[2:]):
        return step.weights
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return 3 * step.weights
    return 2 * step.weights + x.nbytes + result.nbytes
