"""Where the estimate of each norm arrives, as expressions over the norms: what `kalman` wires.

Looks at a graph and changes nothing. Every node whose value has channels with an estimate gets an expression; a
node without one has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.functional import product_as_first, survival_noise
from normpass.graph import module_of
from normpass.ops import Activation
from normpass.sites import activation_of, is_add, other_operand


@dataclass(frozen=True, eq=False)
class Expression:
    """How an estimate comes about. `at` is the node that it describes, `channels` how many it has."""

    at: fx.Node
    channels: int

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def sources(self) -> Iterator[fx.Node]:
        """The norms that it starts from."""
        seen: set[Expression] = set()
        waiting: list[Expression] = [self]
        while waiting:
            expression = waiting.pop()
            if expression in seen:
                continue
            seen.add(expression)
            if isinstance(expression, Source):
                yield expression.norm
            waiting += expression.operands()


@dataclass(frozen=True, eq=False)
class Source(Expression):
    """What a norm estimates."""

    norm: fx.Node


@dataclass(frozen=True, eq=False)
class Activated(Expression):
    source: Expression
    activation: Activation

    def operands(self) -> tuple[Expression, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Predicted(Expression):
    """Behind a convolution or linear layer, which `at` calls."""

    source: Expression

    def operands(self) -> tuple[Expression, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Padded(Expression):
    """With channels of zeros around."""

    source: Expression
    before: int
    after: int

    def operands(self) -> tuple[Expression, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Joined(Expression):
    how: str
    """either `sum` or `cat`"""
    parts: tuple[Expression, ...]

    def operands(self) -> tuple[Expression, ...]:
        return self.parts


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PASSING_MODULES = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.Upsample,
    nn.Flatten,
    nn.Identity,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.ZeroPad2d,
)
_PASSING_FUNCTIONS = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool2d dropout dropout2d dropout3d flatten interpolate contiguous".split()
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_PRODUCTS = (operator.mul, torch.mul, product_as_first)


class Estimates:
    """The expressions of one graph.

    Args:
        is_filter: whether a node calls a norm that gives an estimate and takes a prediction.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, is_filter: Callable[[fx.Node], bool]):
        self.root = root
        self.norms: list[fx.Node] = []
        self.predictions: dict[fx.Node, Expression] = {}
        """norm -> what is predicted of its input"""
        self._of: dict[fx.Node, Expression] = {}
        for node in graph.nodes:
            expression = self._filter(node) if is_filter(node) else self._behind(node)
            if expression is not None:
                self._of[node] = expression

    def _filter(self, node: fx.Node) -> Expression:
        norm: Any = module_of(node, self.root)
        prediction = self._of.get(node.all_input_nodes[0])
        self.norms.append(node)
        if prediction is not None and prediction.channels == norm.num_features:
            self.predictions[node] = prediction
        return Source(node, norm.num_features, node)

    def _behind(self, node: fx.Node) -> Expression | None:
        if is_add(node):
            return self._sum(node)
        if node.target in _CONCATENATIONS and node.op == "call_function":
            return self._concatenation(node)
        if node.target in _PRODUCTS and node.op == "call_function":
            return self._survivors(node)
        inputs = node.all_input_nodes
        source = self._of.get(inputs[0]) if len(inputs) == 1 else None
        if source is None:
            return None
        activation = activation_of(node, self.root)
        if activation is not None:
            return source if activation.name == "identity" else Activated(node, source.channels, source, activation)
        return self._behind_module(node, source) if node.op == "call_module" else self._behind_function(node, source)

    def _behind_module(self, node: fx.Node, source: Expression) -> Expression | None:
        module: Any = module_of(node, self.root)
        if reason_to_keep_whole(module) is not None:
            return None
        if type(module) in _LAYERS:
            linear = isinstance(module, nn.Linear)
            expected, made = (
                (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
            )
            return Predicted(node, made, source) if source.channels == expected else None
        return source if isinstance(module, _PASSING_MODULES) else None

    def _behind_function(self, node: fx.Node, source: Expression) -> Expression | None:
        if node.target is operator.getitem:
            return source if _keeps_channels(node.args[1]) else None
        if node.target is F.pad:
            return _padded(node, source)
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name == "mean":
            return source if _is_over_space(node) else None
        return source if name in _PASSING_FUNCTIONS else None

    def _sum(self, node: fx.Node) -> Expression | None:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        operands = first, other_operand(node, first)
        parts = tuple(self._of[n] for n in operands if n in self._of)
        if len(parts) < 2 or operands[0] is operands[1] or parts[0].channels != parts[1].channels:
            return None
        return Joined(node, parts[0].channels, "sum", parts)

    def _concatenation(self, node: fx.Node) -> Expression | None:
        dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
        tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        if dim != 1 or not isinstance(tensors, (list, tuple)):
            return None
        parts = tuple(self._of[n] for n in tensors if isinstance(n, fx.Node) and n in self._of)
        if len(parts) < len(tensors):
            return None
        return Joined(node, sum(p.channels for p in parts), "cat", parts)

    def _survivors(self, node: fx.Node) -> Expression | None:
        """Stochastic depth multiplies by a factor of mean 1."""
        noise = [n for n in node.all_input_nodes if n.target is survival_noise]
        values = [n for n in node.all_input_nodes if n not in noise]
        return self._of.get(values[0]) if len(noise) == 1 and len(values) == 1 else None


def _keeps_channels(index: Any) -> bool:
    """Whether `x[index]` takes all samples and channels, and some positions."""
    everything = slice(None)
    return (
        isinstance(index, tuple)
        and len(index) > 2
        and index[:2] == (everything, everything)
        and all(isinstance(i, slice) for i in index)
    )


def _is_over_space(node: fx.Node) -> bool:
    """Whether `x.mean(dim)` averages positions, not samples or channels."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    return all(isinstance(d, int) and (d >= 2 or d in (-1, -2)) for d in dims) and len(dims) > 1


def _padded(node: fx.Node, source: Expression) -> Expression | None:
    widths: Any = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(widths, (list, tuple)) or not all(isinstance(w, int) for w in widths):
        return None
    if len(widths) <= 4:  # positions alone
        return source
    if len(widths) != 6 or any(w < 0 for w in widths[4:]):
        return None
    before, after = widths[4:]
    return Padded(node, source.channels + before + after, source, before, after)


__all__ = ["Activated", "Estimates", "Expression", "Joined", "Padded", "Predicted", "Source"]
