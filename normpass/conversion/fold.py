"""conv → norm, in eval mode  ⇒  one convolution

    y = a·(W∗x + b − mean) + bias = (a·W)∗x + (a·(b − mean) + bias)      a = weight / sqrt(var + eps)

with running statistics, per output channel (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Works on the graph
of an exported program, whose weights are constants: any producer whose output channels are linear in its weight
(convolutions, transposed ones, a linear layer of vectors). The arithmetic is float64, rounded once to the weight's
dtype.

Refuses: a norm that normalizes with the batch's own statistics, whose producer is none of these or has other
readers, or whose tensors are computed from the input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default}
    | {_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding}
)
_TRANSPOSED = frozenset({_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input})
_GROUPS = 6  # position of `groups` among a transposed convolution's arguments
_DROPOUTS = frozenset({_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default})


@dataclass(frozen=True)
class Folded:
    """What became of the norms of one graph, by the names of their nodes."""

    folded: tuple[str, ...]
    left: dict[str, str]
    """name -> why it stays a norm"""


def fold_batch_norms(graph_module: fx.GraphModule) -> Folded:
    """Fold every norm that follows a convolution into it, in place.

    Args:
        graph_module: of `torch.export`, its parameters as `get_attr` nodes, in eval mode.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _DROPOUTS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    constants = Constants(graph_module)
    folded, left = [], {}
    for node in list(graph.nodes):
        if node.target is not _aten.batch_norm.default:
            continue
        reason = _fold(graph_module, constants, node)
        if reason is None:
            folded.append(node.name)
        else:
            left[node.name] = reason
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return Folded(tuple(folded), left)


class Constants:
    """The values of the nodes of a graph that no input reaches."""

    def __init__(self, graph_module: fx.GraphModule):
        self.root = graph_module
        self.known: dict[fx.Node, bool] = {}
        for node in graph_module.graph.nodes:
            self.known[node] = node.op == "get_attr" or (
                node.op == "call_function" and all(self.known[n] for n in node.all_input_nodes)
            )

    def is_constant(self, node: fx.Node | None) -> bool:
        return node is None or self.known.get(node, False)

    def value(self, node: fx.Node | None) -> Tensor | None:
        """The tensor of a constant node; None for None."""
        if node is None:
            return None
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        function: Callable = node.target  # type: ignore[assignment]
        with torch.no_grad():
            return function(*args, **kwargs)

    def set(self, node: fx.Node, name: str, value: Tensor) -> fx.Node:
        """A new constant in front of `node`."""
        self.root.register_buffer(name, value)
        with self.root.graph.inserting_before(node):
            made = self.root.graph.get_attr(name)
        made.meta["val"] = value
        self.known[made] = True
        return made


def _fold(graph_module: fx.GraphModule, constants: Constants, norm: fx.Node) -> str | None:
    """Fold one norm; why not, if it cannot be."""
    x, weight, bias, mean, var, training, _, eps, *_ = cast(Any, norm.args)
    if training or mean is None or var is None:
        return "it normalizes with the statistics of the batch"
    if not all(constants.is_constant(n) for n in (weight, bias, mean, var)):
        return "its tensors are computed from the input"
    axis = _channel_axis(x)
    if axis is None:
        return f"it follows `{x.name}`, which has no weight to fold into"
    if len(x.users) != 1:
        return f"the result of `{x.name}` is read by others too"
    kernel, shift = x.args[1], x.args[2] if len(x.args) > 2 else None
    if not (constants.is_constant(kernel) and constants.is_constant(shift)):
        return f"the weight of `{x.name}` is computed from the input"
    scale, offset = _affine([constants.value(n) for n in (weight, bias, mean, var)], eps)
    old, old_shift = cast(Tensor, constants.value(kernel)), constants.value(shift)
    groups = x.args[_GROUPS] if x.target in _TRANSPOSED and len(x.args) > _GROUPS else 1
    new = old.double() * _per_output(scale, old, axis, groups)
    new_shift = offset if old_shift is None else old_shift.double() * scale + offset
    made = constants.set(x, f"{norm.name}_folded_weight", new.to(old.dtype))
    made_shift = constants.set(x, f"{norm.name}_folded_bias", new_shift.to(old.dtype))
    x.args = (x.args[0], made, made_shift, *x.args[3:])
    norm.replace_all_uses_with(x)
    graph_module.graph.erase_node(norm)
    return None


def _channel_axis(node: fx.Node) -> int | None:
    """Which axis of a producer's weight counts its output channels; None if it is no such producer."""
    if node.target in _CONVOLUTIONS:
        return 0
    if node.target in _TRANSPOSED:
        return 1
    is_of_vectors = node.target is _aten.linear.default and node.meta["val"].dim() == 2
    return 0 if is_of_vectors else None


def _affine(tensors: Sequence[Any], eps: float) -> tuple[Tensor, Tensor]:
    """a and bias − a·mean of y = a·(x − mean) + bias, float64, from weight, bias, mean and var."""
    weight, bias, mean, var = tensors
    scale = torch.rsqrt(var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    offset = -mean.double() * scale
    return scale, offset if bias is None else offset + bias.double()


def _per_output(scale: Tensor, weight: Tensor, axis: int, groups: int) -> Tensor:
    """`scale`, one value an output channel, in a shape that multiplies `weight`."""
    if axis == 0:
        return scale.view(-1, *[1] * (weight.dim() - 1))
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    by_group = scale.view(groups, 1, outputs).expand(groups, inputs, outputs)
    return by_group.reshape(groups * inputs, outputs, *[1] * (weight.dim() - 2))
