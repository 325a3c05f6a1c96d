"""Which values are rebuilt, so that a step keeps to a budget and takes as little longer as possible.

Every value that may be rebuilt saves its bytes and costs the seconds of making it once more, whatever else is rebuilt
(each is made at most once in a backward). So kept bytes alone are a covering knapsack: values are taken by seconds per
byte, the cheapest first, until the budget is met; then those that turn out not to be needed are put back, the dearest
first. What a value is made from has to be there, though, and may itself be kept or rebuilt; so every step of the search
is judged by `normpass.analysis.liveness` and not by a sum. A sum behind a convolution saves nothing alone, for the
convolution's result would be kept instead: such a value is taken together with what it is made from, back to what the
default keeps.

The peak is brought down afterwards, by cutting chains (see `normpass.analysis.liveness`): one of the values that are
alive at the peak is kept instead, and what that costs in bytes is saved elsewhere. The cut that saves most bytes a
second is taken, until the peak is low enough or no cut helps.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from normpass.analysis.liveness import Demand, Use, Walker

_SEARCH_SECONDS = 2.0


@dataclass(frozen=True)
class Selectable:
    """What may be rebuilt in one record."""

    default: frozenset[int]
    """values that are rebuilt where no budget is named"""
    extra: frozenset[int]
    """values that may be rebuilt as well"""
    replayable: frozenset[int]
    """steps whose internals may be computed again in backward"""
    forced: frozenset[int] = frozenset()
    """values that cannot be kept, since they are overwritten: always rebuilt where they are asked for"""


@dataclass(frozen=True)
class Chosen:
    """The values that are rebuilt and the steps that are replayed."""

    rebuilt: frozenset[int]
    replayed: frozenset[int]


class Search:
    """The fastest choice within a budget; see the module."""

    def __init__(self, walker: Walker, possible: Selectable):
        self.walker, self.forced = walker, possible.forced
        self.default = Chosen(possible.default | possible.forced, frozenset())
        self.values, self.steps = (possible.default | possible.extra) - possible.forced, possible.replayable
        record, maker = walker.record, walker.maker
        items: list[tuple[float, int, Chosen]] = []
        kept = self.demand(self.default).kept_values()
        for value in self.values:
            for taken in {frozenset({value}), self._with_makers(value, kept)}:
                seconds = sum(walker.seconds[step] for step in {maker[v] for v in taken})
                items.append((seconds / max(record.sizes[value], 1), maker[value], Chosen(taken, frozenset())))
        for step in self.steps:
            rate = walker.seconds[step] / max(record.steps[step].internals, 1)
            items.append((rate, step, Chosen(frozenset(), frozenset({step}))))
        self._items = [item for *_, item in sorted(items, key=lambda entry: entry[:2])]

    def _with_makers(self, value: int, kept: Collection[int]) -> frozenset[int]:
        """`value` and what it is made from, as far as that is neither kept nor made again by default."""
        taken, waiting = {value}, list(self.walker.made_from[value])
        while waiting:
            source = waiting.pop()
            if source in self.values and source not in kept and source not in self.default.rebuilt | taken:
                taken.add(source)
                waiting += self.walker.made_from[source]
        return frozenset(taken)

    def smallest(self) -> int:
        """The fewest bytes that can be kept."""
        return min(self.kept(self._cover(0, start)) for start in self._starts())

    def kept(self, chosen: Chosen) -> int:
        return self.demand(chosen).kept

    def demand(self, chosen: Chosen) -> Demand:
        """What backward asks for; changes with `flip`."""
        return Demand(self.walker, chosen.rebuilt, chosen.replayed)

    def use(self, chosen: Chosen) -> Use:
        return self.walker.walk(chosen.rebuilt, chosen.replayed)

    def within(self, budget: int, peak: int | None = None) -> Chosen | None:
        """The choice that keeps at most `budget` bytes; None where there is none.

        With `peak`, its peak is brought down to that many bytes, or as far as it goes.
        """
        found = [self._cover(budget, start) for start in self._starts()]
        found = [self._trimmed(chosen, budget) for chosen in found if self.kept(chosen) <= budget]
        if not found:
            return None
        if peak is not None:
            found = [self._lowered(chosen, budget, peak) for chosen in found]
        return min(found, key=lambda chosen: self._rank(chosen, peak))

    def _rank(self, chosen: Chosen, peak: int | None) -> tuple[int, float]:
        use = self.use(chosen)
        return (0 if peak is None else max(use.peak - peak, 0)), use.seconds

    def _starts(self) -> tuple[Chosen, Chosen]:
        """Nothing; and the default, for values that save nothing but together."""
        return Chosen(self.forced, frozenset()), self.default

    def _cover(self, budget: int, start: Chosen, refused: frozenset[int] = frozenset()) -> Chosen:
        """`start` with items added, the cheapest first, until it keeps at most `budget`."""
        demand, grown = self.demand(start), True
        while grown and demand.kept > budget:
            grown = False
            for item in self._items:
                new = Chosen(item.rebuilt - demand.rebuilt, item.replayed - demand.replayed)
                if item.rebuilt & refused or not (new.rebuilt or new.replayed):
                    continue
                before = demand.kept
                flip(demand, new)
                if demand.kept >= before:
                    flip(demand, new)
                    continue
                grown = True
                if demand.kept <= budget:
                    break
        return _choice(demand)

    def _trimmed(self, chosen: Chosen, budget: int) -> Chosen:
        """`chosen` without what it can do without, the dearest first."""
        seconds, maker, demand = self.walker.seconds, self.walker.maker, self.demand(chosen)
        made: dict[int, set[int]] = {step: set() for step in chosen.replayed}
        for value in chosen.rebuilt - self.forced:
            made.setdefault(maker[value], set()).add(value)
        for step in sorted(made, key=lambda s: (-seconds[s], s)):
            item = Chosen(frozenset(made[step]), chosen.replayed & {step})
            flip(demand, item)
            if demand.kept > budget:
                flip(demand, item)
        return _choice(demand)

    def _lowered(self, chosen: Chosen, budget: int, peak: int) -> Chosen:
        use, end = self.use(chosen), time.monotonic() + _SEARCH_SECONDS
        refused: frozenset[int] = frozenset()
        while use.peak > peak and time.monotonic() < end:
            best: tuple[float, Chosen, Use, frozenset[int]] | None = None
            for value in (use.at_peak & chosen.rebuilt) - self.forced:
                cut = refused | {value}
                other = self._cover(budget, _without(chosen, {value}, ()), cut)
                if self.kept(other) > budget:
                    continue
                changed = self.use(other)
                gain = (use.peak - changed.peak) / max(changed.seconds - use.seconds, 1e-9)
                if changed.peak < use.peak and (best is None or gain > best[0]):
                    best = gain, other, changed, cut
            if best is None:
                break
            _, chosen, use, refused = best
        return chosen


def flip(demand: Demand, item: Chosen) -> None:
    """Take what `item` names into the choice, or out of it."""
    for value in item.rebuilt:
        demand.flip(value)
    for step in item.replayed:
        demand.flip_internals(step)


def _choice(demand: Demand) -> Chosen:
    return Chosen(frozenset(demand.rebuilt), frozenset(demand.replayed))


def _without(chosen: Chosen, values: Iterable[int], steps: Iterable[int]) -> Chosen:
    return Chosen(chosen.rebuilt - frozenset(values), chosen.replayed - frozenset(steps))
