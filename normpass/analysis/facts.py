"""What every value of a captured graph is: who makes, reads, writes and saves it.

A *value* is the content of one storage between two writes to it: (storage, version). What a step saves is a value, or
its *internals*: statistics, the indices of a pooling, the mask of a dropout. Parameters, buffers and inputs of the
graph are no values: they exist anyway. `normpass.analysis.fake_run` finds all this out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import fx

V = TypeVar("V")


@dataclass
class Step:
    """One node of the graph that calls something."""

    node: fx.Node
    key: str
    """dotted path of the layer that it is, or the path and what it calls"""
    makes: tuple[int, ...] = ()
    """values made here"""
    reads: tuple[int, ...] = ()
    """values among its arguments"""
    read_sizes: tuple[int, ...] = ()
    """bytes of the arguments that lie in them: fewer than the value's where it is read through a view"""
    reads_outside: tuple[int, ...] = ()
    """storages of the graph's own inputs among its arguments"""
    writes: tuple[int, ...] = ()
    """storages that it writes to in place"""
    saves: tuple[int, ...] = ()
    """values that autograd keeps for its backward"""
    internals: int = 0
    """bytes that autograd keeps for it beside values"""
    copies: bool = False
    """autograd keeps a copy of what it overwrites"""
    passes: bool = False
    """its result lies in the storage of an argument (a view, an operation in place)"""
    differentiable: bool = False
    gradients_apart: bool = False
    """both gradients of its result, which two readers have, are there when its backward runs, and not their sum"""
    is_random: bool = False
    is_foreign: bool = False
    """an operator ran that is not to run again: of an unknown library, or one that rounds otherwise in backward"""
    flops: int = 0
    """multiplications and additions of its matrix products and convolutions, forward"""
    weights: int = 0
    """bytes of the parameters that it reads"""
    scratch: int = 0
    """bytes that its backward takes for a moment, beside the gradients of its arguments"""
    groups: int = 1
    """of a convolution"""

    @property
    def target(self) -> Any:
        """What it calls: a function, or the name of a method."""
        return self.node.target


@dataclass
class Facts:
    """The steps of one forward in order, and every value."""

    steps: list[Step] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """bytes of each value"""
    outputs: frozenset[int] = frozenset()
    """values that the graph returns"""
    overwritten: frozenset[int] = frozenset()
    """values whose storage is written to after they were made"""
    unseen: frozenset[int] = frozenset()
    """values of storages that are written to behind autograd's back (`.data`)"""
    saved_outside: frozenset[int] = frozenset()
    """storages of the graph's inputs, as they are at the start, that autograd keeps"""
    copied_outside: frozenset[int] = frozenset()
    """storages of the graph's inputs that autograd keeps as copies, which are internals of steps"""
    written_outside: frozenset[int] = frozenset()
    """storages of the graph's inputs that the graph writes to"""
    state: frozenset[int] = frozenset()
    """storages of the parameters and buffers among the graph's inputs"""
    small_outside: dict[int, int] = field(default_factory=dict)
    """storages of the graph's inputs that are so small that a copy costs next to nothing -> their bytes"""
    device: str = "cpu"
    results: dict[fx.Node, Any] = field(default_factory=dict)
    """what each node returns, as tensors without memory"""
    storages: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    """the storages that the result of each node lies in"""
    modes: dict[fx.Node, int] = field(default_factory=dict)
    """how often grad mode, autocast and the like were switched before each node"""
    values: dict[fx.Node, int] = field(default_factory=dict)
    """the value that the result of each node that is one tensor lies in"""

    def maker(self) -> list[int]:
        """The index of the step that makes each value."""
        made = [-1] * len(self.sizes)
        for index, step in enumerate(self.steps):
            for value in step.makes:
                made[value] = index
        return made

    @property
    def plain_kept(self) -> int:
        """Bytes that autograd keeps as things stand; outputs are not counted."""
        saved = {v for step in self.steps for v in step.saves} - self.outputs
        return sum(self.sizes[v] for v in saved) + sum(step.internals for step in self.steps)

    def value_of(self, node: fx.Node) -> int | None:
        """The value that the result of `node` lies in as it returns it; None for an input of the graph."""
        return self.values.get(node)

    def of_copy(self, copies: Mapping[fx.Node, fx.Node]) -> Facts:
        """The same about a copy of the graph, whose nodes are the values of `copies`; others stay as they are."""
        return replace(
            self,
            steps=[replace(step, node=copies.get(step.node, step.node)) for step in self.steps],
            results=_renamed(self.results, copies),
            storages=_renamed(self.storages, copies),
            modes=_renamed(self.modes, copies),
            values=_renamed(self.values, copies),
        )

    def are_in_one_mode(self, *nodes: fx.Node) -> bool:
        """Whether nothing switches grad mode, autocast or the like between the first and the last of `nodes`."""
        return len({self.modes[node] for node in nodes}) <= 1

    def step_of(self) -> dict[fx.Node, Step]:
        return {step.node: step for step in self.steps}

    def writer_after(self, node: fx.Node, after: fx.Node, until: fx.Node | None = None) -> fx.Node | None:
        """The first node later than `after` (and earlier than `until`) that writes where the result of `node` lies."""
        mine = self.storages.get(node, frozenset())
        return next((s.node for s in self._between(after, until) if not mine.isdisjoint(s.writes)), None)

    def is_watched(self, node: fx.Node) -> bool:
        """Whether autograd keeps the result of `node`, or nobody outside the graph has it."""
        value = self.value_of(node)
        if value is None:
            return self.storages.get(node, frozenset()) <= self.saved_outside
        return value not in self.outputs or any(value in step.saves for step in self.steps)

    def toucher_between(self, nodes: Sequence[fx.Node], after: fx.Node, until: fx.Node) -> fx.Node | None:
        """The first node between the two that reads or writes where one of `nodes` lies."""
        mine = frozenset(s for node in nodes for s in self.storages.get(node, ()))
        for step in self._between(after, until):
            read = (s for source in step.node.all_input_nodes for s in self.storages.get(source, ()))
            if not mine.isdisjoint(step.writes) or not mine.isdisjoint(read):
                return step.node
        return None

    def _between(self, after: fx.Node, until: fx.Node | None) -> Iterator[Step]:
        is_later = after.op == "placeholder"
        for step in self.steps:
            if step.node is until:
                return
            if is_later:
                yield step
            is_later = is_later or step.node is after


def _renamed(about: Mapping[fx.Node, V], copies: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, V]:
    return {copies.get(node, node): what for node, what in about.items()}


SMALL = 1 << 16
"""bytes; a vector of a few thousand channels"""

__all__ = ["SMALL", "Facts", "Step"]
