"""A graph as chains of units, each with its footprint and its memory traffic.

A *unit* is a layer with the norm and the activation behind it, or everything between two values through which all
that follows must pass: a residual block, an inception module, a dense block. In graph terms its ends are successive
dominators of a result of the graph. What follows a global pooling is one unit with it: the head of a classifier.

What a unit has, in bytes for one sample of the batch (weights: in all):

    footprint           largest sum of the values that are alive at once, read or written or held for another branch;
                        norms, activations and additions write over their input
    footprint_apart     the same, where nothing is held for another branch
    saved               what forward stores for backward: a convolution's and a norm's input, a bit per value of a
                        ReLU or a dropout, the indices of a max pooling (one byte each), the input of anything else
    branching           where a footprint without other branches means more traffic: per further reader of a value 3
                        times the value (read again; its gradient's parts written and read), per further operand of
                        a join 4 times the operand (written and read, and its gradient's)
    streamed            what plain layers move forward and backward if every one reads from memory and writes there:
                        a convolution 3·(input + output); a norm 8 inputs (two passes over x forward, over x and the
                        gradient backward); an activation 4 inputs and twice what it saves; an addition 3 operands;
                        the sum of gradients where a value has several readers, 3 values each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from normpass.analysis.cuts import Segment, segments_of, variable_nodes
from normpass.analysis.facts import Facts
from normpass.graph.nodes import key_of, path_of
from normpass.serialize.per_sample import kind_of

_HEAD = 16
"""A unit whose output is so many times smaller than its input ends in a global pooling."""


@dataclass(frozen=True)
class Unit:
    """Nodes of the graph between two cuts, and their bytes (the module's docstring says which)."""

    name: str
    last: str
    """name of its last layer, where it is no module as a whole"""
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    """the one value that it reads"""
    input_bytes: int
    output_bytes: int
    footprint: int
    footprint_apart: int
    saved: float
    branching: int
    streamed: float
    weights: int
    """bytes of the weights, in all"""

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


def units_of(graph: fx.Graph, facts: Facts, item_bytes: int | None = None) -> list[list[Unit]]:
    """The chains of units, one a result of the graph; each unit reads what the one before it returns.

    Args:
        facts: of the graph; its batch is the size of the first dimension of the first cut.
        item_bytes: bytes of a value of any floating tensor; None: by its dtype.
    """
    accountant = Accountant(graph, facts, item_bytes)
    return [_units(segments, accountant) for segments in segments_of(graph, facts.results)]


def _units(segments: Sequence[Segment], accountant: Accountant) -> list[Unit]:
    units: list[Unit] = []
    start, nodes = segments[0].start, list[fx.Node]()
    for index, segment in enumerate(segments):
        nodes += segment.nodes
        if index + 1 < len(segments) and _continues(start, segments[index + 1], accountant):
            continue
        units.append(accountant.unit(start, nodes))
        start, nodes = nodes[-1], []
    return units


def _continues(start: fx.Node, following: Segment, accountant: Accountant) -> bool:
    """Whether a unit that begins behind `start` goes on with `following`, which alone reads what it has made."""
    cut = following.start
    if not set(cut.users) <= set(following.nodes):
        return False
    is_head = accountant.of(cut) * _HEAD <= accountant.of(start)
    return is_head or (len(following.nodes) == 1 and accountant.layer(following.nodes[0]).writes_over)


@dataclass(frozen=True)
class Layer:
    """What one node moves and keeps, in bytes of the whole batch."""

    streamed: float = 0.0
    saved: float = 0.0
    weights: int = 0
    writes_over: bool = False
    """whether its result may take the place of its first operand"""


class Accountant:
    """Bytes of nodes and units of one graph."""

    def __init__(self, graph: fx.Graph, facts: Facts, item_bytes: int | None):
        self.results, self.steps = facts.results, facts.step_of()
        self.item_bytes = item_bytes
        self.variable = set(variable_nodes(graph, facts.results))

    def bytes_of(self, value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return sum(self.bytes_of(item) for item in value)
        if not isinstance(value, Tensor):
            return 0
        size = self.item_bytes if self.item_bytes and value.is_floating_point() else value.element_size()
        return value.numel() * size

    def of(self, node: fx.Node) -> int:
        return self.bytes_of(self.results[node])

    def operands(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.variable]

    def layer(self, node: fx.Node) -> Layer:
        """What `node` moves if it reads its operands from memory and writes its result there."""
        kind, step = kind_of(node), self.steps[node]
        operands, weights = self.operands(node), self._weights(node)
        read, made = sum(self.of(s) for s in operands), self.of(node)
        if kind == "weighted":
            return Layer(3 * (read + made), read, weights)
        if kind == "norm":
            return Layer(8 * read, read, weights, writes_over=True)
        if step.passes and not step.writes:  # a view
            return Layer(writes_over=True)
        if kind == "sum":
            return Layer(read + made if len(operands) > 1 else 4 * made, writes_over=True)
        if kind == "product" and len(operands) == 1:
            return Layer(4 * made, read if weights else 0, writes_over=True)
        return self._other(kind, read, made, weights, self._bits(operands))

    def _other(self, kind: str, read: int, made: int, weights: int, bits: int) -> Layer:
        if kind in ("one bit", "activation"):
            saved = read / bits if kind == "one bit" else read
            return Layer(4 * read + 2 * saved, saved, writes_over=True)
        if kind == "max pool":
            indices = made / (bits / 8)
            return Layer(2 * (read + made) + 2 * indices, indices)
        if kind in ("average", "mean", "cat"):
            return Layer(2 * (read + made))
        return Layer(2 * (read + made) + 2 * read, read, weights)

    def _bits(self, operands: Sequence[fx.Node]) -> int:
        """Bits of one value of the first."""
        value = self.results[operands[0]]
        return 8 * (self.item_bytes or (value.element_size() if isinstance(value, Tensor) else 1))

    def _weights(self, node: fx.Node) -> int:
        """Bytes of the constants with a gradient that it reads."""
        constants = [self.results[s] for s in node.all_input_nodes if s not in self.variable]
        return sum(self.bytes_of(c) for c in constants if isinstance(c, Tensor) and c.requires_grad)

    # --- units ---

    def unit(self, start: fx.Node, nodes: Sequence[fx.Node]) -> Unit:
        """The unit of `nodes`, which reads the value of `start` alone."""
        value = self.results[start]
        batch = max(1, value.shape[0]) if isinstance(value, Tensor) and value.dim() else 1
        layers = [self.layer(node) for node in nodes]
        readers = self._further_readers(start, nodes)
        fan_out = sum(3 * self.of(node) * count for node, count in readers.items())
        joined = sum(4 * self._joined(node) for node in nodes)
        together, apart = self._footprints(start, nodes)
        return Unit(
            name=_common_path(nodes) or _name(nodes[0]),
            last=_common_path(nodes) or _name(nodes[-1]),
            nodes=tuple(nodes),
            input=start,
            input_bytes=self.of(start) // batch,
            output_bytes=self.of(nodes[-1]) // batch,
            footprint=together // batch,
            footprint_apart=apart // batch,
            saved=sum(layer.saved for layer in layers) / batch,
            branching=(fan_out + joined) // batch,
            streamed=(sum(layer.streamed for layer in layers) + fan_out) / batch,
            weights=sum(layer.weights for layer in layers),
        )

    def _further_readers(self, start: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """For values that several nodes of the unit read: how many more than one."""
        inside = set(nodes)
        counts = {n: sum(user in inside for user in n.users) - 1 for n in (start, *nodes)}
        return {node: count for node, count in counts.items() if count > 0}

    def _joined(self, node: fx.Node) -> int:
        """Bytes of the operands that a join has beyond its first."""
        return sum(self.of(s) for s in self.operands(node)[1:])

    def _footprints(self, start: fx.Node, nodes: Sequence[fx.Node]) -> tuple[int, int]:
        """The largest bytes alive at once, and the largest that one layer alone reads and writes."""
        order = {node: index for index, node in enumerate(nodes)}
        last_use = {n: max((order.get(u, len(nodes)) for u in n.users), default=0) for n in (start, *nodes)}
        alive = {start: self.of(start)}
        together = apart = 0
        for index, node in enumerate(nodes):
            operands = self.operands(node)
            dying = [n for n in operands if n in alive and last_use[n] <= index]
            if self.layer(node).writes_over:
                taken = next((n for n in dying if alive[n] >= self.of(node)), None)
                if taken is not None:
                    del alive[taken]
                apart = max(apart, self.of(node))
            else:
                apart = max(apart, max((self.of(n) for n in operands), default=0) + self.of(node))
            alive[node] = self.of(node)
            together = max(together, sum(alive.values()))
            for dead in dying:
                alive.pop(dead, None)
        return together, apart


def _common_path(nodes: Sequence[fx.Node]) -> str:
    """The dotted path that all nodes lie below; empty where there is none."""
    common, *paths = (path_of(node).split(".") for node in nodes)
    for path in paths:
        common = [a for a, b in zip(common, path, strict=False) if a == b][: len(common)]
    return ".".join(common)


def _name(node: fx.Node) -> str:
    return path_of(node) or key_of(node)
