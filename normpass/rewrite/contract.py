"""The contracts of what rewrites a graph. Each is a frozen dataclass in a file of `passes/`.

    SiteRewrite   match(site) -> Match | Refusal      pure; looks, changes nothing
                  apply(graph, match)                 rewrites the nodes of that site
    GraphPass     apply(graph, facts) -> changed      rewrites a whole graph, and says what it changed
    ModelChange   change_modules(model) -> replaced   another function, by other layers
                  change_graph(graph)                 and by other nodes

A Refusal is data, names the nodes that are the reason, and is shown in the report: nothing is skipped silently.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.nn.functional as F
from torch import fx, nn

from normpass.analysis.facts import Facts
from normpass.graph.nodes import bound, called, inherit
from normpass.graph.operators import other_operand, sums_in_place
from normpass.rewrite.sample_norms import sample_norm_call
from normpass.rewrite.sites import Site, input_of
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, split_norm_act
from normpass.runtime.prelu import fused_norm_prelu, split_norm_prelu
from normpass.runtime.sample_norms import split_sample_norm_act


class Semantics(enum.Enum):
    """What a rewrite does to the model's function."""

    EXACT = "exact"
    """the same function of real numbers; differs by rounding only"""
    LOSSY = "lossy"
    """the same function, but backward reconstructs a value from a rounded one (`allow_lossy=True`)"""
    CHANGES_MODEL = "changes the model"
    """another function; only when asked for by name (`changes=`)"""


@dataclass(frozen=True)
class Match:
    """A rewrite that may be applied at a site."""

    rewrite: str
    site: Site
    kept: str
    """which tensor of the site is kept for backward: `x`, `z` or `x and z`"""


@dataclass(frozen=True)
class Refusal:
    """Why a rewrite does not apply at a site."""

    rewrite: str
    path: str
    reason: str
    nodes: tuple[str, ...] = ()
    """names of the nodes that are the reason, as `normpass.graph.nodes.key_of` has them"""


class SiteRewrite(Protocol):
    """How the nodes of one norm, with what stands around it, are replaced."""

    @property
    def name(self) -> str: ...

    @property
    def semantics(self) -> Semantics: ...

    @property
    def of_batch_norms(self) -> bool:
        """Whether it is about norms over samples; else about those where each sample has its own statistics."""

    def match(self, site: Site) -> Match | Refusal:
        """Whether it applies; changes nothing."""

    def apply(self, graph: fx.Graph, match: Match) -> None:
        """Rewrite the nodes of that site."""


Changed = TypeVar("Changed", covariant=True)


class GraphPass(Protocol[Changed]):
    """A pass over a whole graph."""

    @property
    def name(self) -> str: ...

    def apply(self, graph: fx.Graph, facts: Facts) -> Changed:
        """Rewrite `graph`, which `facts` are about, in place; what it changed: names of nodes, or more."""


class ModelChange(Protocol):
    """What `changes=` takes: another function of the model, asked for by name."""

    @property
    def replaces(self) -> str:
        """What stands for something else afterwards, in words: two changes of the same do not go together."""

    @property
    def applies_to_graph(self) -> bool:
        """Whether `change_graph` does anything."""

    @property
    def changes_eval(self) -> bool:
        """Whether `change_graph` is needed in eval mode, too. If it is, `calls()` returns a mode in which every call is
        changed as in the graph: `normpass.convert` runs forward under it."""

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put other layers into `model`; path -> the layer that stood there."""

    def change_graph(self, graph: fx.Graph) -> None:
        """Rewrite a captured graph in place."""


def replace_site(graph: fx.Graph, site: Site, function, *, with_residual: bool = True) -> fx.Node:
    """Put one call of `function(norm, x, residual, activation, args)` where the site's nodes stood.

    Without a residual the call stands at the norm's place, so that running statistics move in the same
    order as before; with one it stands at the addition's, where the residual exists.
    """
    if site.slope is not None:
        return _replace_prelu(graph, site, function)
    anchor = site.add if site.add is not None else site.norm
    activation = (site.activation.name, site.activation.args)
    # Read from the nodes, not from the site: an earlier replacement may have put another node there.
    x = input_of(site.norm)
    residual = other_operand(site.add, site.norm) if site.add is not None else None
    with graph.inserting_before(anchor):
        norm = norm_node(graph, site)
        if with_residual:
            args: tuple = (norm, x, residual, *activation, _sum_into(site))
        else:
            args = (norm, x, *activation)
        fused = graph.call_function(function, args)
    return _take_place(graph, site, fused)


_WITH_PRELU: dict[Any, Callable[..., Any]] = {
    split_norm_act: split_norm_prelu,
    split_sample_norm_act: split_norm_prelu,
    fused_norm_act: fused_norm_prelu,
}
"""what is called for a norm -> the same where a PReLU is behind it"""


def _replace_prelu(graph: fx.Graph, site: Site, function: Any) -> fx.Node:
    with graph.inserting_before(site.norm):
        norm = norm_node(graph, site)
        args: Any = (norm, input_of(site.norm), site.slope)
        fused = graph.call_function(_WITH_PRELU[function], args)
    return _take_place(graph, site, fused)


def _take_place(graph: fx.Graph, site: Site, fused: fx.Node) -> fx.Node:
    inherit(fused, site.norm)
    site.out.replace_all_uses_with(fused)
    for node in dict.fromkeys((site.out, *reversed(site.within), site.add, site.norm)):
        if node is not None and not node.users:
            graph.erase_node(node)
    return fused


def _sum_into(site: Site) -> str:
    """Which term the addition is written into, "norm" or "residual"; "" or "residual +" where it makes a new tensor."""
    if site.add is None:
        return ""
    is_first = site.add.args[0] is site.norm
    if sums_in_place(site.add):
        return "norm" if is_first else "residual"
    return "" if is_first else "residual +"


def norm_node(graph: fx.Graph, site: Site) -> fx.Node:
    """The arguments of a norm's call as a value."""
    if not site.is_batch_norm:
        call = sample_norm_call(site.norm)
        assert not isinstance(call, str)  # a site has been made of it
        return graph.call_function(call[0], (), call[1])
    arguments = bound(F.batch_norm, site.norm)
    assert arguments is not None  # a site has been made of it
    del arguments["input"]
    return graph.call_function(FunctionalBatchNorm, (), arguments)


def is_alone(call: fx.Node, storages: Mapping[fx.Node, frozenset[int]]) -> bool:
    """Whether nobody else sees what a norm of these arguments reads and moves, so that it may run later.

    Args:
        call: what `norm_node` has made.
        storages: where the results of nodes lie, from `normpass.analysis.facts`.
    """
    state = call.all_input_nodes
    there = frozenset(s for node in state for s in storages.get(node, ()))
    known = {call, *state}
    others = (node for node, lies in storages.items() if node not in known and not there.isdisjoint(lies))
    return all(list(node.users) == [call] for node in state) and not any(node.users for node in others)


def refused(rewrite: str, site: Site) -> Refusal:
    """What the site itself refuses, as this rewrite's refusal."""
    return Refusal(rewrite, site.path, site.refused or "", site.refused_at)


def written_later(rewrite: str, site: Site) -> Refusal | None:
    """The refusal where the site's result is changed in place later."""
    if site.written is None:
        return None
    name = called(site.written)
    return Refusal(rewrite, site.path, f"its result is changed in place later, by `{name}`", (name,))
