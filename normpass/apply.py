"""Capture + Plan -> Program: the rewritten forward as a function of the module and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from normpass.capture import Capture, Guard
from normpass.graph import key_of
from normpass.planner import DEFAULT, Decisions, Plan
from normpass.rewrite import Rewrite
from normpass.sharing import KEEPING
from normpass.verify import verify_graph


@dataclass(frozen=True)
class Program:
    """One rewritten forward: `run(module, *tensors)`, valid while `guard` holds."""

    run: Callable
    graph: fx.Graph
    """what is run, before nodes were joined"""
    plan: Plan
    guard: Guard
    derived: dict[str, str]
    """node name -> kind, of the nodes that became recipes beside the sites"""
    rebuilt: frozenset[str]
    """names of the nodes whose results are rebuilt in backward"""
    convolutions: frozenset[str]
    """names of the convolutions that have kernels of ours on the CPU"""
    is_planned: bool = False
    """whether what is kept and what is rebuilt was decided, by a plan or for a budget"""
    regions: Any = None
    """what runs sub-batch by sub-batch, and what does not and why"""


@dataclass(frozen=True)
class Passes:
    """The rewrites, given from above: this file knows none of them."""

    sites: Sequence[Rewrite]
    after_sites: Any
    """makes recipes of cheap functions"""
    convolutions: Any
    """gives some convolutions a kernel of ours"""
    regions: Any
    """runs producers again"""
    joins: Any
    """makes one node of a norm and what reads it"""


def apply_plan(capture: Capture, plan: Plan, passes: Passes, decisions: Decisions = DEFAULT) -> Program:
    """Rewrite the captured graph as planned and make it callable. The capture is used up."""
    graph = capture.graph
    rewritten = rewrite_graph(graph, capture.root, plan, passes, decisions)
    joined = fx.Graph()
    joined.output(joined.graph_copy(graph, {}))
    passes.joins.apply(joined, capture.root)
    run = type(fx.GraphModule(capture.root, joined)).forward
    planned = bool(decisions.keys)
    names = rewritten.derived, rewritten.rebuilt, rewritten.convolutions
    return Program(run, graph, plan, capture.guard, *names, planned)


@dataclass(frozen=True)
class Rewritten:
    """Nodes of a rewritten graph, by name."""

    derived: dict[str, str]
    """those that became recipes beside the sites -> kind"""
    rebuilt: frozenset[str]
    """all recipes"""
    convolutions: frozenset[str]
    """those that have kernels of ours on the CPU"""


def rewrite_graph(
    graph: fx.Graph, root: nn.Module, plan: Plan, passes: Passes, decisions: Decisions = DEFAULT
) -> Rewritten:
    """Rewrite `graph` in place as planned."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    by_name = {rewrite.name: rewrite for rewrite in passes.sites}
    for choice in plan.choices:
        if choice.match is not None:
            by_name[choice.match.rewrite].apply(graph, choice.match)
    derived = {} if decisions.leaves_all else passes.after_sites.apply(graph, root, decisions.kept)
    _keep_results(graph, decisions.kept)
    convolutions = set() if decisions.leaves_all else passes.convolutions.apply(graph, root)
    again = passes.regions.apply(graph, root, decisions.rebuilt, decisions.replayed)
    verify_graph(inputs, graph, root, plan)
    split = {n.name for n in graph.nodes if n.target in KEEPING}
    return Rewritten(derived, frozenset({*derived, *again, *split}), frozenset(convolutions))


def _keep_results(graph: fx.Graph, kept: frozenset[str]) -> None:
    """The same op without a recipe where a site's result is to be kept."""
    for node in graph.nodes:
        if node.target in KEEPING and key_of(node) in kept:
            node.target = KEEPING[node.target]
