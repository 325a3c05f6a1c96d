"""convolution  ⇒  the same, with kernels of ours where these are faster than the vendor's

    depthwise, 5 or 7 columns          the gradient of the weight, in one reading of x and of the result's gradient
    3×3, stride 1                      all three passes, with 16 products for every 36 (`normpass.ops.winograd_conv2d`)

On the CPU. Decided when the graph runs, by shape: on a GPU, without kernels or where it does not pay the layer runs
as it is.

Refuses: layers with hooks or parametrisations. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.convolution import convolution_function, convolution_layer, is_depthwise, is_winograd
from normpass.graph import bound, module_of, replace_node
from normpass.kernels.cpu_winograd import FEWEST_CHANNELS

_FUNCTIONS = (F.conv2d, torch.conv2d)


@dataclass(frozen=True)
class ConvolutionKernels:
    name: str = "convolution_kernels"

    def apply(self, graph: fx.Graph, root: nn.Module) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes."""
        names = set()
        for node in list(graph.nodes):
            module = module_of(node, root)
            if module is not None:
                if not _has_kernels(module) or len(node.args) != 1 or node.kwargs:
                    continue
                with graph.inserting_before(node):
                    layer = graph.get_attr(str(node.target))
                    new = graph.call_function(convolution_layer, (layer, *node.args))
            elif _calls_convolution(node):
                with graph.inserting_before(node):
                    new = graph.call_function(convolution_function, node.args, node.kwargs)
            else:
                continue
            names.add(replace_node(graph, node, new).name)
        return names


def _has_kernels(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or reason_to_keep_whole(module) is not None:
        return False
    kernel, stride, groups = module.kernel_size, module.stride, module.groups
    if module.in_channels == module.out_channels and is_depthwise(kernel, stride, groups, module.in_channels):
        return True
    is_wide = min(module.in_channels, module.out_channels) >= FEWEST_CHANNELS
    return is_wide and is_winograd(kernel, stride, groups, module.padding)


def _calls_convolution(node: fx.Node) -> bool:
    """Whether a call of a function may be one: the shapes are looked at when it runs."""
    return node.op == "call_function" and node.target in _FUNCTIONS and bound(convolution_function, node) is not None
