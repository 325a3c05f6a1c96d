"""a switchable norm that has chosen  ⇒  the norm it chose

    SparseSwitchableNorm, chosen = (batch, batch)         ⇒  a batch norm, for the ordinary rewrites
                                   (instance, instance)   ⇒  instance_norm
                                   (layer, layer)         ⇒  layer_norm
                                   (k, l), k ≠ l          ⇒  mixed_norm

The same function: a decided layer has ratios of 0 and 1, so only the chosen moments are computed, in one pass over
x. Made by every `normpass.optimize`, which reads the decisions of the whole model from the device once. A layer of
batch norm needs nothing here: the sites know it as one by what it has chosen.

Behind these nodes, undecided layers and Kalman norms the result of the norm is a recipe over x and its statistics:
x is all that is kept.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.graph import module_of
from normpass.nn.kalman import KALMAN_NORMS, batch_norm_with_estimate
from normpass.nn.switchable import SWITCHABLE_NORMS, instance_norm, layer_norm, mixed_norm

_NODES = {("instance", "instance"): instance_norm, ("layer", "layer"): layer_norm}
_SPECIALISED = (instance_norm, layer_norm, mixed_norm)


@dataclass(frozen=True)
class SpecialiseSwitchable:
    name: str = "specialise_switchable"

    def change_graph(self, graph: fx.Graph, root: nn.Module) -> None:
        """Replace the calls of layers that have chosen anything but batch norm twice."""
        for node in list(graph.nodes):
            module = module_of(node, root)
            if not isinstance(module, SWITCHABLE_NORMS) or module.chosen in (None, ("batch", "batch")):
                continue
            if reason_to_keep_whole(module) is not None or len(node.args) != 1 or node.kwargs:
                continue
            with graph.inserting_before(node):
                norm = graph.get_attr(str(node.target))
                new = graph.call_function(_NODES.get(module.chosen, mixed_norm), (norm, node.args[0]))
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def is_rebuilt_norm(node: fx.Node, root: nn.Module) -> bool:
    """Whether the value of `node` is what a norm of `normpass.nn` tags with its recipe."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        return isinstance(index, int) and index == 0 and isinstance(source, fx.Node) and _gives_estimate(source, root)
    if node.op == "call_function":
        return node.target in _SPECIALISED
    module = module_of(node, root)
    if isinstance(module, KALMAN_NORMS):
        return not _gives_estimate(node, root) and len(node.args) > 1 and node.args[1] is not None
    return isinstance(module, SWITCHABLE_NORMS) and module.chosen is None


def _gives_estimate(node: fx.Node, root: nn.Module) -> bool:
    if node.target is batch_norm_with_estimate:
        return True
    return isinstance(module_of(node, root), KALMAN_NORMS) and len(node.args) == 3 and node.args[2] is True
