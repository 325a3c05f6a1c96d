"""The report of an optimized model: what its graphs did, and what is measured before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from normpass.analysis.facts import Step
from normpass.collect import Collected, captured_graphs
from normpass.copies.trial import Arguments, copied_inputs, trial, trial_copy
from normpass.errors import InvalidInputError
from normpass.graph.concatenation import NO_CONCATENATION
from normpass.graph.nodes import name_of
from normpass.measure import counted, kept_bytes, peak_bytes
from normpass.optimized import optimize_in_place, state_of
from normpass.pipeline import Rewritten
from normpass.report.summary import GraphRow, KeptRow, Memory, Report, Row
from normpass.rewrite.choices import Choice
from normpass.serialize.traffic import Group

_LARGEST = 10
NORM_BASES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def make_report(model: nn.Module, optimized: nn.Module, arguments: Arguments | None, plan: object = None) -> Report:
    """Collect what a forward in train mode does; with `arguments` measure both models."""
    if arguments is None:
        return Report(type(model).__name__, tuple(_unknown(model)), has_run=False)
    request = state_of(optimized).request
    found = captured_graphs(model, arguments, request)
    memory, unmeasured = _measure(model, optimized, arguments)
    return Report(
        type(model).__name__,
        tuple(norm_rows(model, found)),
        graphs=tuple(_graph_row(graph) for graph in found.graphs),
        failures=tuple(found.failures),
        derived=_derived(found),
        convolutions=sum(len(g.convolutions) for g in found.graphs),
        largest=tuple(_largest(found)),
        memory=memory,
        unmeasured=unmeasured,
        plan=plan,
        regions=(*(line for g in found.graphs for line in _region_lines(g)), *_unknown_paths(request.serialize, found)),
    )


# --- norms ------------------------------------------------------------------------------------------


def norm_rows(model: nn.Module, found: Collected) -> list[Row]:
    """Every norm of `model` with what was done to it, in the model's order."""
    rows = [row for graph in found.graphs for row in graph_rows(graph)]
    rows += _left_out(model, rows, found)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(rows, key=lambda row: order.get(row.path, len(order)))


def graph_rows(graph: Rewritten) -> Iterator[Row]:
    """Every norm of one graph with what was done to it; as the report and the log of the backend have it."""
    for choice in graph.choices:
        path, rewrite = choice.site.path, choice.rewrite
        told = [r.reason for r in choice.refusals if r.reason != NO_CONCATENATION]
        if rewrite is None and path in _again_keys(graph):
            rewrite = "rebuild_values"
            told = [f"rebuilt, not fused: {reason}" for reason in told]
        if choice.site.left_alone:
            told.append(choice.site.left_alone)
        if not _has_backward(choice, graph):
            told.append("no gradient goes through it")
        reason = "; ".join(dict.fromkeys(told))
        yield Row(path, choice.site.pattern, _done(choice, rewrite, graph), _kept_of(choice, graph), reason)
    for group in graph.regions.groups if graph.regions is not None else ():
        for path, kind in group.norms:
            yield Row(path, kind, "serialize_minibatch", None, "")


def _done(choice: Choice, rewrite: str | None, graph: Rewritten) -> str | None:
    """What ran: a norm whose result is kept all the same is fused, no more."""
    is_kept = rewrite in ("split_bn", "split_norm") and choice.site.path not in _again_keys(graph)
    return "fuse_norm_act" if is_kept else rewrite


def _again_keys(graph: Rewritten) -> frozenset[str]:
    if graph.found is None:
        return frozenset()
    steps, maker = graph.found.facts.steps, graph.found.maker
    return frozenset(steps[maker[v]].key for v in graph.again)


def _kept_of(choice: Choice, graph: Rewritten) -> str | None:
    """Which tensors of the site are kept."""
    if not _has_backward(choice, graph):
        return "z" if _is_z_kept(choice, graph) else None
    if choice.match is None:
        return "x" if choice.site.path in _again_keys(graph) else None
    if choice.match.kept == "z" or choice.site.path in _again_keys(graph):
        return choice.match.kept
    return "x and z" if _is_z_kept(choice, graph) else "x"


def _step_of(choice: Choice, graph: Rewritten) -> Step | None:
    steps = graph.found.facts.steps if graph.found is not None else []
    return next((step for step in steps if step.key == choice.site.path), None)


def _has_backward(choice: Choice, graph: Rewritten) -> bool:
    step = _step_of(choice, graph)
    return graph.keeps_gradients and (step is None or step.differentiable)


def _is_z_kept(choice: Choice, graph: Rewritten) -> bool:
    step, kept = _step_of(choice, graph), _kept_values(graph)
    return step is not None and any(v in kept for v in step.makes)


def _left_out(model: nn.Module, rows: list[Row], found: Collected) -> Iterator[Row]:
    """Norms that no captured graph calls."""
    seen = {row.path for row in rows}
    why = "; ".join(dict.fromkeys(found.failures)) or "no captured graph calls it"
    norms = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, NORM_BASES)]
    called = {id(m) for path, m in norms if any(key == path or key.startswith(f"{path}.") for key in seen)}
    for path, module in norms:
        if id(module) not in called:  # nor by another name
            yield Row(path, type(module).__name__, None, None, why)


