"""`torch.compile(model, backend="normpass")`: the pipeline of `optimize` on a graph of Dynamo's, then an inner backend.

Dynamo hands over one graph of functions with every parameter and buffer as an input; `normpass.pipeline` rewrites it.
What differs from `optimize` is how a rebuilt tensor is not kept:

  * inner `eager` runs the graph as it is, under the saved-tensor hooks of `normpass.recipe.notes`, as `optimize` does;
  * inner `aot_eager` and `inductor` trace it further, and a partitioner decides what is kept. Every node that
    computes what a recipe would rebuild carries `recompute = MUST_RECOMPUTE`, which AOTAutograd hands on to the
    operators traced from it and which its partitioner obeys. A site becomes two nodes for that: the moments and the
    running statistics, which run once, and the normalization, which may run again.

With inner `inductor` on CUDA a site is plain operators, which Inductor fuses with what stands around it; elsewhere, and
with `kernels=True`, it is our op with our kernels.

A graph that no gradient will go through is handed on as it is: there is nothing to keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import CheckpointPolicy

from normpass.analysis.facts import Step
from normpass.budget.planning import plan_graphs
from normpass.budget.step_plan import parse_budget
from normpass.capture import sync_norm
from normpass.capture.dynamo import is_raising
from normpass.errors import InvalidInputError
from normpass.graph.nodes import copy_graph
from normpass.measure import counted
from normpass.optimized import with_recipes
from normpass.passes.graph.normal_form import (
    dropout,
    finish_dropout,
    prepare_dropout,
    run_checkpoint,
    run_custom_function,
)
from normpass.pipeline import NOTES_ITSELF, Request, Rewritten, decide_again, note_recipes, rewrite, will_differentiate
from normpass.report.explain import graph_rows
from normpass.runtime.functional import (
    finish_norm_act,
    fused_norm_act,
    plain_norm_act,
    prepare_norm_act,
    split_norm_act,
)
from normpass.runtime.plain_sites import finish_plain, prepare_plain
from normpass.runtime.sharing import finish_shared_norm_act, prepare_shared_norm_act, shared_norm_act

INNER = ("inductor", "aot_eager", "eager")
_OPTIONS = ("inner", "memory_budget", "winograd", "kernels")
_IN_TWO: dict[Any, tuple[Callable, Callable]] = {
    split_norm_act: (prepare_norm_act, finish_norm_act),
    shared_norm_act: (prepare_shared_norm_act, finish_shared_norm_act),
    dropout: (prepare_dropout, finish_dropout),
}
_PLAIN: dict[Any, Callable] = {split_norm_act: plain_norm_act, fused_norm_act: plain_norm_act}
_PLAIN_IN_TWO: dict[Any, tuple[Callable, Callable]] = _IN_TWO | {split_norm_act: (prepare_plain, finish_plain)}
_REGIONS: dict[Any, Any] = {
    run_checkpoint: torch.ops.higher_order.tag_activation_checkpoint,
    run_custom_function: torch.ops.higher_order.autograd_function_apply,
}
"""what runs a region in eager mode -> the operator that a compiler knows"""
_log = logging.getLogger(__name__)
sync_norm.register()  # torch imports this file when it is told the backend's name, and asks again once it has a graph


@dataclass(frozen=True)
class BackendOptions:
    """The `options` of `torch.compile(…, backend="normpass", options={…})`."""

    inner: str = "inductor"
    """what compiles the rewritten graph, one of INNER"""
    memory_budget: float | str | None = None
    """what may be kept for backward: a fraction of what the plain graph keeps, or bytes ("12GB")"""
    winograd: bool = True
    """whether 3×3 convolutions may run as Winograd's on a CPU"""
    kernels: bool | None = None
    """whether norms run as kernels of ours, and not as plain operators; None: not for Inductor on CUDA"""


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
        options: `inner` (default `"inductor"`), `memory_budget` and `winograd` (as for `normpass.optimize`), `kernels`.

    Raises:
        InvalidInputError: an option or a value that is not known, or a budget that cannot be kept.
    """
    settings = read_options(options)
    if mode is not None and settings.inner != "inductor":
        raise InvalidInputError(f'`mode="{mode}"` is Inductor\'s: leave it out, or set inner="inductor"')
    trains = will_differentiate(example_inputs)
    if trains:
        graph_module = _rewritten(graph_module, example_inputs, settings)
    if settings.inner == "eager":
        return with_recipes(graph_module) if trains else graph_module.forward
    inner: Any = lookup_backend(settings.inner)
    if mode is None:
        return inner(graph_module, example_inputs)
    return inner(graph_module, example_inputs, config_patches=torch._inductor.list_mode_options(mode))


def _rewritten(graph_module: fx.GraphModule, inputs: Sequence[Any], settings: BackendOptions) -> fx.GraphModule:
    """What the inner backend gets; the graph as it is where it cannot be rewritten."""
    plain = copy_graph(graph_module)
    request = Request(winograd=settings.winograd, is_compiled=settings.inner != "eager")
    try:
        found = rewrite(graph_module, inputs, request)
    except Exception as error:
        if is_raising():
            raise
        _log.warning("a graph of %d nodes runs as it is: %s: %s", len(plain.graph.nodes), type(error).__name__, error)
        return plain
    if settings.memory_budget is not None:
        step = plan_graphs([found], settings.memory_budget)
        _log.info("%s", step)
        request = replace(request, decisions=step.decisions)
        found.again = decide_again(found, request.decisions)
    _log_choices(found)
    if settings.inner == "eager":
        note_recipes(found, request)
        return found.runs
    _mark_recomputed(found, request.decisions.replayed, has_plain_norms(settings, device_of(inputs)))
    return found.graph_module


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
    if not isinstance(settings.winograd, bool):
        raise InvalidInputError(f'backend "normpass": `winograd` is {settings.winograd!r}, it must be True or False')
    if settings.kernels not in (None, True, False):
        raise InvalidInputError(
            f'backend "normpass": `kernels` is {settings.kernels!r}, it must be True, False or None'
        )
    if settings.kernels is False and settings.inner == "eager":
        raise InvalidInputError(
            'backend "normpass": `kernels=False` is for a compiler: inner="inductor" or "aot_eager"'
        )
    return settings


def device_of(inputs: Sequence[Any]) -> str:
    """The device type of a graph's inputs."""
    return next((t.device.type for t in inputs if isinstance(t, Tensor) and t.dim() > 0), "cpu")


