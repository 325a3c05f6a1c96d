"""Cutting a chain of units into groups of neighbours, by what each group costs.

A group is a range [start, stop) of units; `cost(start, stop)` is what it costs, in any unit, >= 0. `optimal` is the
shortest path from cut point 0 to cut point n, where an edge (start, stop) has the group's cost as its length.
`greedy` is what the paper on mini-batch serialization does (arXiv 1810.00307): begin with a group for every unit and
merge the two neighbours that save most until no merge saves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import networkx as nx

Cost = Callable[[int, int], float]
Groups = tuple[tuple[int, int], ...]
"""(start, stop) of every group, in order: the first starts at 0, each next one where the one before stops."""


def optimal(count: int, cost: Cost) -> Groups:
    """The groups of `count` units with the least total cost."""
    if count == 0:
        return ()
    graph = nx.DiGraph()
    for start in range(count):
        graph.add_weighted_edges_from((start, stop, cost(start, stop)) for stop in range(start + 1, count + 1))
    return tuple(pairwise(nx.shortest_path(graph, 0, count, weight="weight")))


def greedy(count: int, cost: Cost) -> Groups:
    """The groups that merging neighbours finds, the pair that saves most first."""
    cuts = list(range(count + 1))
    while len(cuts) > 2:
        saved, index = max((_saving(cuts, index, cost), -index) for index in range(1, len(cuts) - 1))
        if saved <= 0:
            break
        del cuts[-index]
    return tuple(pairwise(cuts))


def _saving(cuts: list[int], index: int, cost: Cost) -> float:
    """What it saves to give up the cut at `index`."""
    before, cut, after = cuts[index - 1 : index + 2]
    return cost(before, cut) + cost(cut, after) - cost(before, after)
