"""convolution  ⇒  the same, with kernels of ours where these are faster than the vendor's

    depthwise, 3, 5 or 7 columns       the gradient of the weight, in one reading of x and of the result's gradient
    3×3, stride 1                      all three passes, with 16 products for every 36 (`normpass.ops.winograd_conv2d`)

On the CPU. Decided when the graph runs, by shape: on a GPU, without kernels or where it does not pay torch's runs. So
it does where Winograd's would be less exact, decided by the values. `optimize(winograd=False)` leaves 3×3 as they are.

Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normpass.analysis.facts import Facts
from normpass.graph.nodes import bound, replace_node
from normpass.kernels.contract import WINOGRAD_CHANNELS
from normpass.runtime.convolution import convolution_function, is_depthwise, is_winograd, runs_depthwise, runs_winograd

_FUNCTIONS = (F.conv2d, torch.conv2d)


@dataclass(frozen=True)
class ConvolutionKernels:
    winograd: bool = True
    """those of 3×3 as well"""
    name: str = "convolution_kernels"

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes, which run kernels of ours where that pays."""
        names = set()
        for node in list(graph.nodes):
            arguments = bound(convolution_function, node) if node.target in _FUNCTIONS else None
            if arguments is None or not _has_kernels(arguments, facts.results.get(arguments["weight"]), self.winograd):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(convolution_function, node.args, node.kwargs)
            names.add(replace_node(graph, node, new).name)
        return names

    @staticmethod
    def running(facts: Facts) -> frozenset[str]:
        """The names of those that run kernels of ours, at the shapes and dtypes of the facts."""
        calls = [step.node for step in facts.steps if step.target is convolution_function]
        given = {node.name: _arguments(node, facts) for node in calls}
        return frozenset(n for n, (a, k) in given.items() if runs_winograd(*a, **k) or runs_depthwise(*a, **k))

    @staticmethod
    def note_scratch(facts: Facts) -> None:
        """Unlike the vendor's, our kernels for 3×3 take no copies of their arguments in backward."""
        for step in facts.steps:
            if step.target is not convolution_function:
                continue
            args, kwargs = _arguments(step.node, facts)
            if runs_winograd(*args, **kwargs):
                step.scratch = step.weights


def _arguments(node: fx.Node, facts: Facts) -> tuple[Any, Any]:
    """Those of a call, without memory."""
    given: Any = (node.args, node.kwargs)
    found: Any = fx.node.map_arg(given, facts.results.__getitem__)
    return found


def _has_kernels(arguments: dict[str, Any], weight: Any, winograd: bool) -> bool:
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return False
    stride, groups, padding = (arguments[name] for name in ("stride", "groups", "padding"))
    outputs, inputs, *kernel = weight.shape
    if is_depthwise(kernel, stride, groups, outputs) and inputs == 1:
        return True
    return winograd and min(inputs, outputs) >= WINOGRAD_CHANNELS and is_winograd(kernel, stride, groups, padding)
