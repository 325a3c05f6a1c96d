"""z = act(norm(x) + r), r = norm'(x')  ⇒  z = act(norm(x) + norm'(x')), x' normalized as it is read

A block whose shortcut has a convolution and a norm. r is neither written nor rebuilt (`normpass.ops.norm_act_join`):
two array moves fewer in forward, and two where z is made again. Where norm' stood its moments are taken and its running
statistics move. Decided when the graph runs; without such kernels all is as it was.

Refuses: an r with other readers, or with an activation, or that backward reads, as without a mask of act' it does; one
that is kept where z is made again; an x', a weight, a bias or frozen statistics that are written to, which would be
read too late. Changes nothing, not even rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from normpass.analysis.facts import Facts, Step
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, split_norm_act
from normpass.runtime.joins import JOINED, PREPARED


@dataclass(frozen=True)
class JoinNorms:
    name: str = "join_norms"

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the joins."""
        read = {v for step in facts.steps for v in step.saves}
        steps, names = facts.step_of(), set()
        for node in graph.nodes:
            residual = _residual(node)
            if residual is None or not _is_private(steps.get(residual), facts, read):
                continue
            if facts.modes.get(residual) != facts.modes.get(node):
                continue
            if node.target is split_norm_act and residual.target is fused_norm_act:
                continue
            residual.target, node.target = PREPARED[residual.target], JOINED[node.target]
            names.add(node.name)
        return names


def _residual(node: fx.Node) -> fx.Node | None:
    """The norm without an activation that makes the residual of `node`, if that is a join and alone reads it."""
    residual = node.args[2] if node.target in JOINED else None
    if not isinstance(residual, fx.Node) or residual.target not in PREPARED or list(residual.users) != [node]:
        return None
    is_plain = residual.args[2] is None and residual.args[3] == "identity"
    return residual if is_plain and node.args[1] is not residual else None


def _is_private(step: Step | None, facts: Facts, read: set[int]) -> bool:
    """Whether only the join sees what a norm makes, and what it is made from is the same by then."""
    if step is None or not step.makes or not set(step.makes).isdisjoint(read | facts.outputs | facts.overwritten):
        return False
    if not set(step.reads).isdisjoint(facts.overwritten) or not {*step.makes, *step.reads}.isdisjoint(facts.unseen):
        return False
    call, x = step.node.args[:2]
    if not isinstance(call, fx.Node) or call.target is not FunctionalBatchNorm or not isinstance(x, fx.Node):
        return False
    return facts.storages.get(x, frozenset()).isdisjoint(facts.written_outside) and _stays(call, facts)


def _stays(call: fx.Node, facts: Facts) -> bool:
    names = ("weight", "bias") if call.kwargs.get("training") else ("weight", "bias", "running_mean", "running_var")
    vectors: list[Any] = [call.kwargs.get(name) for name in names]
    there = [facts.storages.get(v, frozenset()) for v in vectors if isinstance(v, fx.Node)]
    return not call.args and facts.written_outside.isdisjoint(frozenset().union(*there))


__all__ = ["JoinNorms"]
