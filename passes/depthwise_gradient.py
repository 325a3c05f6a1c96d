"""depthwise convolution  ⇒  the same, with a kernel of ours for its weight's gradient

    forward, and the gradient of x     the vendor's, as before
    the gradient of the weight         one reading of x and of the result's gradient

For kernels of 5 or 7 in width and strides of 1 or 2, on the CPU (`normpass.ops.depthwise_conv2d` has the reason).
Decided when the graph runs: on a GPU or without kernels the layer runs as it is.

Refuses: layers with hooks or parametrisations. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.convolution import depthwise_function, depthwise_layer, has_kernel
from normpass.graph import bound, module_of, replace_node

_FUNCTIONS = (F.conv2d, torch.conv2d)


@dataclass(frozen=True)
class DepthwiseGradient:
    name: str = "depthwise_gradient"

    def apply(self, graph: fx.Graph, root: nn.Module) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes."""
        names = set()
        for node in list(graph.nodes):
            module = module_of(node, root)
            if module is not None:
                if not _is_depthwise(module) or len(node.args) != 1 or node.kwargs:
                    continue
                with graph.inserting_before(node):
                    layer = graph.get_attr(str(node.target))
                    new = graph.call_function(depthwise_layer, (layer, *node.args))
            elif _calls_depthwise(node):
                with graph.inserting_before(node):
                    new = graph.call_function(depthwise_function, node.args, node.kwargs)
            else:
                continue
            names.add(replace_node(graph, node, new).name)
        return names


def _is_depthwise(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or reason_to_keep_whole(module) is not None:
        return False
    is_one_each = module.in_channels == module.out_channels
    return is_one_each and has_kernel(module.kernel_size, module.stride, module.groups, module.in_channels)


def _calls_depthwise(node: fx.Node) -> bool:
    """Whether a call of a function may be one: the shapes are looked at when it runs."""
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return False
    arguments = bound(depthwise_function, node)
    return arguments is not None and isinstance(arguments["groups"], int) and arguments["groups"] > 1
