"""How long what is made again lives in backward, and what it is made from.

    made apart    a skip of a U-Net is read where the decoder joins it, and again where the encoder goes on; made once
                  for both it would live through all the backward between. Both make their own instead, where the peak
                  of the step lies between and is lowered by it
    let go        a concatenation is made from a tensor that nobody else needs. When its last reader has it, that
                  tensor goes, before the reader makes its gradients

Both change when memory is freed and no number.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from normpass.analysis.facts import Facts
from normpass.analysis.liveness import Demand, Walker
from normpass.analysis.minimum_cut import Possible

_LEAST_GAIN = 0.03
"""of the peak; less is not worth making a value once more"""
_MOST_ROUNDS = 16


@dataclass(frozen=True)
class Lifetimes:
    """Values of one graph that are made again."""

    made_apart: frozenset[int] = frozenset()
    """those that every reader makes anew"""
    let_go: frozenset[int] = frozenset()
    """those that keep alive what nobody else needs, and need not"""


def lifetimes(found: Possible, again: frozenset[int]) -> Lifetimes:
    """What is best for the peak of a step in which `again` is made again."""
    walker = Walker(found.facts, _no_seconds)
    demand = Demand(walker, again)
    used, kept = demand.used(), demand.kept_values()
    lonely = {v for v in kept if not walker.savers[v]}
    let_go = frozenset(v for v in walker.let_go(used) if not lonely.isdisjoint(walker.made_from[v]))
    return Lifetimes(made_apart(walker, found.cheap, again), let_go)


def made_apart(
    walker: Walker, cheap: Collection[int], rebuilt: frozenset[int], replayed: frozenset[int] = frozenset()
) -> frozenset[int]:
    """The values of `rebuilt` that two readers make better each for itself: cheap ones, made from what is kept."""
    apart: frozenset[int] = frozenset()
    use, readers = walker.walk(rebuilt, replayed), walker.readers(rebuilt)
    for _ in range(_MOST_ROUNDS):
        there = [v for v in use.at_peak - apart if v in cheap and readers[v] == 2]
        candidates = [v for v in there if rebuilt.isdisjoint(walker.made_from[v])]
        uses = {v: walker.walk(rebuilt, replayed, apart | {v}) for v in candidates}
        best = min(candidates, key=lambda v: uses[v].peak, default=None)
        if best is None or uses[best].peak > (1 - _LEAST_GAIN) * use.peak:
            break
        apart, use = apart | {best}, uses[best]
    return apart


def _no_seconds(step: object, facts: Facts) -> float:
    return 0.0
