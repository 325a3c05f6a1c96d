"""The inputs of a graph as tensors without memory, which share storages and have histories as the given ones do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from normpass.copies.untouched import function_of


class FakeInputs:
    """Tensors without memory for the inputs of a graph, to run it on as often as it is changed.

    Args:
        inputs: for every placeholder a tensor, real or fake, of the shape and layout it is to have, or a number.
    """

    def __init__(self, inputs: Sequence[Any]):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._given = inputs
        self.make()

    def make(self) -> None:
        with self.mode:
            self.values = _fakes(self._given)
        self.numbers = {id(f): t for f, t in zip(self.values, self._given, strict=True) if _holds_number(t)}
        """what stands behind those that are one number: Dynamo hands over a Python float as such a tensor"""
        self._histories = self._histories_now()

    def restore(self) -> None:
        """After a run: what it has written to in place may have a gradient now that it did not have."""
        if self._histories_now() != self._histories:
            self.make()

    def _histories_now(self) -> list[Any]:
        return [(t.requires_grad, function_of(t)) for t in self.values if isinstance(t, Tensor)]


def _holds_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad


def _fakes(inputs: Sequence[Any]) -> list[Any]:
    """Tensors of the mode that is entered; those that share a storage share one."""
    shared = Counter(t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor))
    bases: dict[tuple[int, torch.dtype], Tensor] = {}
    return [_like(value, shared, bases) if isinstance(value, Tensor) else _number(value) for value in inputs]


def _like(tensor: Tensor, shared: Counter[int], bases: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    sizes, strides = ([_number(n) for n in values] for values in (tensor.shape, tensor.stride()))
    storage = tensor.untyped_storage()
    if shared[storage._cdata] == 1:
        result = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    else:
        key = storage._cdata, tensor.dtype
        if key not in bases:
            count = storage.nbytes() // tensor.element_size()
            bases[key] = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
        result = bases[key].as_strided(sizes, strides, _number(tensor.storage_offset())).detach()
    if not tensor.requires_grad:
        return result
    return result.requires_grad_() if tensor.is_leaf else _computed(result)


class _Computed(torch.autograd.Function):
    """What somebody has computed with gradients: unlike a leaf it may be written to in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, leaf: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("facts are collected without a backward")


def _computed(tensor: Tensor) -> Tensor:
    with torch.enable_grad():
        result: Tensor = _Computed.apply(tensor, torch.empty(0, device=tensor.device, requires_grad=True))
    return result


def _number(value: Any) -> Any:
    """The number that a symbolic one stands for at the inputs at hand."""
    node = getattr(value, "node", None)
    return node.hint if node is not None and hasattr(node, "hint") else value
