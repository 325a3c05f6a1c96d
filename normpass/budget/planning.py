"""A memory budget -> what is kept, what is rebuilt and what that costs: `plan`, and what `optimize` does with one.

A copy of the model runs forward once, which captures and rewrites its graphs; the values to be rebuilt are chosen
(`normpass.budget.search`) from the facts about them, and the choice is written down by the names of layers: a
`StepPlan`, which prints, goes to and from JSON, may be edited, and is applied by `optimize(model, plan=…)`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from normpass import passes
from normpass.analysis.facts import Facts, Step
from normpass.analysis.lifetimes import made_apart
from normpass.analysis.liveness import Demand, Seconds, Use, Walker
from normpass.analysis.minimum_cut import Possible, joined, minimum_cut
from normpass.budget import cost, tune
from normpass.budget.search import Chosen, Search, Selectable, flip
from normpass.budget.step_plan import INDICES, Row, StepPlan, parse_budget
from normpass.collect import captured_graphs
from normpass.copies.trial import Arguments
from normpass.errors import InfeasibleBudgetError, InvalidInputError
from normpass.measure import format_bytes
from normpass.passes.graph.rebuild_values import can_be_replayed
from normpass.pipeline import Request, Rewritten
from normpass.rewrite.choices import DEFAULT, Choice, Decisions
from normpass.rewrite.contract import Semantics

_log = logging.getLogger(__name__)
_PEAK_MARGIN = 1.1
"""how far the peak may lie above the budget's share of the plain model's"""


def plan_step(
    model: nn.Module,
    arguments: Arguments,
    memory_budget: float | str,
    request: Request,
    measure: bool = False,
) -> StepPlan:
    """The fastest way to run a training step of `model` on `arguments` within the budget.

    Args:
        memory_budget: a fraction of what the plain model keeps for backward, or bytes: `"12GB"`, `"800MiB"`.
        measure: measure how long each result takes to be made once more, instead of estimating it from its bytes and
            its arithmetic; the model runs forward once on `arguments`.

    Raises:
        InvalidInputError: the budget is no fraction or size; the model cannot be run without memory.
        InfeasibleBudgetError: no choice keeps to it; the message has the smallest budget that can be kept.
    """
    graphs = _captured(model, arguments, request)
    seconds = tune.measured_seconds(model, arguments, request, graphs) if measure else cost.seconds
    return plan_graphs(graphs, memory_budget, request.decisions, seconds)


def plan_graphs(
    graphs: Sequence[Rewritten], memory_budget: float | str, given: Decisions = DEFAULT, seconds: Seconds = cost.seconds
) -> StepPlan:
    """The plan for the graphs of one forward, one after the other; raises as `plan_step`."""
    found = joined([_until_its_end(g.found, g) for g in graphs if g.found is not None])
    return plan_facts(_plain(graphs), found, memory_budget, given, seconds)


def _plain(graphs: Sequence[Rewritten]) -> Facts:
    """The facts of the graphs as they were captured, one after the other."""
    return joined([_until_its_end(Possible.nothing(g.plain), g) for g in graphs if g.plain is not None]).facts


def _until_its_end(found: Possible, graph: Rewritten) -> Possible:
    """Where a graph breaks, what it returns is no result of the model: it is kept, by whoever reads it next."""
    facts = found.facts
    crossing = tuple(sorted(facts.outputs))
    if not graph.ends or not crossing:
        return found
    end = next(node for node in reversed(graph.graph_module.graph.nodes) if node.op == "output")
    sizes = tuple(facts.sizes[v] for v in crossing)
    step = Step(end, graph.ends, reads=crossing, read_sizes=sizes, saves=crossing, differentiable=True)
    facts = dataclasses.replace(facts, steps=[*facts.steps, step], outputs=frozenset())
    cheap, dear = found.cheap - set(crossing), found.dear - set(crossing)
    return Possible(facts, found.maker, cheap, dear, found.fixed, found.copied)


def plan_facts(
    plain: Facts,
    found: Possible,
    memory_budget: float | str,
    given: Decisions = DEFAULT,
    seconds: Seconds = cost.seconds,
) -> StepPlan:
    """The plan for one forward, with the facts of the same forward as it is without normpass beside it.

    Raises:
        InvalidInputError, InfeasibleBudgetError: as `plan_step`.
    """
    unchanged = Walker(plain, seconds).walk(())
    walker = Walker(found.facts, seconds, found.copied)
    possible = _selectable(found)
    search = Search(walker, possible)
    limit = parse_budget(memory_budget, unchanged.kept)
    peak = int(_PEAK_MARGIN * limit / max(unchanged.kept, 1) * unchanged.peak)
    chosen = search.within(limit, peak)
    if chosen is None:
        smallest = search.smallest()
        raise InfeasibleBudgetError(
            f"`memory_budget={memory_budget!r}` is {format_bytes(limit)}, and no plan keeps fewer than "
            f"{format_bytes(smallest)}: ask for {-(-smallest * 1000 // max(unchanged.kept, 1)) / 1000} or more"
        )
    default = search.default
    return StepPlan(
        _decisions(walker, chosen, default, given),
        tuple(_rows(walker, search, chosen)),
        unchanged,
        _use(walker, found, default),
        _use(walker, found, chosen),
        str(memory_budget),
    )


def _use(walker: Walker, found: Possible, chosen: Chosen) -> Use:
    """What a step takes that makes again what is `chosen`, as it runs."""
    apart = made_apart(walker, found.cheap, chosen.rebuilt, chosen.replayed)
    return walker.walk(chosen.rebuilt, chosen.replayed, apart)


# --- capturing ------------------------------------------------------------------------------------


def _captured(model: nn.Module, arguments: Arguments, request: Request) -> list[Rewritten]:
    """The graphs of one training step's forward, optimized without a budget."""
    try:
        collected = captured_graphs(model, arguments, request)
    except Exception as error:
        raise InvalidInputError(
            f"`memory_budget`: {type(model).__name__} does not run a step of training on `example_inputs` "
            f"({type(error).__name__}: {error}), so it cannot be planned; leave the budget out"
        ) from error
    differentiable = [g for g in collected.graphs if g.keeps_gradients]
    if not differentiable:
        why = "; ".join(collected.failures) or "`normpass.explain(model, example_inputs)` says more"
        raise InvalidInputError(
            f"`memory_budget`: no graph of {type(model).__name__} that keeps anything for backward was captured, so "
            f"there is nothing to plan: {why}"
        )
    return differentiable


