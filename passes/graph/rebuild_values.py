"""a step whose result need not be kept  ⇒  the same step, with a note of how its result is made again

    z = f(x, …)          z is a recipe over x, which is kept or a recipe itself (`normpass.recipe.recipes`)
    f_(y, …)             in place: the new content of y is a recipe over the old one
    y = max_pool(z)      backward finds the maxima again: no indices are kept

Which steps is not decided here: a minimum cut (`normpass.analysis.minimum_cut`) or a plan within a budget says which
values are made again. Behind DenseNet's concatenations, U-Net's skips, squeeze-and-excite products, residual joins,
norms that have no kernel of ours and activations in place stand the same few lines. Running statistics never move
again: a norm that would move them is called without. Changes nothing, not even rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normpass.analysis.facts import Facts, Step
from normpass.graph.nodes import called_on, function_of, name_of, replace_node
from normpass.graph.operators import MAX_POOLS
from normpass.recipe.notes import Copies, call_kept, call_rebuilt, call_rebuilt_in_place, tag, unread
from normpass.recipe.replay import call_replayed
from normpass.runtime.functional import batch_norm
from normpass.runtime.sharing import WITHOUT_RECIPE

MADE_AGAIN = "normpass_made_again"
"""in the meta of a node whose result is made again: the values that it makes"""


@dataclass(frozen=True)
class RebuildValues:
    again: Collection[int]
    """the values that are made again"""
    replayed: Collection[str]
    """keys of the poolings that look for their maxima again"""
    itself: Collection[Any]
    """functions that note their results themselves"""
    name: str = "rebuild_values"

    def apply(self, graph: fx.Graph, facts: Facts) -> dict[str, str]:
        """Rewrite `graph` in place; name -> function, of the nodes whose results are made again."""
        again = self.again
        chosen = [(step, _function(step, facts, again, self.replayed, self.itself)) for step in facts.steps]
        names: dict[str, str] = {}
        for step, function in chosen:  # only now: the facts are about the nodes that there were
            node, is_again = step.node, any(v in again for v in step.makes)
            if function is not None and node.target in WITHOUT_RECIPE:
                node.target = function
            elif function is not None:
                node = _call(graph, node, function)
            if is_again:
                names[node.name] = name_of(step.target)
                node.meta[MADE_AGAIN] = step.makes
        return names


def _function(
    step: Step, facts: Facts, again: Collection[int], replayed: Collection[str], itself: Collection[Any]
) -> Callable | None:
    """What is called in the place of what `step` calls; None for the very same."""
    is_again = any(v in again for v in step.makes)
    if step.target in itself:
        return None if is_again else WITHOUT_RECIPE.get(step.target) or called_on(call_kept, step.target)
    if step.key in replayed and can_be_replayed(step):
        return _replayed(function_of(step.node), is_again)
    return _rebuilt(step, facts) if is_again else None


def can_be_replayed(step: Step) -> bool:
    """Whether a step keeps indices that backward can find again."""
    return step.target in MAX_POOLS and step.internals > 0 and not step.node.kwargs.get("return_indices", False)


def _rebuilt(step: Step, facts: Facts) -> Callable:
    node, function, copies = step.node, function_of(step.node), _copies(step.node, facts)
    if set(step.writes) & set(step.reads_outside):  # only norms may
        return _AGAIN[step.target]
    inside = set(step.writes) - set(step.reads_outside)
    if inside:
        return _in_place(function, next(i for i, a in enumerate(node.args) if _lies_in(a, inside, facts)), copies)
    return _again(function, copies)


def _lies_in(argument: Any, storages: set[int], facts: Facts) -> bool:
    return isinstance(argument, fx.Node) and not storages.isdisjoint(facts.storages.get(argument, ()))


def _copies(node: fx.Node, facts: Facts) -> Copies:
    given = [*enumerate(node.args), *node.kwargs.items()]
    lists = [(key, i, item) for key, a in given if isinstance(a, (list, tuple)) for i, item in enumerate(a)]
    there = [(key, None, argument) for key, argument in given] + lists
    return tuple((key, index) for key, index, argument in there if _is_copied(argument, facts))


def _is_copied(argument: Any, facts: Facts) -> bool:
    """Whether an argument lies in a small input of the graph that autograd does not keep."""
    if not isinstance(argument, fx.Node):
        return False
    mine = facts.storages.get(argument, frozenset())
    return bool(mine) and mine <= facts.small_outside.keys() and not mine <= facts.saved_outside


def _call(graph: fx.Graph, node: fx.Node, function: Callable) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(function, node.args, node.kwargs)
    return replace_node(graph, node, new)


def _again(function: Callable, copies: Copies) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return call_rebuilt(function, copies, *args, **kwargs)

    call.__name__ = f"rebuilt_{name_of(function)}"
    return call


def _replayed(function: Callable, is_rebuilt: bool) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return call_replayed(function, *args, is_rebuilt=is_rebuilt, **kwargs)

    call.__name__ = f"replayed_{name_of(function)}"
    return call


def _in_place(function: Callable, position: int, copies: Copies) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return call_rebuilt_in_place(function, position, copies, *args, **kwargs)

    call.__name__ = f"rebuilt_{name_of(function)}"
    return call


# --- norms whose running statistics move once -------------------------------------------------------


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    tag(y, F.batch_norm, (input, None, None, weight, bias, True, momentum, eps))
    return y


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    tag(y, F.instance_norm, (input, None, None, weight, bias, True, momentum, eps))
    return y


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    with unread(running_mean, running_var):
        y = torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    tag(y, torch.batch_norm, (input, weight, bias, None, None, True, momentum, eps, cudnn_enabled))
    return y


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    y = torch.instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
    )
    tag(y, torch.instance_norm, (input, weight, bias, None, None, True, momentum, eps, cudnn_enabled))
    return y


_AGAIN: dict[Any, Callable] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
}
"""norms that move running statistics (`MOVES_STATISTICS`) -> the same; backward calls them without those"""

__all__ = ["RebuildValues", "can_be_replayed"]
