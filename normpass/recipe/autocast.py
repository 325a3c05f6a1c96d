"""Autocast as it was in forward: what runs again in backward is to see the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_state(args: tuple) -> tuple[str, torch.dtype] | str | None:
    """`(device type, dtype)` where autocast is on, the device type where it is off."""
    tensor = _first_tensor(args)
    kind = None if tensor is None else tensor.device.type
    if kind is None or not torch.amp.is_autocast_available(kind):
        return None
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else kind


def _first_tensor(values: Any) -> Tensor | None:
    for value in values:
        held = getattr(value, "tensor", None)  # of what is copied or kept already
        if isinstance(value, Tensor) or isinstance(held, Tensor):
            return value if isinstance(value, Tensor) else held
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        found = _first_tensor(inner) if inner else None
        if found is not None:
            return found
    return None


def same_autocast(state: tuple[str, torch.dtype] | str | None, cached: bool | None = None):
    """Autocast as `autocast_state` found it; `cached`: are casts of weights remembered, None for as it is here."""
    if isinstance(state, tuple):
        return torch.autocast(state[0], dtype=state[1], cache_enabled=cached)
    if state is not None and torch.is_autocast_enabled(state):
        return torch.autocast(state, enabled=False)
    return nullcontext()
