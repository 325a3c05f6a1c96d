"""a convolution (or linear layer, pooling) whose result backward reads  ⇒  run again in backward

    x = conv(z)                 x is a recipe over z, which is rebuilt or kept: x is not kept
    y = max_pool(z)             backward finds the maxima again: no indices are kept

With it a recipe may reach back over any number of layers, to the nearest kept tensors. What a norm behind x needs are
the mean and variance of forward, which its own recipe holds: running statistics move once, in forward, and no random
number is drawn again (dropout is never run again).

Made only where a plan asks for it: it costs a convolution's time. Refuses: layers with hooks or parametrisations, a
result or an argument that is changed in place later, what is not one of the layers named here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.convolution import convolution_function, convolution_layer
from normpass.graph import Storage, key_of, module_of, owns_result, replace_node
from normpass.recipe import derived, derived_function
from normpass.replay import replayed, replayed_function

_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_FUNCTIONS = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.conv_transpose2d, F.linear}
    | {F.avg_pool2d, F.adaptive_avg_pool2d, convolution_layer, convolution_function}
)
_POOLS = frozenset({F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d})


@dataclass(frozen=True)
class Regions:
    """Keys of the nodes of one graph that may be run again."""

    rebuildable: frozenset[str] = frozenset()
    """their results need not be kept"""
    replayable: frozenset[str] = frozenset()
    """what they keep for themselves need not be kept"""


@dataclass(frozen=True)
class RecomputeRegion:
    name: str = "recompute_region"

    def match(self, graph: fx.Graph, root: nn.Module) -> Regions:
        """What may be asked for in `apply`."""
        storage = Storage(graph, root)
        found: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            found.setdefault(key_of(node), []).append(node)
        allowed = {
            key: nodes[0] for key, nodes in found.items() if len(nodes) == 1 and _may_run_again(nodes[0], storage, root)
        }
        pools = {key for key, node in allowed.items() if _is_max_pool(node, root)}
        return Regions(frozenset(allowed), frozenset(pools))

    def apply(self, graph: fx.Graph, root: nn.Module, rebuilt: frozenset[str], replay: frozenset[str]) -> set[str]:
        """Rewrite the nodes with these keys; the names of those whose results are rebuilt."""
        regions, names = self.match(graph, root), set()
        for node in list(graph.nodes):
            key = key_of(node)
            is_rebuilt, is_replayed = key in rebuilt & regions.rebuildable, key in replay & regions.replayable
            if not is_rebuilt and not is_replayed:
                continue
            new = _replace(graph, node, is_rebuilt, is_replayed)
            if is_rebuilt:
                names.add(new.name)
        return names


def _may_run_again(node: fx.Node, storage: Storage, root: nn.Module) -> bool:
    module = module_of(node, root)
    if module is not None and (not isinstance(module, _MODULES) or reason_to_keep_whole(module) is not None):
        return False
    if module is None and (node.op != "call_function" or node.target not in _FUNCTIONS | _POOLS):
        return False
    if getattr(module, "return_indices", False) or node.kwargs.get("return_indices"):
        return False
    if not owns_result(node, root, _FUNCTIONS | _POOLS):
        return False
    return all(storage.writer_after(n, node) is None for n in (node, *node.all_input_nodes))


def _is_max_pool(node: fx.Node, root: nn.Module) -> bool:
    return node.target in _POOLS or isinstance(module_of(node, root), nn.modules.pooling._MaxPoolNd)


def _replace(graph: fx.Graph, node: fx.Node, is_rebuilt: bool, is_replayed: bool) -> fx.Node:
    with graph.inserting_before(node):
        if node.op == "call_module":
            function = replayed if is_replayed else derived
            args = (graph.get_attr(str(node.target)), *node.args)
        else:
            function = replayed_function(node.target) if is_replayed else derived_function(node.target)
            args = node.args
        kwargs = {**node.kwargs, "is_rebuilt": is_rebuilt} if is_replayed else node.kwargs
        new = graph.call_function(function, args, kwargs)
    return replace_node(graph, node, new)