def has_plain_norms(settings: BackendOptions, device: str) -> bool:
    """Whether norms are handed on as plain operators."""
    if settings.kernels is None:
        return settings.inner == "inductor" and device == "cuda"
    return not settings.kernels


def _mark_recomputed(rewritten: Rewritten, replayed: frozenset[str], has_plain: bool) -> None:
    """Mark what backward computes again, the sites split so that their moments are not among it.

    With `has_plain` sites become plain operators; those whose statistics other sites share stay ours. A pooling that
    looks for its maxima again makes its result again as well: that is one operator.
    """
    graph, found = rewritten.graph_module.graph, rewritten.found
    assert found is not None
    in_two = _PLAIN_IN_TWO if has_plain else _IN_TWO
    for step in found.facts.steps:
        node, is_again = step.node, any(v in rewritten.again for v in step.makes or _viewed(step))
        if node.target in _REGIONS:
            node.target = _REGIONS[node.target]
        elif node.target in in_two and is_again:
            prepare, finish = in_two[node.target]
            with graph.inserting_before(node):
                prepared = graph.call_function(prepare, node.args, node.kwargs)
                finished = graph.call_function(finish, (prepared,))
            _mark(finished)
            node.replace_all_uses_with(finished)
            graph.erase_node(node)
        elif has_plain and node.target in _PLAIN:
            node.target = _PLAIN[node.target]
        elif (is_again and node.target not in NOTES_ITSELF) or step.key in replayed:
            _mark(node)
    rewritten.graph_module.recompile()


def _viewed(step: Step) -> tuple[int, ...]:
    """What a view shows: where that is made again a compiler must not keep the view in its place."""
    return step.reads if step.passes and not step.writes and len(step.reads) == 1 else ()


def _mark(node: fx.Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0  # one region: nothing is kept for being at the border of another


def _log_choices(rewritten: Rewritten) -> None:
    """One line a norm, at level INFO: nothing is skipped silently."""
    for row in graph_rows(rewritten):
        reason = f"; {row.reason}" if row.reason else ""
        _log.info("%s (%s): %s%s", row.path, row.pattern, row.rewrite or "left alone", reason)
    for path, region in rewritten.graph_module.named_modules():
        if path and isinstance(region, fx.GraphModule):
            count = sum(node.target is F.batch_norm for node in region.graph.nodes)
            _log.info(
                "%s: %s left alone, inside a region of its own (checkpoint, cond, …)", path, counted(count, "norm")
            )
    norms, results = counted(len(rewritten.choices), "norm"), counted(len(rewritten.again), "result")
    _log.info("%s, %s made again", norms, results)
