"""Graphs as TorchDynamo makes them, and models that run with graphs changed by option objects of `changes=`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from normpass.graph.nodes import give_keys
from normpass.nn import register_with_dynamo

Captured = tuple[fx.GraphModule, list[Any]]


def dynamo_graphs(function: Callable, *inputs: Any) -> list[fx.Graph]:
    """The graphs of one call of `function`, which may be a module."""
    found: list[fx.Graph] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list) -> Callable:
        found.append(graph_module.graph)
        return graph_module.forward

    _compiled(function, backend)(*inputs)
    return found


def dynamo_graph(function: Callable, *inputs: Any) -> fx.Graph:
    """The one graph of a call of `function`."""
    (graph,) = dynamo_graphs(function, *inputs)
    return graph


def with_changes(model: nn.Module, *changes: Any, compiler: str = "eager") -> tuple[nn.Module, Callable]:
    """A copy of `model` with other layers, and how it is called with other graphs; `model` is left as it is.

    `compiler` gets the changed graphs, none of which may have been broken off unless it is "eager".
    """
    changed = copy.deepcopy(model)
    for change in changes:
        change.change_modules(changed)

    def backend(graph_module: fx.GraphModule, example_inputs: list) -> Any:
        for change in changes:
            change.change_graph(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        return torch._dynamo.lookup_backend(compiler)(graph_module, example_inputs)

    return changed, _compiled(changed, backend, fullgraph=compiler != "eager")


def captured(function: Callable, *inputs: Any) -> Captured:
    """The one graph of a call, with its inputs."""
    found: list[Captured] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        give_keys(graph_module.graph)
        found.append((graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(lambda *args: function(*args), backend=backend)(*inputs)
    (only,) = found
    return only


def targets(graph: fx.Graph) -> list[Any]:
    """What the nodes of `graph` call."""
    return [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]


def _compiled(function: Callable, backend: Callable, fullgraph: bool = False) -> Callable:
    register_with_dynamo()
    torch._dynamo.reset()
    return torch.compile(lambda *args: function(*args), backend=backend, fullgraph=fullgraph)
