"""The values through which everything must pass on its way to a result.

A *cut* of a result is a node on every path from the inputs to it: one of its dominators. Between two successive cuts
lies a *segment*, a part of the graph that reads one value. A graph with several results has a chain of segments up to
each; what several chains share stands in the first of them. A value inside a segment may still be read elsewhere.

Inputs are tensors that are no parameter, buffer or attribute of a module. Dynamo gives those as placeholders too,
with the module in whose forward they were read first; only their source says where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import Tensor, fx

Results = Mapping[fx.Node, Any]
"""What every node returns, as tensors without memory."""


@dataclass(frozen=True)
class Segment:
    """The nodes on all paths from one cut to the next; the latter is the last of them."""

    start: fx.Node
    nodes: tuple[fx.Node, ...]


def inputs_of(graph: fx.Graph, results: Results) -> list[fx.Node]:
    """The placeholders that hold tensors of the caller, not of a module."""
    return [n for n in graph.nodes if n.op == "placeholder" and isinstance(results.get(n), Tensor) and not _is_held(n)]


def _is_held(placeholder: fx.Node) -> bool:
    """Whether it is a parameter, a buffer or another attribute of a module."""
    source = getattr(placeholder, "_dynamo_source", None)
    return source is not None and "NN_MODULE" in str(getattr(source, "guard_source", ""))


def variable_nodes(graph: fx.Graph, results: Results) -> list[fx.Node]:
    """The inputs, and what depends on them and is needed for a result, in order."""
    depends = set(inputs_of(graph, results))
    for node in graph.nodes:
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in needed for user in node.users):
            needed.add(node)
    return [n for n in graph.nodes if n in depends and n in needed and n.op != "output"]


def segments_of(graph: fx.Graph, results: Results) -> list[list[Segment]]:
    """For each result the segments from its first cut on, without those of the results before it."""
    position = {node: index for index, node in enumerate(variable_nodes(graph, results))}
    dominators = _dominators(graph, position)
    seen: set[fx.Node] = set()
    chains: list[list[Segment]] = []
    for result in graph.output_node().all_input_nodes:
        cuts = _cuts(result, dominators)
        new = [(start, cut) for start, cut in pairwise(cuts) if cut not in seen]
        seen.update(cuts)
        chains.append([Segment(start, _between(start, cut, position)) for start, cut in new])
    return [chain for chain in chains if chain]


def _dominators(graph: fx.Graph, position: Mapping[fx.Node, int]) -> Mapping[Any, Any]:
    flow = nx.DiGraph()
    flow.add_node("inputs")
    for node in position:
        if node.op == "placeholder":
            flow.add_edge("inputs", node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes if source in position)
    found: Mapping[Any, Any] = nx.immediate_dominators(flow, "inputs")
    return found


def _cuts(result: fx.Node, dominators: Mapping[Any, Any]) -> list[fx.Node]:
    """Those of one result, in order, itself the last."""
    cuts: list[fx.Node] = []
    at: Any = result if result in dominators else "inputs"
    while at != "inputs":
        cuts.append(at)
        at = dominators[at]
    return cuts[::-1]


def _between(start: fx.Node, cut: fx.Node, position: Mapping[fx.Node, int]) -> tuple[fx.Node, ...]:
    found, waiting = {cut}, [cut]
    while waiting:
        sources = [s for s in waiting.pop().all_input_nodes if s in position and s is not start and s not in found]
        found.update(sources)
        waiting += sources
    return tuple(sorted(found, key=position.__getitem__))
