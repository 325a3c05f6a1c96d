"""a step whose result is made again in backward  ⇒  the same step, whose recipe knows how long its result lives

Which results are made for each reader anew, and which recipes let go of what they are made from, is decided by
`normpass.analysis.lifetimes`. Changes when memory is freed, and no number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from normpass.analysis.lifetimes import Lifetimes
from normpass.graph.nodes import function_of, name_of
from normpass.passes.graph.rebuild_values import MADE_AGAIN
from normpass.recipe.notes import call_released


@dataclass(frozen=True)
class ReleaseValues:
    lifetimes: Lifetimes
    name: str = "release_values"

    def apply(self, graph: fx.Graph) -> None:
        """Rewrite `graph` in place. The last of the passes: the others look for what is called."""
        for node in graph.nodes:
            makes = node.meta.get(MADE_AGAIN, ())
            apart, let_go = (not v.isdisjoint(makes) for v in (self.lifetimes.made_apart, self.lifetimes.let_go))
            if apart or let_go:
                node.target, node.op = _released(function_of(node), apart, let_go), "call_function"


def _released(function: Callable, made_apart: bool, lets_go: bool) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return call_released(function, made_apart, lets_go, *args, **kwargs)

    call.__name__ = f"released_{name_of(function)}"
    return call
