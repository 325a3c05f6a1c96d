"""A recorded step and a set of rebuilt values -> kept bytes, peak and the seconds that rebuilding takes.

    kept       what lies between forward and backward: every value that backward reads and that is not rebuilt, every
               value that a rebuilt one is made from, vectors that are copied for it, and the internals of the steps
    peak       the highest memory of a walk through forward and backward, as torch's allocator would see it
    seconds    every rebuilt value that is needed is computed once

A rebuilt value is made when backward first reads it, with all it is made from, and lives until its last reader in
backward is done (`normpass.recipe.recipes`). So a chain of residual joins, each made from the one before it, comes
back to life as a whole when its end is read: few bytes are kept, and the peak is high. A value kept in its middle
cuts it; or a value is made for each reader anew (`made_apart`), and does not live in between.

A kept value lives until the last node that saved it is done, and until nobody has a recipe that it is in: that is until
who saved the rebuilt value is done, or, where its recipe may `let_go`, until it is made for the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from normpass.analysis.facts import Facts, Step
from normpass.graph.operators import is_producer

Seconds = Callable[[Step, "Facts"], float]


@dataclass(frozen=True)
class Use:
    """What a step of training takes with one choice of rebuilt values."""

    kept: int
    """bytes"""
    peak: int
    """bytes above the start of the step"""
    seconds: float
    """of rebuilding, in one backward"""
    at_peak: frozenset[int] = frozenset()
    """rebuilt values that are alive at the peak"""
    timeline: tuple[int, ...] = ()
    """bytes after every step of forward and then of backward"""
    forward_steps: int = 0
    """how many entries of the timeline belong to forward"""


class Walker:
    """Walks through one record; what does not depend on the choice is worked out once."""

    def __init__(self, record: Facts, seconds: Seconds, copied: Mapping[int, int] | None = None):
        self.record = record
        self.copied = copied or {}
        """value -> bytes of what is copied where it is rebuilt"""
        self.maker = record.maker()
        self.seconds = [seconds(step, record) for step in record.steps]
        self.saved = {v for step in record.steps for v in step.saves} - record.outputs
        self.made_from = [record.steps[index].reads for index in self.maker]
        self.apart = {v for step in record.steps if step.gradients_apart for v in step.makes}
        """values of which two gradients are there at one time"""
        self.savers: list[list[int]] = [[] for _ in record.sizes]
        """the steps that save each value, each once"""
        for index, step in enumerate(record.steps):
            for value in set(step.saves):
                self.savers[value].append(index)
        self._last_read = self._last_reads()

    def walk(
        self,
        rebuilt: Iterable[int],
        replayed: frozenset[int] = frozenset(),
        made_apart: frozenset[int] = frozenset(),
    ) -> Use:
        """Kept bytes, peak and seconds of one choice; `made_apart`: rebuilt values that each reader makes anew."""
        demand = Demand(self, rebuilt, replayed)
        walk = _Walk(self, demand.kept_values(), demand.used(), replayed, made_apart)
        seconds = demand.seconds() + sum(self.seconds[self.maker[v]] * (n - 1) for v, n in walk.times.items())
        walk.forward()
        middle = len(walk.timeline)
        walk.backward()
        return Use(demand.kept, walk.peak, seconds, frozenset(walk.at_peak), tuple(walk.timeline), middle)

    def readers(self, rebuilt: Iterable[int]) -> dict[int, int]:
        """How many steps and values that are made again ask for each value that is."""
        used = Demand(self, rebuilt).used()
        readers = {value: len(self.savers[value]) for value in used}
        for value in used:
            for read in self.made_from[value]:
                if read in used:
                    readers[read] += 1
        return readers

    def let_go(self, used: Iterable[int]) -> set[int]:
        """Which of the values that are made again need nothing any more once the last reader of a backward has them.

        Those that are saved by nodes of PyTorch's own, which read once what they saved, and by no others, nor by
        others through what is made from them.
        """
        read_more: set[int] = set(self.record.outputs)
        once: set[int] = set()
        for value in sorted(used, key=lambda v: -self.maker[v]):  # who is made from it comes first
            steps = [self.record.steps[index] for index in self.savers[value]]
            known = all(s.node is not None and is_producer(s.node) and not s.is_foreign for s in steps)
            if known and value not in read_more:
                once.add(value)
            else:
                read_more.update(self.made_from[value])
        return once

    def _last_reads(self) -> list[int]:
        """The last step of forward that makes or reads each value."""
        last = list(self.maker)
        for index, step in enumerate(self.record.steps):
            for value in step.reads:
                last[value] = index
        for value in self.record.outputs:
            last[value] = len(self.record.steps)
        return last


class Demand:
    """What backward asks for under one choice, kept up to date while the choice changes value by value.

    A value is asked for as often as steps save it, or rebuilt values that are asked for are made from it. So a change
    costs what changes with it, and not a walk over the network.
    """

    def __init__(self, walker: Walker, rebuilt: Iterable[int], replayed: Iterable[int] = ()):
        self._walker, record = walker, walker.record
        self._sizes = [0 if v in record.outputs else size for v, size in enumerate(record.sizes)]
        self._asked = [0] * len(record.sizes)
        self.rebuilt, self.replayed = set(rebuilt) - record.outputs, set(replayed)
        self.kept = sum(step.internals for i, step in enumerate(record.steps) if i not in self.replayed)
        """bytes"""
        self._ask(walker.saved, 1)

    def flip(self, value: int) -> None:
        """Rebuild `value` from now on; keep it, if it is rebuilt. Outputs exist anyway."""
        if value in self._walker.record.outputs:
            return
        self.rebuilt ^= {value}
        if self._asked[value]:
            sign = 1 if value in self.rebuilt else -1
            self.kept -= sign * (self._sizes[value] - self._walker.copied.get(value, 0))
            self._ask(self._walker.made_from[value], sign)

    def flip_internals(self, step: int) -> None:
        """Compute the internals of `step` again from now on; keep them, if they are computed again."""
        self.replayed ^= {step}
        self.kept += self._walker.record.steps[step].internals * (-1 if step in self.replayed else 1)

    def used(self) -> set[int]:
        """The rebuilt values that are asked for."""
        return {v for v in self.rebuilt if self._asked[v]}

    def kept_values(self) -> set[int]:
        """The kept values; outputs are none."""
        outputs = self._walker.record.outputs
        return {v for v, asked in enumerate(self._asked) if asked and v not in self.rebuilt and v not in outputs}

    def seconds(self) -> float:
        """Of rebuilding in one backward."""
        seconds, maker = self._walker.seconds, self._walker.maker
        steps = {maker[v] for v in self.used()}
        return math.fsum([*(seconds[s] for s in steps), *(seconds[s] for s in self.replayed)])

    def _ask(self, values: Iterable[int], sign: int) -> None:
        """One more reader of each of `values`, or, with a `sign` of -1, one less."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            before = self._asked[value]
            self._asked[value] = before + sign
            if before and self._asked[value]:
                continue
            if value in self.rebuilt:
                self.kept += sign * self._walker.copied.get(value, 0)
                waiting += self._walker.made_from[value]
            else:
                self.kept += sign * self._sizes[value]


