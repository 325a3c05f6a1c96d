"""A memory budget -> what is kept, what is rebuilt and what that costs: `plan`, and what `optimize` does with one.

A copy of the model runs forward once, which captures and rewrites its graphs; the values to be rebuilt are chosen
(`normpass.choose`) from the facts about them, and the choice is written down by the names of layers: a `StepPlan`,
which prints, goes to and from JSON, may be edited, and is applied by `optimize(model, plan=…)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import nn

from normpass import cost, tune
from normpass.choose import Chosen, Search, Selectable, flip
from normpass.collect import captured_graphs
from normpass.errors import InfeasibleBudgetError, InvalidInputError
from normpass.facts import Facts, Step
from normpass.liveness import Demand, Seconds, Walker
from normpass.measure import format_bytes
from normpass.minimum_cut import Possible, joined, minimum_cut
from normpass.passes.rebuild_values import can_be_replayed
from normpass.pipeline import Request, Rewritten
from normpass.planner import DEFAULT, Decisions
from normpass.step_plan import INDICES, Row, StepPlan, parse_budget
from normpass.trial import Arguments

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
    plain = joined([_until_its_end(Possible.nothing(g.plain), g) for g in graphs if g.plain is not None]).facts
    return plan_facts(plain, found, memory_budget, given, seconds)


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
        search.use(default),
        search.use(chosen),
        str(memory_budget),
    )


# --- capturing ------------------------------------------------------------------------------------


def _captured(model: nn.Module, arguments: Arguments, request: Request) -> list[Rewritten]:
    """The graphs of one training step's forward, optimised without a budget."""
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


def check_plan(model: nn.Module, request: Request, arguments: Arguments | None) -> None:
    """InvalidInputError for a name that is not in the model.

    Without example inputs the graph is not known: then the modules that are named must be there.
    """
    keys = request.decisions.keys
    if arguments is not None:
        graphs = captured_graphs(model, arguments, dataclasses.replace(request, decisions=DEFAULT)).graphs
        known = {step.key for g in graphs if g.found is not None for step in g.found.facts.steps}
        known |= {choice.site.path for g in graphs for choice in g.choices}
        unknown = sorted(keys - known)
    else:
        modules = {name for name, _ in model.named_modules()}
        unknown = sorted(key for key in keys if not _names_module(key, modules))
    if unknown:
        raise InvalidInputError(
            f"`plan` names what is not in this {type(model).__name__}: {', '.join(unknown[:5])}; it was made for "
            "another model, or for other options"
        )


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
