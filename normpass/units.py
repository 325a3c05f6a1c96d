"""A captured graph as a chain of units, each with its footprint and its memory traffic.

A *unit* is a layer with the norm and the activation behind it, or everything between two values through which all
that follows must pass: a residual block, an inception module, a dense block. In graph terms its ends are successive
dominators of the graph's output. What follows a global pooling is one unit with it: the head of a classifier. Only
shapes are needed, so the graph runs on tensors without memory.

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

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normpass.capture import NORM_BASES
from normpass.cuts import Shapes, cuts_of, variable_nodes
from normpass.functional import product_as_first, sum_as_first
from normpass.graph import VIEW_FUNCTIONS, VIEW_METHODS, module_of
from normpass.sites import activation_of, is_add

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_WEIGHTED_FUNCTIONS = frozenset(
    {F.linear, torch.matmul, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
    | {torch.conv1d, torch.conv2d, torch.conv3d}
)
_NORM_FUNCTIONS = (F.batch_norm, torch.batch_norm, F.group_norm, F.layer_norm, F.instance_norm)
_MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_PRODUCTS = (operator.mul, operator.imul, operator.truediv, torch.mul, product_as_first)
_SUMS = (operator.sub, operator.isub, torch.sub, operator.add, operator.iadd, torch.add, sum_as_first)
_HEAD = 16
"""A unit whose output is so many times smaller than its input ends in a global pooling."""
_ONE_BIT = ("relu", "leaky_relu", "hardtanh")


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


def units_of(graph: fx.Graph, root: nn.Module, shapes: Shapes, item_bytes: int | None = None) -> list[Unit]:
    """The chain of units from the first cut on.

    Args:
        shapes: from `shapes_of`; its batch is the size of the first dimension of the first cut.
        item_bytes: bytes of a value of any floating tensor; None: by its dtype.
    """
    cuts = cuts_of(graph)
    accountant = Accountant(graph, root, shapes, item_bytes)
    units: list[Unit] = []
    begin, members = 0, _between(graph, cuts)
    for index in range(1, len(cuts)):
        following = cuts[index + 1 :][:1]
        if following and len(members[index + 1]) == 1 and accountant.layer(following[0]).writes_over:
            continue  # a norm or an activation: part of the layer before it
        nodes = [node for segment in members[begin + 1 : index + 1] for node in segment]
        if following and accountant.of(cuts[index]) * _HEAD <= accountant.of(cuts[begin]):
            continue
        units.append(accountant.unit(cuts[begin], nodes))
        begin = index
    return units


def _between(graph: fx.Graph, cuts: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """For each cut the nodes behind the cut before it, up to itself."""
    place = {node: index for index, node in enumerate(cuts)}
    found: list[list[fx.Node]] = [[] for _ in cuts]
    segment: dict[fx.Node, int] = {}
    for node in variable_nodes(graph):
        before = [place[s] + 1 if s in place else segment[s] for s in node.all_input_nodes if s in segment]
        segment[node] = place[node] if node in place else max(before, default=0)
        found[segment[node]].append(node)
    return found


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

    def __init__(self, graph: fx.Graph, root: nn.Module, shapes: Shapes, item_bytes: int | None):
        self.root = root
        self.shapes = shapes
        self.item_bytes = item_bytes
        self.variable = set(variable_nodes(graph))

    def bytes_of(self, value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return sum(self.bytes_of(item) for item in value)
        if not isinstance(value, Tensor):
            return 0
        size = self.item_bytes if self.item_bytes and value.is_floating_point() else value.element_size()
        return value.numel() * size

    def of(self, node: fx.Node) -> int:
        return self.bytes_of(self.shapes[node])

    def operands(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.variable]

    def layer(self, node: fx.Node) -> Layer:
        """What `node` moves if it reads its operands from memory and writes its result there."""
        module = module_of(node, self.root)
        read, made = sum(self.of(s) for s in self.operands(node)), self.of(node)
        weights = self._weights(node, module)
        if isinstance(module, _WEIGHTED) or node.target in _WEIGHTED_FUNCTIONS:
            return Layer(3 * (read + made), read, weights)
        if isinstance(module, NORM_BASES) or node.target in _NORM_FUNCTIONS:
            return Layer(8 * read, read, weights, writes_over=True)
        if self._is_view(node):
            return Layer(writes_over=True)
        if is_add(node) or node.target in _SUMS:
            return Layer(read + made if len(self.operands(node)) > 1 else 4 * made, writes_over=True)
        return self._other(node, module, read, made)

    def _other(self, node: fx.Node, module: nn.Module | None, read: int, made: int) -> Layer:
        activation = activation_of(node, self.root)
        name = str(getattr(node.target, "__name__", node.target)) if module is None else type(module).__name__.lower()
        if activation is not None or "dropout" in name:
            bits = activation is None or activation.name in _ONE_BIT
            saved = read / self._bits(node) if bits else read
            return Layer(4 * read + 2 * saved, saved, writes_over=True)
        if isinstance(module, _MAX_POOLS) or "max_pool" in name:
            indices = made / (self._bits(node) / 8)
            return Layer(2 * (read + made) + 2 * indices, indices)
        if isinstance(module, nn.Module) and "avgpool" in name or "avg_pool" in name or "mean" in name or name == "cat":
            return Layer(2 * (read + made))
        if node.target in _PRODUCTS and len(self.operands(node)) == 1:
            return Layer(4 * made, self._saved_of_scale(node, read), writes_over=True)
        return Layer(2 * (read + made) + 2 * read, read, self._weights(node, module))

    def _bits(self, node: fx.Node) -> int:
        """Bits of one value."""
        value = self.shapes[self.operands(node)[0]]
        return 8 * (self.item_bytes or value.element_size())

    def _saved_of_scale(self, node: fx.Node, read: int) -> int:
        """A product with a constant saves its operand only where the constant has a gradient."""
        constants = [s for s in node.all_input_nodes if s not in self.variable and s.op == "get_attr"]
        return read if any(isinstance(_attribute(self.root, s), nn.Parameter) for s in constants) else 0

    def _is_view(self, node: fx.Node) -> bool:
        if isinstance(module_of(node, self.root), (nn.Flatten, nn.Unflatten, nn.Identity)):
            return True
        return node.target in VIEW_FUNCTIONS or (node.op == "call_method" and node.target in VIEW_METHODS)

    def _weights(self, node: fx.Node, module: nn.Module | None) -> int:
        tensors = list(module.parameters()) if module is not None else []
        tensors += [_attribute(self.root, s) for s in node.all_input_nodes if s.op == "get_attr"]
        return sum(self.bytes_of(t) for t in tensors if isinstance(t, nn.Parameter))

    # --- units ---

    def unit(self, start: fx.Node, nodes: Sequence[fx.Node]) -> Unit:
        """The unit of `nodes`, which reads the value of `start` alone."""
        batch = self.shapes[start].shape[0]
        layers = [self.layer(node) for node in nodes]
        readers = self._further_readers(start, nodes)
        fan_out = sum(3 * self.of(node) * count for node, count in readers.items())
        joined = sum(4 * self._joined(node) for node in nodes)
        together, apart = self._footprints(start, nodes)
        return Unit(
            name=_common_path(nodes) or _path(nodes[0]),
            last=_common_path(nodes) or _path(nodes[-1]),
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


def _attribute(root: nn.Module, node: fx.Node) -> Any:
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _common_path(nodes: Sequence[fx.Node]) -> str:
    """The dotted path that all nodes lie below; empty where there is none."""
    paths = [_path(node).split(".") for node in nodes]
    common = paths[0]
    for path in paths[1:]:
        common = [a for a, b in zip(common, path, strict=False) if a == b][: len(common)]
    return ".".join(common)


def _path(node: fx.Node) -> str:
    """The path of the layer that `node` calls; of anything else that of the module around it, or its own name."""
    if node.op == "call_module":
        return str(node.target)
    stack = [path for path in node.meta.get("nn_module_stack", {}) if path]
    return str(stack[-1]) if stack else node.name
