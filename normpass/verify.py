"""What must hold after a rewrite. A failure is a bug of normpass, and is raised before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normpass.errors import VerificationError
from normpass.planner import Plan


def verify_graph(before: list[str], graph: fx.Graph, root: nn.Module, plan: Plan) -> None:
    """Same inputs, every target exists, rewritten norms are gone and the others are still there.

    `before` holds the names of the graph's placeholders before the rewrite.
    """
    graph.lint()
    after = [n.name for n in graph.nodes if n.op == "placeholder"]
    if before != after:
        raise VerificationError(f"the inputs changed from {before} to {after}; please report this graph")
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    names = {n.name for n in graph.nodes}
    for choice in plan.choices:
        path = choice.site.path
        present = path in called if choice.site.norm.op == "call_module" else choice.site.norm.name in names
        if present != (choice.match is None):
            state = "still runs" if present else "is gone"
            raise VerificationError(f"`{path}`: planned {choice.rewrite}, but the norm {state}; please report it")
    for target in called:
        root.get_submodule(target)


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def verify_state(plain: nn.Module, optimised: nn.Module, may_add: bool = False) -> None:
    """Same state_dict keys in the same order, and the very same parameters and buffers.

    `may_add`: a change of the model may add keys of its own between them, and put a norm that has no running
    statistics where one that had them stood.
    """
    before, after = plain.state_dict(keep_vars=True), optimised.state_dict(keep_vars=True)
    if may_add:
        before = {k: v for k, v in before.items() if k in after or k.rpartition(".")[2] not in _RUNNING}
    if list(before) != [key for key in after if key in before or not may_add]:
        differ = sorted(set(before) ^ set(after))[:5]
        raise VerificationError(f"state_dict keys changed (first differences: {differ}); please report this model")
    for key, tensor in before.items():
        if after[key] is not tensor:
            raise VerificationError(f"`{key}` is no longer the given model's tensor; please report this model")


# How far outputs may lie apart, as a fraction of the largest: far above rounding, far below what a wrong graph gives.
_APART = {torch.float64: 1e-6, torch.float32: 1e-2}


def verify_outputs(plain: Any, optimised: Any) -> None:
    """The same structure, shapes and dtypes; in float32 and float64 the same values up to rounding."""
    before, after = pytree.tree_leaves(plain), pytree.tree_leaves(optimised)
    if type(plain) is not type(optimised) or len(before) != len(after):
        raise VerificationError(
            f"on `example_inputs` the model returns a {type(plain).__name__}, "
            f"the rewritten one a {type(optimised).__name__}; please report this model"
        )
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and not _alike(a, b):
            raise VerificationError(
                "on `example_inputs` the rewritten model returns other values than the model; please report it, "
                "and use the model as it is. (A model that draws random numbers outside torch differs by itself.)"
            )


def _alike(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    limit = _APART.get(a.dtype)
    if limit is None or a.numel() == 0 or not bool(a.isfinite().all()):
        return True
    return float((a - b).abs().max()) <= limit * float(a.abs().max())
