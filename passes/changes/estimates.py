"""Where the estimate of each norm arrives, as expressions over the norms: what `kalman` wires.

Looks at a graph and changes nothing. Every node whose value has channels with an estimate gets an expression; a
node without one has none. What an operation writes to in place has from then on the expression of its result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normpass.graph.activations import activation_of
from normpass.graph.nodes import is_in_place_call, name_of
from normpass.graph.operators import CAT, is_add, other_operand
from normpass.ops import Activation


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
    layer: Layer

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


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: its arguments, nodes among them."""

    x: fx.Node
    weight: fx.Node
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def channels(self) -> tuple[int, int] | None:
        """Of its input and of its result."""
        shape = shape_of(self.weight)
        return None if shape is None else (shape[1] * self.groups, shape[0])


_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_PASSING = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_alpha_dropout flatten interpolate contiguous".split()
)
_IN_PLACE = frozenset(getattr(operator, name) for name in "iadd isub imul itruediv ifloordiv ipow imod setitem".split())
_PRODUCTS = (operator.mul, operator.imul, torch.mul)


def layer_of(node: fx.Node) -> Layer | None:
    """What `node` calls, if that is a convolution or linear layer."""
    if node.op != "call_function" or node.target not in _LAYERS:
        return None
    args: Any = node.args
    renamed: dict[str, Any] = {"x" if name == "input" else name: value for name, value in node.kwargs.items()}
    layer = Layer(*args, **renamed)
    return layer if isinstance(layer.groups, int) else None


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a value that Dynamo made; None where there is no tensor, or a size of channels is not a number."""
    value = node.meta.get("example_value")
    if value is None and name_of(node.target) == "dropout":  # of `normal_form`
        return shape_of(node.all_input_nodes[0])
    if not isinstance(value, Tensor) or value.dim() < 2 or not isinstance(value.shape[1], int):
        return None
    return tuple(value.shape)


class Estimates:
    """The expressions of one graph.

    Args:
        is_filter: whether a node calls a norm that gives an estimate and takes a prediction.
    """

    def __init__(self, graph: fx.Graph, is_filter: Callable[[fx.Node], bool]):
        self.norms: list[fx.Node] = []
        self.predictions: dict[fx.Node, Expression] = {}
        """norm -> what is predicted of its input"""
        self._of: dict[fx.Node, Expression] = {}
        for node in graph.nodes:
            expression = self._filter(node) if is_filter(node) else self._behind(node)
            for described in (node, *_written(node)):
                self._note(described, expression)

    def _note(self, node: fx.Node, expression: Expression | None) -> None:
        if expression is None:
            self._of.pop(node, None)
        else:
            self._of[node] = expression

    def _filter(self, node: fx.Node) -> Expression | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)  # the layer's forward passes it first
        shape = shape_of(x)
        if shape is None:
            return None
        prediction = self._of.get(x)
        self.norms.append(node)
        if prediction is not None and prediction.channels == shape[1]:
            self.predictions[node] = prediction
        return Source(node, shape[1], node)

    def _behind(self, node: fx.Node) -> Expression | None:
        if is_add(node):
            return self._sum(node)
        if node.target in CAT:
            return self._concatenation(node)
        if node.target in _PRODUCTS:
            return self._survivors(node)
        layer = layer_of(node)
        if layer is not None:
            return self._behind_layer(node, layer)
        inputs = node.all_input_nodes
        source = self._of.get(inputs[0]) if len(inputs) == 1 else None
        if source is None:
            return None
        activation = activation_of(node)
        if activation is not None:
            return source if activation.name == "identity" else Activated(node, source.channels, source, activation)
        return _passed(node, source)

    def _behind_layer(self, node: fx.Node, layer: Layer) -> Expression | None:
        source, channels, shape = self._of.get(layer.x), layer.channels(), shape_of(layer.x)
        if source is None or channels is None or channels[0] != source.channels:
            return None
        if shape is None or (node.target is F.linear and len(shape) != 2):
            return None  # its channels are those of the last dimension
        return Predicted(node, channels[1], source, layer)

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
        noise = [n for n in node.all_input_nodes if _is_survival_noise(n)]
        values = [n for n in node.all_input_nodes if n not in noise]
        return self._of.get(values[0]) if len(noise) == 1 and len(values) == 1 else None


def _written(node: fx.Node) -> tuple[fx.Node, ...]:
    """What `node` writes to in place, as far as its name says."""
    name = name_of(node.target)
    by_name = name.endswith("_") and not name.endswith("__")
    if not (by_name or node.target in _IN_PLACE or is_in_place_call(node)):
        return ()
    return tuple(n for n in node.args[:1] if isinstance(n, fx.Node))


def _is_survival_noise(node: fx.Node) -> bool:
    """Whether a factor is one for each sample, 0 or 1/p, as torchvision and timm draw it in place."""
    shape = shape_of(node) if node.target == "bernoulli_" and len(node.args) == 2 else None
    if shape is None or not all(isinstance(size, int) and size == 1 for size in shape[1:]):
        return False
    scaled = [user for user in node.users if user.target == "div_" and user.args[0] is node]
    return len(scaled) == 1 and bool(scaled[0].args[1] == node.args[1])


def _passed(node: fx.Node, source: Expression) -> Expression | None:
    """Behind an operation that makes neither more nor other channels."""
    name = name_of(node.target)
    if node.target is operator.getitem:
        return source if _keeps_channels(node.args[1]) else None
    if name == "pad":
        return _padded(node, source)
    if name == "mean":
        return source if _is_over_space(node) else None
    return source if name in _PASSING else None


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
    shape = shape_of(node.all_input_nodes[0])
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    if shape is None or len(dims) < 2:
        return False
    return all(isinstance(d, int) and d % len(shape) >= 2 for d in dims)


def _padded(node: fx.Node, source: Expression) -> Expression | None:
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    widths, shape = given.get("pad"), shape_of(node.all_input_nodes[0])
    if shape is None or not isinstance(widths, (list, tuple)) or not all(isinstance(w, int) for w in widths):
        return None
    positions = 2 * (len(shape) - 2)
    if len(widths) <= positions:
        return source
    before, after, *samples = widths[positions:]
    zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    if not zeros or any(samples) or before < 0 or after < 0:
        return None
    return Padded(node, source.channels + before + after, source, before, after)


__all__ = ["Activated", "Estimates", "Expression", "Joined", "Layer", "Padded", "Predicted", "Source"]