def _unknown(model: nn.Module) -> Iterator[Row]:
    reason = "give example inputs: what is done with it depends on the graph"
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NORM_BASES):
            yield Row(path, type(module).__name__, None, None, reason)


# --- the rest ---------------------------------------------------------------------------------------


def _graph_row(graph: Rewritten) -> GraphRow:
    steps = graph.found.facts.steps if graph.found is not None else []
    plain = graph.plain.plain_kept if graph.plain is not None else 0
    return GraphRow(len(steps), len(graph.choices), plain, sum(_kept_sizes(graph)), graph.ends)


def _derived(found: Collected) -> dict[str, int]:
    """Function -> how many of its results are made again, beside the norms that were rewritten."""
    counts: Counter[str] = Counter()
    for graph in found.graphs:
        sites = {choice.site.path for choice in graph.choices if choice.match is not None}
        if graph.found is None:
            continue
        facts, maker = graph.found.facts, graph.found.maker
        again = {maker[v] for v in graph.again}
        counts.update(name_of(s.target) for i, s in enumerate(facts.steps) if i in again and s.key not in sites)
    return dict(counts)


def _kept_values(graph: Rewritten) -> set[int]:
    """The values that are kept from forward to backward."""
    if graph.found is None or not graph.keeps_gradients:
        return set()
    facts, maker = graph.found.facts, graph.found.maker
    kept: set[int] = set()
    waiting = [v for step in facts.steps for v in step.saves]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in graph.again:
            waiting += facts.steps[maker[value]].reads
        else:
            kept.add(value)
    return kept - facts.outputs


def _kept_sizes(graph: Rewritten) -> Iterator[int]:
    if graph.found is None or not graph.keeps_gradients:
        return
    facts = graph.found.facts
    yield from (facts.sizes[v] for v in _kept_values(graph))
    yield from (step.internals for step in facts.steps)


def _largest(found: Collected) -> list[KeptRow]:
    """What is kept that is largest, who makes it and who needs it."""
    rows: list[KeptRow] = []
    for graph in found.graphs:
        if graph.found is None:
            continue
        facts, maker = graph.found.facts, graph.found.maker
        readers = _readers(facts.steps)
        for value in _kept_values(graph):
            rows.append(KeptRow(facts.steps[maker[value]].key, facts.sizes[value], tuple(readers.get(value, ()))))
        rows += [KeptRow(s.key, s.internals, ("its own backward",)) for s in facts.steps if s.internals]
    return sorted(rows, key=lambda row: -row.bytes)[:_LARGEST]


def _readers(steps: list[Step]) -> dict[int, list[str]]:
    """Value -> keys of the steps whose backward reads it."""
    readers: dict[int, list[str]] = {}
    for step in steps:
        for value in step.saves:
            readers.setdefault(value, []).append(step.key)
    return readers


def _region_lines(graph: Rewritten) -> Iterator[str]:
    """What runs sub-batch by sub-batch or block by block, and what does not, in words."""
    if graph.blocks is not None:
        yield from (f"{path}: block by block, with the norm before it" for path in graph.blocks.done)
        yield from (f"{path} may be named in `paths`" for path in graph.blocks.possible)
        yield from (f"{refusal.path} runs whole: {refusal.reason}" for refusal in graph.blocks.refusals)
    if graph.regions is None:
        return
    for group in graph.regions.groups:
        yield f"{group.name}: {_sub_batches(group)}"
    for refusal in graph.regions.refusals:
        yield f"{refusal.path or 'the model'} runs whole: {refusal.reason}"


def _sub_batches(group: Group) -> str:
    """How many there are, of how many samples; the last one may have fewer."""
    return f"{counted(group.iterations, 'sub-batch', 'es')} of {group.samples}"


def _unknown_paths(serialize: Any, found: Collected) -> list[str]:
    """What a `SerializeNorms` names that is no convolution behind a norm of any graph."""
    blocks = [graph.blocks for graph in found.graphs if graph.blocks is not None]
    known = {path for b in blocks for path in (*b.done, *b.possible, *(refusal.path for refusal in b.refusals))}
    paths = getattr(serialize, "paths", ())
    return [f"{path} runs whole: no convolution behind a norm has this name" for path in paths if path not in known]


def _measure(model: nn.Module, optimized: nn.Module, arguments: Arguments) -> tuple[Memory | None, str]:
    """Kept and peak bytes of both; or why there are none, as of a frozen model."""
    try:
        return _measured(model, optimized, arguments), ""
    except InvalidInputError as error:
        return None, str(error)


def _measured(model: nn.Module, optimized: nn.Module, arguments: Arguments) -> Memory:
    request = state_of(optimized).request
    with trial(model), torch.enable_grad():
        copies = [trial_copy(model).train(), optimize_in_place(trial_copy(model).train(), request)]
        state_of(copies[1]).is_logging = False
        args, kwargs = copied_inputs(arguments)
        kept = [kept_bytes(m, *args, **kwargs) for m in copies]
        peak = [peak_bytes(m, *args, **kwargs) for m in copies]
    return Memory(*kept, *peak)
