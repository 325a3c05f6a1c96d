"""A recorded step and a set of rebuilt values -> kept bytes, peak and the seconds that rebuilding takes.

    kept       what lies between forward and backward: every value that backward reads and that is not rebuilt, every
               value that a rebuilt one is made from, vectors that are copied for it, and the internals of the steps
    peak       the highest memory of a walk through forward and backward, as torch's allocator would see it
    seconds    every rebuilt value that is needed is computed once

A rebuilt value is made when backward first reads it, with all it is made from, and lives until its last reader in
backward is done (`normpass.recipe.recipes`). So a chain of residual joins, each made from the one before it, comes
back to life as a whole when its end is read: few bytes are kept, and the peak is high. A value kept in its middle
cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from normpass.analysis.facts import Facts, Step

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
        self._last_read = self._last_reads()

    def walk(self, rebuilt: Iterable[int], replayed: frozenset[int] = frozenset()) -> Use:
        """Kept bytes, peak and seconds of one choice."""
        demand = Demand(self, rebuilt, replayed)
        walk = _Walk(self, demand.kept_values(), demand.used(), replayed)
        walk.forward()
        middle = len(walk.timeline)
        walk.backward()
        return Use(demand.kept, walk.peak, demand.seconds(), frozenset(walk.at_peak), tuple(walk.timeline), middle)

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

    def __init__(self, walker: Walker, kept: set[int], used: set[int], replayed: frozenset[int]):
        self.walker, self.record = walker, walker.record
        self.kept, self.used, self.replayed = kept, used, replayed
        self.live = self.peak = 0
        self.timeline: list[int] = []
        self.at_peak: set[int] = set()
        self.rebuilt: dict[int, int] = {}  # alive: how many of its readers are still to come
        self.readers = self._readers()
        self.gradients: dict[int, int] = {}  # value: bytes of its gradient

    def _readers(self) -> dict[int, int]:
        """How many times each rebuilt value will be asked for."""
        readers = dict.fromkeys(self.used, 0)
        for step in self.record.steps:
            for value in step.saves:
                if value in readers:
                    readers[value] += 1
        for value in self.used:
            for read in self.record.steps[self.walker.maker[value]].reads:
                if read in readers:
                    readers[read] += 1
        return readers

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
        first_saver: dict[int, int] = {}  # in backward the last: then a kept value is free
        for index in reversed(range(len(self.record.steps))):
            for value in self.record.steps[index].saves:
                first_saver[value] = index
        for value in self.record.outputs:
            self._add_gradient(value, self.record.sizes[value])
        for index in reversed(range(len(self.record.steps))):
            step = self.record.steps[index]
            if step.differentiable:
                self._step_back(index, step, first_saver)
            self.timeline.append(self.live)

    def _step_back(self, index: int, step: Step, first_saver: dict[int, int]) -> None:
        sizes = self.record.sizes
        for value in step.saves:
            if value in self.used:
                self._rebuild(value)
        extra = 0 if index not in self.replayed else step.internals + sum(sizes[v] for v in step.makes)
        self._move(extra + step.scratch)
        if not step.passes:
            for value, size in zip(step.reads, step.read_sizes, strict=True):
                if self.record.steps[self.walker.maker[value]].differentiable:
                    self._add_gradient(value, size)
        self.live -= extra + step.scratch
        for value in step.saves:
            if value in self.used:
                self._read(value)
            elif first_saver[value] == index and value in self.kept:
                self.live -= sizes[value]
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
            if top in self.rebuilt:
                stack.pop()
                continue
            reads = self.record.steps[self.walker.maker[top]].reads
            missing = [v for v in reads if v in self.used and v not in self.rebuilt]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            self.rebuilt[top] = self.readers[top]
            self._move(self.record.sizes[top])
            for read in reads:
                if read in self.used:
                    self._read(read)

    def _read(self, value: int) -> None:
        self.rebuilt[value] -= 1
        if self.rebuilt[value] <= 0:
            del self.rebuilt[value]
            self.live -= self.record.sizes[value]
