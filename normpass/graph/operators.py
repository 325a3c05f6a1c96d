"""The operators that the library knows by name: norms, additions, concatenations, producers.

One table for all: whoever recognizes something in a graph asks here. What aliases, writes or saves is in no table:
see `normpass.analysis.facts`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normpass.graph.nodes import bound, name_of

BATCH_NORM = frozenset({F.batch_norm, torch.batch_norm})
NORMS: dict[Any, str] = {
    F.batch_norm: "batch_norm",
    torch.batch_norm: "batch_norm",
    F.instance_norm: "instance_norm",
    torch.instance_norm: "instance_norm",
    F.group_norm: "group_norm",
    torch.group_norm: "group_norm",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
    F.local_response_norm: "local_response_norm",
}
CAT = frozenset({torch.cat, torch.concat, torch.concatenate})
CONVOLUTIONS = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
    | {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
    | {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
)
LINEAR = frozenset({F.linear})
MAX_POOLS = frozenset({F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d})
AVERAGE_POOLS = frozenset(
    {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
    | {torch.adaptive_avg_pool1d}
)
_POOLS_WITH_STRIDE = MAX_POOLS | {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}

# Dear or small: what they make is kept, unless a budget asks for it. (What multiplies matrices, draws random numbers
# or belongs to an unknown library need not be named.)
_PRODUCERS = frozenset(
    "mean sum nansum amax amin max min prod norm std var std_mean var_mean logsumexp cumsum cumprod cummax cummin "
    "sort argsort topk kthvalue median mode unique bincount histc unfold fold grid_sample ctc_loss cdist "
    "scaled_dot_product_attention multi_head_attention_forward rnn_tanh lstm gru einsum bilinear embedding "
    "embedding_bag cross_entropy nll_loss mse_loss roll convolution_function run_checkpoint".split()
)

MOVES_STATISTICS = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})
"""norms that write to running statistics, if they have any"""


def _each(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


KINDS: dict[str, str] = {
    **_each("weighted", "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear"),
    **_each("norm", "batch_norm group_norm layer_norm instance_norm"),
    **_each("one bit", "relu relu6 leaky_relu hardtanh dropout dropout1d dropout2d dropout3d alpha_dropout"),
    **_each("one bit", "hardshrink softshrink threshold"),
    **_each("activation", "elu selu celu silu gelu hardswish hardsigmoid sigmoid tanh softplus mish rrelu log_sigmoid"),
    **_each("activation", "softsign tanhshrink"),
    **_each("sum", "add iadd sub isub"),
    **_each("product", "mul imul div truediv itruediv"),
    **_each("elementwise", "neg clamp exp square sqrt abs contiguous"),
    **_each("max pool", "max_pool1d max_pool2d max_pool3d"),
    **_each("max pool", "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_each("average", "avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d"),
    **_each("average", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_each("mean", "mean flatten permute"),
    **_each("cat", "cat concat concatenate"),
    **_each("other", "prelu softmax log_softmax glu pad interpolate pixel_shuffle pixel_unshuffle channel_shuffle"),
}
"""operations of torch by name, functions and methods: what they move and keep, for `normpass.serialize`"""

# --- additions and the like -------------------------------------------------------------------------


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def is_add(node: fx.Node) -> bool:
    """Whether `node` adds two values of the graph, nothing else (no `alpha`, no number)."""
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return False
    return all(isinstance(a, fx.Node) for a in node.args)


def other_operand(add: fx.Node, operand: fx.Node) -> fx.Node:
    """The operand of the addition that is not `operand` (itself, where both are)."""
    first, second = add.args
    other = second if first is operand else first
    assert isinstance(other, fx.Node)  # `is_add` has looked
    return other


def sums_in_place(add: fx.Node) -> bool:
    """Whether the result of an addition has its first operand's dtype, as `a += b` has."""
    return add.target in (operator.iadd, "add_")


# --- producers --------------------------------------------------------------------------------------


def is_producer(node: fx.Node) -> bool:
    """Whether what `node` makes is kept rather than made again, where no budget is named; by its name alone."""
    name = name_of(node.target).removesuffix("_")
    if "pool" in name:
        return strides_of_pool(node) != {1}
    return name in _PRODUCERS or node.target in CONVOLUTIONS or node.target in LINEAR


def strides_of_pool(node: fx.Node) -> set[Any]:
    """The strides of a pooling; its kernel size where no stride is given; none where it also returns indices."""
    if node.target not in _POOLS_WITH_STRIDE or node.kwargs.get("return_indices", False):
        return set()
    kernel = node.kwargs.get("kernel_size", node.args[1] if len(node.args) > 1 else None)
    stride = node.kwargs.get("stride", node.args[2] if len(node.args) > 2 else None)
    if stride is None or stride == []:
        stride = kernel
    values = set(stride) if isinstance(stride, (tuple, list)) else {stride}
    return set() if any(isinstance(v, fx.Node) for v in values) else values


def producer_name(node: fx.Node) -> str:
    """What a report calls the maker of a norm's input: `conv2d`, `cat`, `input`."""
    return "input" if node.op == "placeholder" else name_of(node.target)


__all__ = [
    "AVERAGE_POOLS",
    "BATCH_NORM",
    "CAT",
    "CONVOLUTIONS",
    "KINDS",
    "LINEAR",
    "MAX_POOLS",
    "MOVES_STATISTICS",
    "NORMS",
    "bound",
    "is_add",
    "is_producer",
    "other_operand",
    "producer_name",
    "strides_of_pool",
    "sums_in_place",
]
