"""One captured graph -> the same graph rewritten: every step, in order, for `optimize` and `torch.compile` alike.

graph ──normal form──► facts ──changes──► sites ──match──► choices ──apply──► facts ──plan──► notes ──join──► what runs
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normpass import passes
from normpass.analysis.facts import Facts
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.analysis.minimum_cut import Possible, minimum_cut, needed_values, possible
from normpass.analysis.stand_ins import STAND_INS
from normpass.graph.nodes import copy_graph, give_keys
from normpass.nn import NORM_NODES
from normpass.passes.graph.normal_form import dropout
from normpass.rewrite.choices import DEFAULT, Choice, Decisions, choose_rewrites
from normpass.rewrite.sites import find_sites
from normpass.runtime.functional import batch_norm
from normpass.runtime.sharing import WITHOUT_RECIPE

NOTES_ITSELF = frozenset({*WITHOUT_RECIPE, *NORM_NODES, dropout})
"""Functions that note themselves how their result is made again."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    changes: tuple[Any, ...] = ()
    allow_lossy: bool = False
    winograd: bool = True
    """whether 3×3 convolutions may run as Winograd's on a CPU"""
    decisions: Decisions = DEFAULT
    serialize: Any = None
    """a `SerializeMinibatch` or a `SerializeNorms`"""


@dataclass
class Rewritten:
    """One captured graph, rewritten."""

    runs: fx.GraphModule
    """what runs"""
    graph_module: fx.GraphModule
    """the same before nodes were joined: what is planned and reported"""
    choices: tuple[Choice, ...] = ()
    plain: Facts | None = None
    """of the graph as it was captured"""
    found: Possible | None = None
    """of the rewritten graph"""
    again: frozenset[int] = frozenset()
    """the values that are made again in backward"""
    rebuilt: dict[str, str] = field(default_factory=dict)
    """name of a node whose result is made again -> what it calls"""
    convolutions: frozenset[str] = frozenset()
    """names of the convolutions that have kernels of ours on the CPU"""
    regions: Any = None
    """what runs sub-batch by sub-batch, and what does not and why"""
    blocks: Any = None
    """the `SerializeNorms` that was asked for, and once the graph runs what it did"""
    keeps_gradients: bool = True
    ends: str = ""
    """why the graph ends where it does, where that is not the end of forward"""


def rewrite(graph_module: fx.GraphModule, inputs: Sequence[Any], request: Request) -> Rewritten:
    """Rewrite a graph of Dynamo's in place. `inputs`: a tensor or number for every placeholder."""
    graph = graph_module.graph
    give_keys(graph)
    passes.NORMAL_FORM.before_facts(graph)
    fakes = FakeInputs(inputs)
    plain = facts_of(graph_module, fakes)
    if passes.NORMAL_FORM.without_unread(graph, plain):
        plain = facts_of(graph_module, fakes)
    for change in request.changes:
        for region in _regions(graph_module):
            change.change_graph(region.graph)
            region.recompile()
    has_changed = bool(request.changes) + passes.NORMAL_FORM.out_of_place(graph, plain)
    facts = facts_of(graph_module, fakes) if has_changed else plain
    serialize = request.serialize
    regions = serialize.apply(graph, facts) if isinstance(serialize, passes.SerializeMinibatch) else None
    if regions is not None and regions.groups:
        facts = facts_of(graph_module, fakes)
    decisions = request.decisions
    choices = _rewrite_sites(graph, facts, inputs, request)
    convolutions = set() if decisions.leaves_all else passes.CONVOLUTIONS.apply(graph, facts, request.winograd)
    graph.lint()
    facts = facts_of(graph_module, fakes, STAND_INS)
    passes.CONVOLUTIONS.note_scratch(facts)
    passes.TWO_READERS.note(facts)
    found = _possible(facts)
    again = frozenset() if decisions.leaves_all else _again(found, decisions)
    rewritten = Rewritten(graph_module, graph_module, choices, plain, found, again)
    rewritten.convolutions, rewritten.regions = frozenset(convolutions), regions
    rewritten.blocks = serialize if isinstance(serialize, passes.SerializeNorms) else None
    rewritten.keeps_gradients, rewritten.ends = will_differentiate(inputs), _reason_of_break(graph_module)
    return rewritten


def _regions(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph itself and those inside it: of a checkpoint, a `cond`."""
    return [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]


def _reason_of_break(graph_module: fx.GraphModule) -> str:
    """Why Dynamo ended this graph, and where; empty at the end of forward."""
    found = getattr(graph_module, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return ""
    frame = found.user_stack[-1] if found.user_stack else None
    lines = str(found.reason).strip().splitlines() or ["?"]
    return lines[0] if frame is None else f"{lines[0]} ({frame.filename}:{frame.lineno})"


def note_recipes(rewritten: Rewritten, decisions: Decisions) -> None:
    """Let the graph that runs note what is made again, and join norms with the convolutions behind them."""
    assert rewritten.found is not None
    facts, graph = rewritten.found.facts, rewritten.graph_module.graph
    rewritten.rebuilt = passes.REBUILD.apply(graph, facts, rewritten.again, decisions.replayed, NOTES_ITSELF)
    copies: dict[fx.Node, fx.Node] = {}
    runs = copy_graph(rewritten.graph_module, copies)
    if isinstance(rewritten.blocks, passes.SerializeNorms):
        rewritten.blocks = rewritten.blocks.apply(runs.graph, facts.storages_in(copies), facts.modes_in(copies))
    if not decisions.leaves_all:
        passes.JOINS.apply(runs.graph, facts, copies)
        passes.SHORTCUTS.apply(runs.graph, facts, copies)
        passes.TWO_READERS.apply(runs.graph, facts, copies)
    for node in list(runs.graph.find_nodes(op="call_function", target=F.batch_norm)):
        node.target = batch_norm
    runs.recompile()
    rewritten.runs = runs


def will_differentiate(inputs: Iterable[Any]) -> bool:
    """Whether a gradient may go through a graph of these inputs as things stand."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _rewrite_sites(graph: fx.Graph, facts: Facts, inputs: Sequence[Any], request: Request) -> tuple[Choice, ...]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    sites = find_sites(graph, facts, values, NORM_NODES, needed_values(_possible(facts)))
    choices = choose_rewrites(sites, passes.SITES, request.allow_lossy, request.decisions)
    by_name = {rewrite.name: rewrite for rewrite in passes.SITES}
    for choice in choices:
        if choice.match is not None:
            by_name[choice.match.rewrite].apply(graph, choice.match)
    return choices


def _possible(facts: Facts) -> Possible:
    return possible(facts, NOTES_ITSELF)


def decide_again(rewritten: Rewritten, decisions: Decisions) -> frozenset[int]:
    """The values that are made again in a rewritten graph, as `decisions` have it."""
    return frozenset() if rewritten.found is None else _again(rewritten.found, decisions)


def _again(found: Possible, decisions: Decisions) -> frozenset[int]:
    """The values that are made again: the minimum cut's, and what was decided otherwise."""
    steps, maker = found.facts.steps, found.maker
    again = {v for v in minimum_cut(found) if steps[maker[v]].key not in decisions.kept}
    if decisions.rebuilt:
        again |= {v for v in found.cheap | found.dear if steps[maker[v]].key in decisions.rebuilt}
    return _closed(found, again)


def _closed(found: Possible, again: Collection[int]) -> frozenset[int]:
    """`again` without what is made from a value that can neither be kept nor is made again."""
    closed = set(again)
    for step in found.facts.steps:
        if any(v in found.fixed and v not in closed for v in step.reads):
            closed.difference_update(step.makes)
    return frozenset(closed)
