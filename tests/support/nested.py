"""Tensors in nested dicts, lists and (named) tuples: what models take and give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def leaves(value: object, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and (named) tuples, with its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}[{index}]")


def structure(value: object) -> str:
    """Types, nesting, names, shapes and dtypes in one line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        items = ", ".join(f"{key!r}: {structure(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        items = ", ".join(f"{key}: {structure(item)}" for key, item in zip(names, value, strict=True))
    else:
        items = "" if value is None else repr(value)
    return f"{type(value).__qualname__}({items})"


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """`function` of every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def move_by_one_ulp(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Every element of a floating tensor moved by one ulp, up or down at random."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.rand(tensor.shape, generator=generator) < 0.5
    infinity = torch.full_like(tensor, math.inf)
    return torch.nextafter(tensor, torch.where(up, infinity, -infinity))
