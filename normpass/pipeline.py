"""One captured graph -> the same graph rewritten: every step, in order, for `optimize` and `torch.compile` alike.

    graph ─normal form─► facts ─changes─► sites ─match─► choices ─apply─► facts ─plan─► notes ─join─► what runs

`rewrite` is all up to the plan, `note_recipes` the rest; both are read from top to bottom.
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
from normpass.analysis.lifetimes import lifetimes
from normpass.analysis.minimum_cut import Possible, minimum_cut, needed_values, possible
from normpass.analysis.stand_ins import STAND_INS
from normpass.graph.nodes import copy_graph, give_keys
from normpass.nn import NORM_NODES
from normpass.passes import ConvolutionKernels, SerializeMinibatch, SerializeNorms
from normpass.passes.graph.normal_form import dropout, rrelu
from normpass.passes.graph.serialize_minibatch import Regions
from normpass.passes.graph.serialize_norms import Blocked
from normpass.rewrite.choices import DEFAULT, Choice, Decisions, choose_rewrites
from normpass.rewrite.contract import ModelChange
from normpass.rewrite.sites import find_sites
from normpass.runtime.functional import batch_norm
from normpass.runtime.sharing import WITHOUT_RECIPE

NOTES_ITSELF = frozenset({*WITHOUT_RECIPE, *NORM_NODES, dropout, rrelu})
"""Functions that note themselves how their result is made again."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    changes: tuple[ModelChange, ...] = ()
    allow_lossy: bool = False
    winograd: bool = True
    """whether 3×3 convolutions may run as Winograd's on a CPU"""
    decisions: Decisions = DEFAULT
    serialize: SerializeMinibatch | SerializeNorms | None = None
    is_compiled: bool = False
    """whether a compiler takes over the graph: norms with a sample's own statistics it decomposes and fuses itself"""


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
    """names of the convolutions that run kernels of ours on the CPU"""
    regions: Regions | None = None
    """what runs sub-batch by sub-batch, and what does not and why"""
    blocks: Blocked | None = None
    """what runs block by block, and what does not and why; once the graph runs"""
    keeps_gradients: bool = True
    ends: str = ""
    """why the graph ends where it does, where that is not the end of forward"""


def rewrite(graph_module: fx.GraphModule, inputs: Sequence[Any], request: Request) -> Rewritten:
    """Rewrite a graph of Dynamo's in place. `inputs`: a tensor or number for every placeholder."""
    graph, fakes, decisions = graph_module.graph, FakeInputs(inputs), request.decisions
    give_keys(graph)
    # What comes after knows one spelling of each thing, and nothing that nobody reads.
    passes.SpellPlainly().apply(graph)
    plain = facts_of(graph_module, fakes)
    if passes.DropUnread().apply(graph, plain):
        plain = facts_of(graph_module, fakes)
    # What was asked for by name, before any norm is looked for.
    for change in request.changes:
        for region in _regions(graph_module):
            change.change_graph(region.graph)
            region.recompile()
    has_changed = bool(request.changes) | bool(passes.WriteOutOfPlace().apply(graph, plain))
    facts = facts_of(graph_module, fakes) if has_changed else plain
    regions = request.serialize.apply(graph, facts) if isinstance(request.serialize, SerializeMinibatch) else None
    if regions is not None and regions.groups:
        facts = facts_of(graph_module, fakes)
    # Norms, then the convolutions that have kernels.
    choices = _rewrite_sites(graph, facts, inputs, request)
    if not decisions.leaves_all:
        ConvolutionKernels(request.winograd).apply(graph, facts)
    # All nodes are made: a minimum cut or a plan says which values are made again.
    graph.lint()
    facts = facts_of(graph_module, fakes, STAND_INS)
    ConvolutionKernels.note_scratch(facts)
    passes.TwoReaders.note(facts)
    found = _possible(facts)
    again = frozenset() if decisions.leaves_all else _again(found, decisions)
    rewritten = Rewritten(graph_module, graph_module, choices, plain, found, again)
    rewritten.convolutions, rewritten.regions = ConvolutionKernels.running(facts), regions
    rewritten.keeps_gradients, rewritten.ends = will_differentiate(inputs), _reason_of_break(graph_module)
    return rewritten


def note_recipes(rewritten: Rewritten, request: Request) -> None:
    """Let the graph that runs note what is made again, and join norms with the convolutions behind them."""
    assert rewritten.found is not None
    facts, graph, decisions = rewritten.found.facts, rewritten.graph_module.graph, request.decisions
    rewritten.rebuilt = passes.RebuildValues(rewritten.again, decisions.replayed, NOTES_ITSELF).apply(graph, facts)
    # From here on in a copy: what is planned and reported is the graph before.
    copies: dict[fx.Node, fx.Node] = {}
    runs = copy_graph(rewritten.graph_module, copies)
    facts = facts.of_copy(copies)
    if isinstance(request.serialize, SerializeNorms):
        rewritten.blocks = request.serialize.apply(runs.graph, facts)
    for joining in () if decisions.leaves_all else passes.JOINS:
        joining.apply(runs.graph, facts)
    passes.ReleaseValues(lifetimes(rewritten.found, rewritten.again)).apply(runs.graph)
    for node in list(runs.graph.find_nodes(op="call_function", target=F.batch_norm)):
        node.target = batch_norm
    runs.recompile()
    rewritten.runs = runs


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


def will_differentiate(inputs: Iterable[Any]) -> bool:
    """Whether a gradient may go through a graph of these inputs as things stand."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _rewrite_sites(graph: fx.Graph, facts: Facts, inputs: Sequence[Any], request: Request) -> tuple[Choice, ...]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    sites = find_sites(graph, facts, values, NORM_NODES, needed_values(_possible(facts)), not request.is_compiled)
    rewrites = [r for r in passes.SITES if r.of_batch_norms or not request.is_compiled]
    choices = choose_rewrites(sites, rewrites, request.allow_lossy, request.decisions)
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
