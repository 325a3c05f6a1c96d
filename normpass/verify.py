"""What must hold after a rewrite. A failure is a bug of normpass, and is raised before anything runs."""

from __future__ import annotations

from torch import fx, nn

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
        present = path in called if choice.site.norm.op == "call_module" else path in names
        if present != (choice.match is None):
            state = "still runs" if present else "is gone"
            raise VerificationError(f"`{path}`: planned {choice.rewrite}, but the norm {state}; please report it")
    for target in called:
        root.get_submodule(target)


def verify_state(plain: nn.Module, optimised: nn.Module) -> None:
    """Same state_dict keys in the same order, and the very same parameters and buffers."""
    before, after = plain.state_dict(keep_vars=True), optimised.state_dict(keep_vars=True)
    if list(before) != list(after):
        differ = sorted(set(before) ^ set(after))[:5]
        raise VerificationError(f"state_dict keys changed (first differences: {differ}); please report this model")
    for key, tensor in before.items():
        if after[key] is not tensor:
            raise VerificationError(f"`{key}` is no longer the given model's tensor; please report this model")
