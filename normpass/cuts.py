"""What every node of a graph returns, by shape, and the values through which everything must pass.

A *cut* is a node on every path from the inputs to the output: a dominator of the output. Between two successive cuts
lies a part of the graph with one input and one output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Shapes = Mapping[fx.Node, Any]
"""What every node returns, as tensors without memory."""


def shapes_of(graph: fx.Graph, root: nn.Module, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Run the graph on the shapes and dtypes of `inputs`: no memory, and nothing of `root` changes.

    Args:
        inputs: one tensor for each placeholder, on any device (`meta` takes no memory).
    """
    mode = FakeTensorMode()
    tensors = [*root.parameters(), *root.buffers()]
    memo: dict[int, Any] = {
        id(t): mode.from_tensor(t) for t in tensors
    }  # counters and running statistics must not move
    interpreter = _Recording(fx.GraphModule(copy.deepcopy(root, memo), graph))
    device = tensors[0].device if tensors else None
    with mode, torch.no_grad():
        interpreter.run(*(torch.empty(t.shape, dtype=t.dtype, device=device or t.device) for t in inputs))
    by_name = {node.name: value for node, value in interpreter.values.items()}
    return {node: by_name[node.name] for node in graph.nodes if node.name in by_name}


class _Recording(fx.Interpreter):
    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n] = result
        return result


def variable_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes between inputs and output that depend on an input and are needed for the output, in order."""
    depends: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in needed for user in node.users):
            needed.add(node)
    return [n for n in graph.nodes if n in depends and n in needed and n.op != "output"]


def cuts_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes through which every path from the inputs to the output leads, in order: the output's dominators."""
    nodes = variable_nodes(graph)
    known = set(nodes)
    flow = nx.DiGraph()
    for node in nodes:
        if node.op == "placeholder":
            flow.add_edge("inputs", node)
        ends = {
            user: user if user in known else "output" for user in node.users if user in known or user.op == "output"
        }
        flow.add_edges_from((node, end) for end in ends.values())
    if "output" not in flow:
        return []
    dominators = nx.immediate_dominators(flow, "inputs")
    cuts, at = [], dominators["output"]
    while at != "inputs":
        cuts.append(at)
        at = dominators[at]
    return cuts[::-1]
