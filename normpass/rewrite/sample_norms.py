"""The calls of torch that are norms with a sample's own statistics, as what a rewritten graph calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normpass.graph.nodes import bound
from normpass.runtime.sample_norms import FunctionalGroupNorm, FunctionalRowNorm

Call = tuple[Callable[..., Any], dict[str, Any]]
"""What holds the arguments of a norm, and these by name: nodes, numbers, None."""


def _group_norm(arguments: dict[str, Any]) -> Call:
    return FunctionalGroupNorm, {"groups": arguments.pop("num_groups"), **arguments}


def _instance_norm(arguments: dict[str, Any]) -> Call | str:
    if arguments.pop("use_input_stats") is not True:
        return "it is not called with its input's own statistics"
    return FunctionalGroupNorm, {"groups": None, **arguments}


def _layer_norm(arguments: dict[str, Any]) -> Call:
    return FunctionalRowNorm, arguments


def _rms_norm(arguments: dict[str, Any]) -> Call:
    return FunctionalRowNorm, {**arguments, "is_rms_norm": True}


_KINDS: dict[Any, tuple[Callable[..., Any], Callable[[dict[str, Any]], Call | str]]] = {
    F.group_norm: (F.group_norm, _group_norm),
    F.instance_norm: (F.instance_norm, _instance_norm),
    F.layer_norm: (F.layer_norm, _layer_norm),
    F.rms_norm: (F.rms_norm, _rms_norm),
    torch.rms_norm: (F.rms_norm, _rms_norm),
}
"""function -> whose signature it has, and what stands for a call of it"""

SAMPLE_NORMS = frozenset(_KINDS)
ROW_NORMS = frozenset({F.layer_norm, F.rms_norm, torch.rms_norm})
ALWAYS_CONTIGUOUS = ROW_NORMS | {F.instance_norm}
"""whose results are contiguous, whatever they are given"""


def sample_norm_call(node: fx.Node) -> Call | str:
    """What stands for the call `node`, or why nothing can."""
    signature, kind = _KINDS[node.target]
    arguments = bound(signature, node)
    if arguments is None:
        return f"it is not called as F.{signature.__name__} is"
    del arguments["input"]
    return kind(arguments)
