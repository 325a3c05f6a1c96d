"""`torch.compile(model, backend="normpass")`: the sites of a Dynamo graph, rewritten, then an inner backend.

Dynamo hands over one graph of functions with every parameter and buffer as an input: `F.batch_norm` with its
tensors as arguments and `training` as a constant. Its sites are found, matched and rewritten by the very code that
`optimize` uses on a model. What differs is how a rebuilt tensor is not kept:

  * inner `eager` runs the graph as it is, under the saved-tensor hooks of `normpass.recipe`;
  * inner `aot_eager` and `inductor` trace it further, and a partitioner decides what is kept. Every node that
    computes what a recipe would rebuild carries `recompute = MUST_RECOMPUTE`, which AOTAutograd hands on to the
    operators traced from it and which its partitioner obeys. A site becomes two nodes for that: the moments and the
    running statistics, which run once, and the normalisation, which may run again.

A graph that no gradient will go through is handed on as it is: there is nothing to keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import CheckpointPolicy

from normpass import passes, recipe
from normpass.apply import Rewritten, rewrite_graph
from normpass.budget import plan_record, selectable
from normpass.capture import Capture, normalise
from normpass.errors import InvalidInputError
from normpass.functional import finish_norm_act, prepare_norm_act, split_norm_act
from normpass.graph import key_of
from normpass.guard import Guard
from normpass.module import PASSES
from normpass.planner import DEFAULT, Decisions, Plan, make_plan
from normpass.record import record_graph
from normpass.sharing import finish_shared_norm_act, prepare_shared_norm_act, shared_norm_act
from normpass.sites import find_sites
from normpass.step_plan import parse_budget

INNER = ("inductor", "aot_eager", "eager")
_OPTIONS = ("inner", "memory_budget")
_NO_GUARD = Guard((), (), (), (), ())  # Dynamo has its own
_IN_TWO: dict[Any, tuple[Callable, Callable]] = {
    split_norm_act: (prepare_norm_act, finish_norm_act),
    shared_norm_act: (prepare_shared_norm_act, finish_shared_norm_act),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendOptions:
    """The `options` of `torch.compile(…, backend="normpass", options={…})`."""

    inner: str = "inductor"
    """what compiles the rewritten graph, one of INNER"""
    memory_budget: float | str | None = None
    """what may be kept for backward: a fraction of what the plain graph keeps, or bytes ("12GB")"""


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """The backend: compile one graph of Dynamo's. Found by torch under the name "normpass".

    Args:
        mode: as torch.compile's, for inner `inductor` alone (`"reduce-overhead"`, `"max-autotune"`, …).
        options: `inner` (default `"inductor"`) and `memory_budget` (as for `normpass.optimize`).

    Raises:
        InvalidInputError: an option or a value that is not known, or a budget that cannot be kept.
    """
    settings = read_options(options)
    if mode is not None and settings.inner != "inductor":
        raise InvalidInputError(f'`mode="{mode}"` is Inductor\'s: leave it out, or set inner="inductor"')
    will_differentiate = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in example_inputs
    )
    if will_differentiate:
        decisions = _decide(graph_module, example_inputs, settings)
        plan, rewritten = rewrite(graph_module, decisions)
        _log_plan(graph_module, plan, rewritten)
        if settings.inner != "eager":
            _mark_recomputed(graph_module, rewritten, decisions)
    if settings.inner == "eager":
        return _with_recipes(graph_module) if will_differentiate else graph_module.forward
    inner: Any = lookup_backend(settings.inner)
    if mode is None:
        return inner(graph_module, example_inputs)
    return inner(graph_module, example_inputs, config_patches=torch._inductor.list_mode_options(mode))


def read_options(options: Mapping[str, Any] | None) -> BackendOptions:
    """`options` checked.

    Raises:
        InvalidInputError: a name or a value that is not known.
    """
    options = dict(options or {})
    for name in options:
        if name not in _OPTIONS:
            raise InvalidInputError(f'backend "normpass": no option `{name}`; there are {", ".join(_OPTIONS)}')
    settings = BackendOptions(**options)
    if settings.inner not in INNER:
        raise InvalidInputError(
            f'backend "normpass": no inner backend `{settings.inner}`; choose from {", ".join(INNER)}'
        )
    if settings.memory_budget is not None:
        parse_budget(settings.memory_budget, 1)
    return settings


def rewrite(graph_module: fx.GraphModule, decisions: Decisions = DEFAULT) -> tuple[Plan, Rewritten]:
    """Rewrite a graph of Dynamo's in place."""
    graph = graph_module.graph
    normalise(graph, graph_module)
    sites = find_sites(Capture(graph_module, graph, {}, _NO_GUARD))
    plan = make_plan(sites, passes.ORDER, allow_lossy=False, decisions=decisions)
    rewritten = rewrite_graph(graph, graph_module, plan, PASSES, decisions)
    graph_module.recompile()
    return plan, rewritten


def _decide(graph_module: fx.GraphModule, inputs: Sequence[Any], settings: BackendOptions) -> Decisions:
    """What a budget asks for, planned on copies of the graph."""
    if settings.memory_budget is None:
        return DEFAULT
    plain, copied = _copy(graph_module), _copy(graph_module)
    _, rewritten = rewrite(copied)
    records = [record_graph(m, inputs) for m in (plain, copied)]
    possible = selectable(records[1], [("", copied.graph, copied, rewritten.rebuilt)])
    found = plan_record(records[0], records[1], possible, settings.memory_budget)
    _log.info("%s", found)
    return found.decisions


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, over the same modules and tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def _with_recipes(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function that runs under the saved-tensor hooks."""

    def run(*inputs: Any) -> Any:
        with recipe.recording():
            result = graph_module.forward(*inputs)
        if not recipe.is_recording():
            recipe.untag(result)
        return result

    return run


def _mark_recomputed(graph_module: fx.GraphModule, rewritten: Rewritten, decisions: Decisions) -> None:
    """Mark what backward computes again, the sites split so that their moments are not among it.

    A pooling that looks for its maxima again makes its result again as well: that is one operator.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _IN_TWO:
            prepare, finish = _IN_TWO[node.target]
            with graph.inserting_before(node):
                prepared = graph.call_function(prepare, node.args, node.kwargs)
                finished = graph.call_function(finish, (prepared,))
            _mark(finished)
            node.replace_all_uses_with(finished)
            graph.erase_node(node)
        elif node.name in rewritten.rebuilt or key_of(node) in decisions.replayed:
            _mark(node)
    graph_module.recompile()


def _mark(node: fx.Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0  # one region: nothing is kept for being at the border of another


def _log_plan(graph_module: fx.GraphModule, plan: Plan, rewritten: Rewritten) -> None:
    """One line a norm, at level INFO: nothing is skipped silently."""
    for choice in plan.choices:
        reasons = "".join(f"; not {refusal.rewrite}: {refusal.reason}" for refusal in choice.refusals)
        _log.info("%s (%s): %s%s", choice.site.path, choice.site.pattern, choice.rewrite or "left alone", reasons)
    for path, region in graph_module.named_modules():
        if path and isinstance(region, fx.GraphModule):
            count = sum(node.target is F.batch_norm for node in region.graph.nodes)
            _log.info("%s: %d norms left alone, inside a region of its own (checkpoint, cond, …)", path, count)
    _log.info("%d norms, %d other recipes", len(plan.choices), len(rewritten.derived))
