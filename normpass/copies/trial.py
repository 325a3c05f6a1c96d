"""Running a model to see what it does, without leaving a trace on it, its inputs or its Python state.

What runs is a copy: parameters are the very same, buffers are put back, everything that Python keeps (counters, lists,
generators) is copied. What forward writes outside its module (a global list, a file) stays written.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normpass.copies.alone import leave_alone
from normpass.copies.shared_copy import shared_copy
from normpass.copies.untouched import untouched

Arguments = tuple[tuple, dict]


def call_arguments(example_inputs: Any) -> Arguments:
    """`example_inputs` as positional and named arguments of one call."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs), {}) if isinstance(example_inputs, (tuple, list)) else ((example_inputs,), {})


def trial_copy(model: nn.Module) -> nn.Module:
    """A copy around the same parameters and buffers, with Python state of its own as far as that can be copied.

    Its SyncBatchNorms ask no other process.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose copy has parameters of its own
            memo[id(module)] = module
        tensors = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
        memo.update((id(t), t) for t in tensors if isinstance(t, Tensor))
    try:
        return leave_alone(copy.deepcopy(model, memo))
    except Exception:  # a lock, an activation in a list: shared then
        return leave_alone(shared_copy(model))


def copied_inputs(arguments: Arguments) -> Arguments:
    """The arguments with tensors of their own, and of the same structure."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    args, kwargs = pytree.tree_map(own, arguments)
    return args, kwargs


@contextlib.contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Inside, a copy of `model` around the same tensors may run; afterwards these and all generators are as before."""
    state = random.getstate()
    numpy_random = _numpy_random()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        with untouched(model):
            yield
    finally:
        random.setstate(state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


def _numpy_random() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random


__all__ = ["call_arguments", "copied_inputs", "trial", "trial_copy"]