def _selectable(found: Possible) -> Selectable:
    facts = found.facts
    differentiable = {v for step in facts.steps if step.differentiable for v in step.makes}
    return Selectable(
        default=minimum_cut(found),
        extra=(found.cheap | found.dear) & differentiable,
        forced=found.cheap & facts.overwritten,
        replayable=frozenset(i for i, step in enumerate(facts.steps) if can_be_replayed(step)),
    )


def check_plan(model: nn.Module, request: Request, arguments: Arguments | None, made_for: Use | None = None) -> None:
    """InvalidInputError for a name that is not in the model, or of what cannot be done there.

    Without example inputs the graph is not known: then the modules that are named must be there.

    Args:
        made_for: what the plain model was predicted to keep when the plan was made; where it keeps something else on
            `arguments`, the log says so.
    """
    _check_rewrites(request)
    decisions = request.decisions
    if arguments is None:
        modules = {name for name, _ in model.named_modules()}
        _refuse_unknown(model, sorted(key for key in decisions.keys if not _names_module(key, modules)))
        return
    only_rewrites = dataclasses.replace(DEFAULT, rewrites=decisions.rewrites)
    graphs = captured_graphs(model, arguments, dataclasses.replace(request, decisions=only_rewrites)).graphs
    steps = [step for g in graphs if g.found is not None for step in g.found.facts.steps]
    choices = {choice.site.path: choice for g in graphs for choice in g.choices}
    _refuse_unknown(model, sorted(decisions.keys - {step.key for step in steps} - choices.keys()))
    _check_choices(decisions, choices)
    _check_values(decisions, graphs, steps)
    if made_for is not None:
        _warn_of_other_inputs(made_for, graphs)


def _warn_of_other_inputs(made_for: Use, graphs: Sequence[Rewritten]) -> None:
    kept = Walker(_plain([g for g in graphs if g.keeps_gradients]), cost.seconds).walk(()).kept
    if kept != made_for.kept:
        _log.warning(
            "normpass: the plan was made for other inputs, for which the plain model keeps %s and not %s: it computes "
            "the same, but may not keep to its budget; make one with normpass.plan for the shapes to train with",
            format_bytes(made_for.kept),
            format_bytes(kept),
        )


