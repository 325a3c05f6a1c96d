"""norm → activation → depthwise convolution  ⇒  one kernel, without what stands between them

    y = conv(act(norm(x)))

The norm and the activation are applied to the rows that are convolved, as these are read (BN fission and fusion:
arXiv 1807.01702, with the convolution): z = act(norm(x)) is not written in forward and not rebuilt in backward. On the
CPU, in channels_last; decided when the graph runs, elsewhere both run one after the other and z is rebuilt, or kept if
a plan says so.

Refuses: a z with other readers; one that a residual is added to. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from normpass.convolution import convolution_layer, is_depthwise, norm_act_convolution
from normpass.functional import fused_norm_act, split_norm_act
from normpass.graph import called_on, replace_node

_NORMS = (split_norm_act, fused_norm_act)


@dataclass(frozen=True)
class FuseNormConvolution:
    name: str = "fuse_norm_convolution"

    def apply(self, graph: fx.Graph, root: nn.Module) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes."""
        names = set()
        for node in list(graph.nodes):
            norm = node.args[1] if node.target is convolution_layer else None
            if not isinstance(norm, fx.Node) or norm.target not in _NORMS or list(norm.users) != [node]:
                continue
            x, residual, *activation = norm.args[1:5]
            if residual is not None or not _is_depthwise(root.get_submodule(str(node.args[0].target))):
                continue
            with graph.inserting_before(node):
                function = called_on(norm_act_convolution, norm.target)
                new = graph.call_function(function, (norm.args[0], node.args[0], x, *activation))
            names.add(replace_node(graph, node, new).name)
            graph.erase_node(norm)
        return names


def _is_depthwise(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return is_depthwise(layer.kernel_size, layer.stride, layer.groups, layer.in_channels)
