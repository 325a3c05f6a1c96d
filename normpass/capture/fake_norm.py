"""BatchNorm of tensors without values: what it returns, without the fifteen operators that torch takes to say so.

    (N, C, *) ──► (N, C, *) as it lies in memory, mean and 1/std (C,)

torch derives the shape of `aten::_native_batch_norm_legit` by running its decomposition on fake tensors, each of whose
operators is dispatched in Python: of capturing DenseNet-121 that was a sixth. Here it is said outright where the
input is plainly contiguous or plainly channels_last and the vectors fit; anything else is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions

NAME = "native_batch_norm_helper"
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def quick_batch_norm() -> Callable[..., Any]:
    """What is to stand in the place of `torch._decomp.decompositions.NAME`."""
    original = getattr(decompositions, NAME)

    def helper(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *others: Any) -> Any:
        if not training or others[-1] or not _is_plain(x, weight, bias, mean, var):  # the last: new running statistics
            return original(x, weight, bias, mean, var, training, *others)
        wide = x.dtype if x.device.type == "cpu" or x.dtype.itemsize > 2 else torch.float32
        vectors = [x.new_empty(x.shape[1:2], dtype=wide) for _ in range(2)]
        return torch.empty_like(x), *vectors, mean, var

    return helper


def _is_plain(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the sizes are known and fit, and there is one answer to how `x` lies in memory."""
    if not all([type(n) is int for n in x.shape]) or any([t is not None and t.shape != x.shape[1:2] for t in vectors]):
        return False
    last = _CHANNELS_LAST.get(x.dim())
    is_contiguous = x.is_contiguous()
    return is_contiguous if last is None else is_contiguous != x.is_contiguous(memory_format=last)