def _refuse_unknown(model: nn.Module, unknown: list[str]) -> None:
    if unknown:
        raise InvalidInputError(
            f"`plan` names what is not in this {type(model).__name__}: {', '.join(unknown[:5])}; it was made for "
            "another model, or for other options"
        )


def _check_rewrites(request: Request) -> None:
    """Whether the rewrites that a plan names are there, and allowed."""
    known = {rewrite.name: rewrite for rewrite in passes.SITES}
    for path, name in request.decisions.rewrites.items():
        if name is None:
            continue
        if name not in known:
            raise InvalidInputError(
                f"`plan.decisions.rewrites.{path}`: `{name}` is no rewrite; known are {', '.join(known)}, and null "
                "leaves the norm alone"
            )
        if known[name].semantics is Semantics.LOSSY and not request.allow_lossy:
            raise InvalidInputError(
                f"`plan.decisions.rewrites.{path}`: `{name}` is lossy: give `allow_lossy=True`, or name another"
            )


def _check_choices(decisions: Decisions, choices: Mapping[str, Choice]) -> None:
    for path, name in decisions.rewrites.items():
        choice = choices.get(path)
        if choice is None:
            raise InvalidInputError(f"`plan.decisions.rewrites`: `{path}` is no norm of the model; take it out")
        if name is not None and choice.match is None:
            reason = "; ".join(dict.fromkeys(refusal.reason for refusal in choice.refusals))
            raise InvalidInputError(f"`plan.decisions.rewrites.{path}`: `{name}` is refused there: {reason}")


def _check_values(decisions: Decisions, graphs: Sequence[Rewritten], steps: Sequence[Step]) -> None:
    """Whether what is to be kept, rebuilt or replayed is a result of which that can be said."""
    found = [(g.found, v) for g in graphs if g.found is not None for v in g.found.cheap | g.found.dear]
    values = {p.facts.steps[p.maker[v]].key for p, v in found}
    replayable = {step.key for step in steps if can_be_replayed(step)}
    for name, possible, what in (
        ("kept", values, "can be kept or made again: it is kept, or is made again, in any case"),
        ("rebuilt", values, "can be made again in backward"),
        ("replayed", replayable, "is a max pooling that keeps indices"),
    ):
        wrong = sorted(getattr(decisions, name) - possible)
        if wrong:
            raise InvalidInputError(f"`plan.decisions.{name}`: `{wrong[0]}` is no result that {what}; take it out")


def _names_module(key: str, modules: set[str]) -> bool:
    """Whether `key` is a module's path, or that of a call in one: `layer1.0`, `layer1.0.iadd`, `layer1.0.iadd.2`."""
    if key in modules:
        return True
    parent, _, name = key.removesuffix(".statistics").rpartition(".")
    if name.isdigit() and parent not in modules:
        parent = parent.rpartition(".")[0]
    return parent in modules


# --- what was chosen ------------------------------------------------------------------------------


def _decisions(walker: Walker, chosen: Chosen, default: Chosen, given: Decisions) -> Decisions:
    steps, maker = walker.record.steps, walker.maker
    return dataclasses.replace(
        given,
        kept=frozenset(steps[maker[v]].key for v in default.rebuilt - chosen.rebuilt),
        rebuilt=frozenset(steps[maker[v]].key for v in chosen.rebuilt - default.rebuilt),
        replayed=frozenset(steps[i].key for i in chosen.replayed),
    )


def _rows(walker: Walker, search: Search, chosen: Chosen) -> Iterator[Row]:
    record, maker, demand = walker.record, walker.maker, search.demand(chosen)
    for value in sorted(search.values):
        changes = _changes(demand, Chosen(frozenset({value}), frozenset()))
        choice = "rebuilt" if value in chosen.rebuilt else "kept"
        step = record.steps[maker[value]]
        if changes != (0, 0.0):
            yield Row(step.key, choice, record.sizes[value], walker.seconds[maker[value]], *changes)
    for index in sorted(search.steps):
        changes = _changes(demand, Chosen(frozenset(), frozenset({index})))
        step = record.steps[index]
        choice = "replayed" if index in chosen.replayed else "kept"
        yield Row(step.key + INDICES, choice, step.internals, walker.seconds[index], *changes)


def _changes(demand: Demand, item: Chosen) -> tuple[int, float]:
    """Kept bytes and seconds of rebuilding with the other choice for `item`, less those with this one."""
    kept, seconds = demand.kept, demand.seconds()
    flip(demand, item)
    changes = demand.kept - kept, demand.seconds() - seconds
    flip(demand, item)
    return changes
