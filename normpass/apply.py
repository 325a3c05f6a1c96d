"""Capture + Plan -> Program: the rewritten forward as a function of the module and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from normpass.capture import Capture, Guard
from normpass.planner import Plan
from normpass.rewrite import Rewrite
from normpass.verify import verify_graph


@dataclass(frozen=True)
class Program:
    """One rewritten forward: `run(module, *tensors)`, valid while `guard` holds."""

    run: Callable
    graph: fx.Graph
    plan: Plan
    guard: Guard
    derived: dict[str, str]
    """node name -> kind, of the nodes that became recipes beside the sites"""
    recomputed: frozenset
    """aten ops that torch.compile must run again in backward rather than keep"""


def apply_plan(capture: Capture, plan: Plan, rewrites: Sequence[Rewrite], after_sites, recomputed: dict) -> Program:
    """Rewrite the captured graph as planned and make it callable. The capture is used up."""
    graph = capture.graph
    derived = rewrite_graph(graph, capture.root, plan, rewrites, after_sites)
    run = type(fx.GraphModule(capture.root, graph)).forward
    ops = frozenset(op for kind in set(derived.values()) for op in recomputed[kind])
    own = torch.ops.normpass
    ops |= {own.norm_act.default, own.cat_norm_act.default, own.shift_scale.default}
    return Program(run, graph, plan, capture.guard, derived, ops)


def rewrite_graph(
    graph: fx.Graph, root: nn.Module, plan: Plan, rewrites: Sequence[Rewrite], after_sites
) -> dict[str, str]:
    """Rewrite `graph` in place as planned; node name -> kind of the nodes that became recipes beside the sites."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    by_name = {rewrite.name: rewrite for rewrite in rewrites}
    for choice in plan.choices:
        if choice.match is not None:
            by_name[choice.match.rewrite].apply(graph, choice.match)
    derived = after_sites.apply(graph, root)
    verify_graph(inputs, graph, root, plan)
    return derived
