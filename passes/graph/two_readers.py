"""z = act(norm(x) + residual), read twice  ⇒  z, z' = the same, each read once

    backward   dy = (g + g')·act'        g and g' added as they are read, and not by autograd in a pass of its own

A residual join is read by the next block's convolution and by its addition: 2 of 3 array moves of that addition are
saved (`normpass.ops.norm_act_twice`). Who reads which does not matter: g + g' = g' + g, to the bit.

Refuses: a z that does not have two readers through which exactly two gradients come back, that is returned, or that
is written to. Changes nothing, not even rounding.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx

from normpass.analysis.facts import Facts
from normpass.copies.untouched import function_of, tensors_in
from normpass.graph.nodes import inherit
from normpass.kernels import kernels_for
from normpass.runtime.joins import TWICE_JOINED
from normpass.runtime.two_readers import TWICE

_TWICE = TWICE | TWICE_JOINED


@dataclass(frozen=True)
class TwoReaders:
    name: str = "two_readers"

    @staticmethod
    def note(facts: Facts) -> None:
        """Let `facts` know of which results two gradients will be in memory at one time."""
        kernels = kernels_for(facts.device)
        if kernels is None or not kernels.adds_gradients:
            return
        gradients = _gradients(facts)
        for step in facts.steps:
            result, node = facts.results.get(step.node), step.node
            is_read_twice = node.target in TWICE and len(node.users) == 2
            step.gradients_apart = (
                is_read_twice and _is_private(node, facts) and gradients[getattr(result, "grad_fn", None)] == 2
            )

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes."""
        if not any(node.target in _TWICE for node in graph.nodes):
            return set()
        gradients, present = _gradients(facts), set(graph.nodes)
        names = set()
        for node, result in facts.results.items():
            if node not in present or node.target not in _TWICE or len(node.users) != 2:
                continue
            if _is_private(node, facts) and gradients[function_of(result)] == 2:
                names.add(_hand_out_twice(graph, node).name)
        return names


def _gradients(facts: Facts) -> Counter[Any]:
    """Autograd's node -> how many gradients it is given, each by an edge of the graph of one forward."""
    results = tensors_in(list(facts.results.values()))
    waiting = [function for result in results if (function := function_of(result)) is not None]
    found: Counter[Any] = Counter()
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        sources = [source for source, _ in function.next_functions if source is not None]
        found.update(sources)
        waiting += sources
    return found


def _is_private(node: fx.Node, facts: Facts) -> bool:
    """Whether nobody writes to the result of `node`, and nobody outside the graph has it."""
    value = facts.value_of(node)
    return value is not None and value not in facts.outputs | facts.overwritten | facts.unseen


def _hand_out_twice(graph: fx.Graph, node: fx.Node) -> fx.Node:
    readers = list(node.users)
    with graph.inserting_before(node):
        both = graph.call_function(_TWICE[node.target], node.args, node.kwargs)
        inherit(both, node)
        for index, reader in enumerate(readers):
            part = graph.call_function(operator.getitem, (both, index))
            inherit(part, node)
            reader.replace_input_with(node, part)
    graph.erase_node(node)
    return both
