"""The fewest bytes that can be kept when cheap functions run again in backward: a minimum cut.

What autograd saves is needed: it is kept, or made again by a cheap function from what that reads, which is kept or made
again in its turn. As a flow network: an edge as wide as its bytes through every value, edges without limit from what
it is made from and to where it is needed; what no cheap function makes hangs at the source. The values whose edges
a minimum cut goes through are what is kept (Ford and Fulkerson 1956; for recomputation: torch's partitioner of
AOTAutograd). Of several minimum cuts it takes the one next to what is needed, which makes the least again.

A value cannot be kept where it is written to later, nor made from what somebody else may change unnoticed: an input or
output of the graph that autograd does not watch. A value that autograd saves and that is written to afterwards stays
with autograd, whose error that is. So what is kept is never more than plain keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from normpass.analysis.facts import Facts, Step
from normpass.graph.operators import MOVES_STATISTICS, is_producer
from normpass.runtime.functional import FunctionalBatchNorm
from normpass.runtime.sample_norms import FunctionalGroupNorm, FunctionalRowNorm

_NORM_CALLS = (FunctionalBatchNorm, FunctionalGroupNorm, FunctionalRowNorm)
"""What the arguments of a norm are put in, its weight by name."""


@dataclass(frozen=True)
class Possible:
    """What of one graph may be made again: what the cut, and a search within a budget, choose from."""

    facts: Facts
    maker: tuple[int, ...]
    cheap: frozenset[int]
    """values that cheap functions make"""
    dear: frozenset[int]
    """values that producers make, which may be made again where a budget asks for it"""
    fixed: frozenset[int]
    """values that stay with autograd, or cannot be kept: nothing is made from them"""
    copied: Mapping[int, int] = field(default_factory=dict)
    """value -> bytes of small inputs of the graph that are copied where it is made again"""

    @classmethod
    def nothing(cls, facts: Facts) -> Possible:
        """Facts of which nothing is made again."""
        return cls(facts, tuple(facts.maker()), frozenset(), frozenset(), frozenset())


def possible(facts: Facts, notes_itself: Collection[Any] = ()) -> Possible:
    """What may be made again.

    Args:
        notes_itself: functions that note themselves how their result is made again, whatever else they do.
    """
    maker = facts.maker()
    saved = {v for step in facts.steps for v in step.saves}
    watched = saved - facts.overwritten
    stays = (saved & facts.overwritten) | facts.unseen
    unkeepable = facts.overwritten | (facts.outputs - watched)
    changed = _changed_state(facts, notes_itself)
    cheap: set[int] = set()
    dear: set[int] = set()
    copied: dict[int, int] = {}
    for step in facts.steps:
        values = [v for v in step.makes if v not in stays]
        if not values or not _may_run_again(step, facts, notes_itself, changed):
            continue
        if any(v in stays or (v in unkeepable and v not in cheap) for v in step.reads):
            continue
        is_dear = step.target not in notes_itself and (step.flops > 0 or is_producer(step.node))
        (dear if is_dear else cheap).update(values)
        copied.update(dict.fromkeys(values, _copied(step, facts)))
    dear -= unkeepable
    return Possible(facts, tuple(maker), frozenset(cheap), frozenset(dear), frozenset(stays | unkeepable), copied)


def _copied(step: Step, facts: Facts) -> int:
    """Bytes of what a step reads from outside, is small, and is not kept by autograd anyway."""
    there = facts.saved_outside | facts.copied_outside | facts.written_outside
    return sum(facts.small_outside.get(s, 0) for s in step.reads_outside if s not in there)


def _may_run_again(step: Step, facts: Facts, notes_itself: Collection[Any], changed: set[int]) -> bool:
    """Whether running a step twice gives the same twice, and nothing else."""
    if step.target in notes_itself:  # what is state it copies, or autograd watches
        given = set(step.reads_outside) - facts.state
        if step.differentiable and not _weight_of(step, facts) <= facts.saved_outside:
            return False  # no backward goes through it, so that nobody watches its weight
        return given <= facts.saved_outside - facts.written_outside and changed.isdisjoint(step.reads_outside)
    if step.is_random or step.is_foreign or step.copies:
        return False
    outside = set(step.reads_outside)
    moves = outside & set(step.writes)
    if moves and step.target not in MOVES_STATISTICS:
        return False
    if (outside - moves) & facts.written_outside:
        return False
    if not outside - moves <= facts.saved_outside | facts.small_outside.keys():
        return False
    return _writes_one_argument(step, facts)


def _writes_one_argument(step: Step, facts: Facts) -> bool:
    """Whether a step in place writes to what is its argument, and only one argument lies there."""
    inside = set(step.writes) - set(step.reads_outside)
    there = [n for n in step.node.all_input_nodes if not inside.isdisjoint(facts.storages.get(n, ()))]
    return not inside or (len(there) == 1 and sum(a is there[0] for a in step.node.args) == 1)


def _weight_of(step: Step, facts: Facts) -> frozenset[int]:
    """Where the weight of a norm lies that is an input of the graph."""
    call = step.node.args[0] if step.node.args else None
    if not isinstance(call, fx.Node) or call.target not in _NORM_CALLS:
        return frozenset()
    weight = call.kwargs.get("weight")
    return facts.storages.get(weight, frozenset()) & facts.state if isinstance(weight, fx.Node) else frozenset()


def _changed_state(facts: Facts, notes_itself: Collection[Any]) -> set[int]:
    """Parameters and buffers that the graph changes otherwise than norms do, perhaps unseen by autograd (`.data`)."""
    others = (s for s in facts.steps if s.target not in notes_itself and s.target not in MOVES_STATISTICS)
    return {storage for step in others for storage in step.writes if storage in facts.state}


def minimum_cut(found: Possible) -> frozenset[int]:
    """The values that are made again, such that the fewest bytes are kept."""
    facts = found.facts
    saved = {v for step in facts.steps for v in step.saves}
    network = _network(found, saved)
    # networkx puts on the side of "needed" what can still reach it: as little as can be.
    _, (_, needed) = nx.minimum_cut(network, "kept", "needed", flow_func=boykov_kolmogorov)
    return frozenset(v for v in found.cheap if (v, "in") in needed and (v, "out") in needed)


def needed_values(found: Possible) -> frozenset[int]:
    """What is kept, or made again in backward, where the fewest bytes are kept."""
    again = minimum_cut(found)
    waiting = [v for step in found.facts.steps for v in step.saves]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            waiting += found.facts.steps[found.maker[value]].reads if value in again else ()
    return frozenset(seen)


def _network(found: Possible, saved: set[int]) -> nx.DiGraph:
    facts, network, seen = found.facts, nx.DiGraph(), set[int]()
    network.add_nodes_from(("kept", "needed"))  # also where everything can be made from what exists anyway
    waiting = list(saved)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        capacity = _capacity(value, found, saved)
        network.add_edge((value, "in"), (value, "out"), **({} if capacity is None else {"capacity": capacity}))
        if value in saved:
            network.add_edge((value, "out"), "needed")
        if value not in found.cheap:
            network.add_edge("kept", (value, "in"))
            continue
        for source in facts.steps[found.maker[value]].reads:
            network.add_edge((source, "out"), (value, "in"))
            waiting.append(source)
    return network


def _capacity(value: int, found: Possible, saved: set[int]) -> int | None:
    """Bytes of keeping a value; None where it cannot be kept."""
    if value in found.fixed and value not in saved:
        return None
    return 0 if value in found.facts.outputs else found.facts.sizes[value]


def joined(graphs: Sequence[Possible]) -> Possible:
    """Graphs that run one after the other, as one."""
    facts = Facts(device=graphs[0].facts.device if graphs else "cpu")
    copied: dict[int, int] = {}
    sets: dict[str, set[int]] = {"cheap": set(), "dear": set(), "fixed": set(), "outputs": set(), "overwritten": set()}
    for graph in graphs:
        start = len(facts.sizes)
        facts.sizes += graph.facts.sizes
        facts.steps += [_moved(step, start) for step in graph.facts.steps]
        for name, values in sets.items():
            source = graph if name in ("cheap", "dear", "fixed") else graph.facts
            values.update(v + start for v in getattr(source, name))
        copied.update((v + start, size) for v, size in graph.copied.items())
    facts.outputs, facts.overwritten = frozenset(sets["outputs"]), frozenset(sets["overwritten"])
    cheap, dear, fixed = (frozenset(sets[name]) for name in ("cheap", "dear", "fixed"))
    return Possible(facts, tuple(facts.maker()), cheap, dear, fixed, copied)


def _moved(step: Step, by: int) -> Step:
    moved: dict[str, Any] = {name: tuple(v + by for v in getattr(step, name)) for name in ("makes", "reads", "saves")}
    return dataclasses.replace(step, **moved)