class _Walk:
    """One walk: what is alive, and the highest that was seen."""

    def __init__(
        self, walker: Walker, kept: set[int], used: set[int], replayed: frozenset[int], made_apart: frozenset[int]
    ):
        self.walker, self.record = walker, walker.record
        self.kept, self.used, self.replayed, self.made_apart = kept, used, replayed, made_apart
        self.let_go = walker.let_go(used)
        self.live = self.peak = 0
        self.timeline: list[int] = []
        self.at_peak: set[int] = set()
        self.rebuilt: dict[int, int] = {}  # alive: how many of its readers are still to come
        self.gradients: dict[int, int] = {}  # value: bytes of its gradient
        self.readers: dict[int, int] = {}
        """how many times each rebuilt value will be asked for"""
        self.times: dict[int, int] = {}
        """how many times it is yet to be made"""
        self.ends: dict[int, list[int]] = {}
        """step -> rebuilt values whose recipes go with its backward"""
        self.holders: dict[int, int] = {}
        """kept value -> how many steps and recipes have it"""
        self._count()

    def _count(self) -> None:
        end: dict[int, int] = {}  # of each recipe: the step that has it longest, in backward
        maker, steps = self.walker.maker, self.record.steps
        self.readers = {value: len(self.walker.savers[value]) for value in self.used}
        self.holders = {value: len(self.walker.savers[value]) for value in self.kept}
        for value in sorted(self.used, key=lambda v: -maker[v]):  # who is made from it comes first
            self.times[value] = self.readers[value] if value in self.made_apart else 1
            end[value] = last = min([*self.walker.savers[value], end.get(value, maker[value] + len(steps))])
            self.ends.setdefault(last, []).append(value)
            for read in steps[maker[value]].reads:
                if read in self.used:
                    self.readers[read] += self.times[value]
                    end[read] = min(end.get(read, last), last)
                elif read in self.kept:
                    self.holders[read] += 1

    def _move(self, size: int) -> None:
        self.live += size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, set(self.rebuilt)

    def forward(self) -> None:
        sizes, last = self.record.sizes, self.walker._last_read
        ends: dict[int, list[int]] = {}
        for value, index in enumerate(last):
            if value not in self.kept:
                ends.setdefault(index, []).append(value)
        for index, step in enumerate(self.record.steps):
            self._move(sum(sizes[v] for v in step.makes))
            self._move(step.internals if index not in self.replayed else 0)
            self.live -= sum(sizes[v] for v in ends.get(index, ()))
            self.timeline.append(self.live)

    def backward(self) -> None:
        for value in self.record.outputs:
            self._add_gradient(value, self.record.sizes[value])
        for index in reversed(range(len(self.record.steps))):
            step = self.record.steps[index]
            if step.differentiable:
                self._step_back(index, step)
            self.timeline.append(self.live)

    def _step_back(self, index: int, step: Step) -> None:
        sizes, saves = self.record.sizes, sorted(set(step.saves))
        for value in saves:
            if value in self.used:
                self._rebuild(value)
                self._hand_out(value)
        extra = 0 if index not in self.replayed else step.internals + sum(sizes[v] for v in step.makes)
        self._move(extra + step.scratch)
        if not step.passes:
            for value, size in zip(step.reads, step.read_sizes, strict=True):
                if self.record.steps[self.walker.maker[value]].differentiable:
                    self._add_gradient(value, size)
        self.live -= extra + step.scratch
        for value in saves:
            if value in self.used:
                self._read(value)
            else:
                self._release(value)
        for value in self.ends.get(index, ()):
            if value not in self.let_go:
                self._let_go(value)
        for value in step.makes:
            self.live -= self.gradients.pop(value, 0)
        self.live -= step.internals if index not in self.replayed else 0

    def _add_gradient(self, value: int, size: int) -> None:
        """One more gradient of `value`, or of the `size` bytes of it that a view shows."""
        self._move(size)
        before, most = self.gradients.get(value, 0), self.record.sizes[value] * (2 if value in self.walker.apart else 1)
        self.gradients[value] = min(before + size, most)
        self.live -= before + size - self.gradients[value]

    def _rebuild(self, value: int) -> None:
        """Make `value` and, before it, what it is made from; depth first, without recursion."""
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self.rebuilt and top not in self.made_apart:
                stack.pop()
                continue
            reads = [v for v in self.record.steps[self.walker.maker[top]].reads if v in self.used]
            missing = [v for v in reads if v not in self.rebuilt and v not in self.made_apart]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            for own in [v for v in reads if v in self.made_apart]:  # made from what is kept
                self._make(own)
            self._make(top)
            for read in reads:
                self._hand_out(read)
                self._read(read)

    def _make(self, value: int) -> None:
        self.times[value] -= 1
        is_apart = value in self.made_apart
        self.rebuilt[value] = self.rebuilt.get(value, 0) + 1 if is_apart else self.readers[value]
        self._move(self.record.sizes[value])

    def _hand_out(self, value: int) -> None:
        """The next reader has it."""
        if value in self.let_go and self.rebuilt[value] == 1 and not self.times[value]:
            self._let_go(value)

    def _read(self, value: int) -> None:
        self.rebuilt[value] -= 1
        is_last = not self.rebuilt[value]
        if is_last:
            del self.rebuilt[value]
        if is_last or value in self.made_apart:
            self.live -= self.record.sizes[value]

    def _let_go(self, value: int) -> None:
        """Nobody needs what `value` is made from for it any more."""
        for read in self.record.steps[self.walker.maker[value]].reads:
            if read not in self.used:
                self._release(read)

    def _release(self, value: int) -> None:
        if value not in self.holders:
            return
        self.holders[value] -= 1
        if not self.holders[value]:
            self.live -= self.record.sizes[value]
