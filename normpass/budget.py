"""A memory budget -> what is kept, what is rebuilt and what that costs: `plan`, and what `optimize` does with one.

The plain model and the optimised one are recorded without memory (`normpass.record`), the values to be rebuilt are
chosen (`normpass.choose`), and the choice is written down by the names of layers: a `StepPlan`, which prints, goes to
and from JSON, may be edited, and is applied by `optimize(model, plan=…)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import fx, nn

from normpass import cost, tune
from normpass.choose import Chosen, Search, Selectable, flip
from normpass.errors import InfeasibleBudgetError, InvalidInputError
from normpass.graph import join, key_of
from normpass.liveness import Demand, Seconds, Walker
from normpass.measure import format_bytes
from normpass.module import PASSES, Optimized, Options, Program, optimise_in_place, part_of, shared_copy
from normpass.planner import DEFAULT, Decisions
from normpass.record import Record, Recorder, recording, recording_for_real
from normpass.step_plan import INDICES, Row, StepPlan, parse_budget

_PEAK_MARGIN = 1.1
"""how far the peak may lie above the budget's share of the plain model's"""


def plan_step(
    model: nn.Module,
    arguments: tuple[tuple, dict],
    memory_budget: float | str,
    options: Options,
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
    plain, _ = _recorded(model, arguments, dataclasses.replace(options, decisions=Decisions(leaves_all=True)))
    record, possible = _recorded(model, arguments, options)
    seconds = _measured(model, arguments, options, record, possible) if measure else cost.seconds
    return plan_record(plain, record, possible, memory_budget, options.decisions, seconds)


def plan_record(
    plain: Record,
    record: Record,
    possible: Selectable,
    memory_budget: float | str,
    given: Decisions = DEFAULT,
    seconds: Seconds = cost.seconds,
) -> StepPlan:
    """The plan for one record, with the record of the same step as it is without normpass beside it.

    Raises:
        InvalidInputError, InfeasibleBudgetError: as `plan_step`.
    """
    unchanged = Walker(plain, seconds).walk(())
    walker = Walker(record, seconds)
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
    default = Chosen(possible.default, frozenset())
    return StepPlan(
        _decisions(walker, chosen, default, given),
        tuple(_rows(walker, search, chosen)),
        unchanged,
        search.use(default),
        search.use(chosen),
        str(memory_budget),
    )


# --- recording ------------------------------------------------------------------------------------


def _recorded(model: nn.Module, arguments: tuple[tuple, dict], options: Options) -> tuple[Record, Selectable]:
    """One training step's forward of the model optimised with `options`, and what may be rebuilt in it."""
    optimised = optimise_in_place(shared_copy(model).train(), options, in_both_modes=False)
    try:
        try:
            record = _run(optimised, recording(optimised, arguments))
        except Exception:  # what asks for values cannot be run without memory
            record = _run(optimised, recording_for_real(optimised, arguments))
    except Exception as error:
        raise InvalidInputError(
            f"`memory_budget`: {type(model).__name__} does not run a step of training on `example_inputs` "
            f"({type(error).__name__}: {error}), so it cannot be planned; leave the budget out"
        ) from error
    return record, _selectable(optimised, record)


def _run(optimised: nn.Module, how: AbstractContextManager[tuple[Recorder, tuple[tuple, dict]]]) -> Record:
    with how as (recorder, (args, kwargs)), _stepwise(optimised, recorder):
        output = optimised(*args, **kwargs)
    return recorder.finish(output)


def _measured(
    model: nn.Module, arguments: tuple[tuple, dict], options: Options, record: Record, possible: Selectable
) -> Seconds:
    """Seconds of a step, measured where it can be rebuilt."""
    maker = record.maker()
    rebuilt = frozenset(record.steps[maker[v]].key for v in possible.extra - possible.default)
    decisions = dataclasses.replace(options.decisions, rebuilt=rebuilt)
    options = dataclasses.replace(options, decisions=decisions)
    optimised = optimise_in_place(shared_copy(model).train(), options, in_both_modes=False)
    args, kwargs = arguments

    def call(timer: tune.Timer) -> None:
        with _stepwise(optimised, timer):
            optimised(*args, **kwargs)

    found = tune.measured(call, optimised, arguments, tune.cache_folder())
    return lambda step, record: found[step.key] if step.key in found else cost.seconds(step, record)


@contextmanager
def _stepwise(optimised: nn.Module, recorder: Recorder | tune.Timer) -> Iterator[None]:
    """Every part's program is run node by node by the recorder."""
    parts = [part_of(m) for m in optimised.modules() if isinstance(m, Optimized)]
    before = [part.programs for part in parts]
    try:
        for part in parts:
            part.programs = [(key, _run_by(recorder, program, part.path)) for key, program in part.programs]
        yield
    finally:
        for part, programs in zip(parts, before, strict=True):
            part.programs = programs


def _run_by(recorder: Recorder | tune.Timer, program: Program, path: str) -> Program:
    def run(module: nn.Module, *tensors: Any) -> Any:
        return recorder.run(program.graph, module, path, tensors)

    return dataclasses.replace(program, run=run)


def _selectable(optimised: nn.Module, record: Record) -> Selectable:
    parts = [(m, part_of(m)) for m in optimised.modules() if isinstance(m, Optimized)]
    return selectable(record, [(part.path, p.graph, m, p.rebuilt) for m, part in parts for _, p in part.programs])


def selectable(record: Record, graphs: Iterable[tuple[str, fx.Graph, nn.Module, frozenset[str]]]) -> Selectable:
    """What may be rebuilt in a record of these graphs: (path of the part, graph, root, names of what is rebuilt)."""
    default, extra, replayable = set(), set(), set()
    for path, graph, root, rebuilt in graphs:
        default |= {join(path, key_of(n)) for n in graph.nodes if n.name in rebuilt}
        regions = PASSES.regions.match(graph, root)
        extra |= {join(path, key) for key in regions.rebuildable}
        replayable |= {join(path, key) for key in regions.replayable}
    steps = list(enumerate(record.steps))
    return Selectable(
        default=frozenset(v for _, s in steps if s.key in default for v in s.makes),
        extra=frozenset(v for _, s in steps if s.key in extra and s.differentiable for v in s.makes),
        replayable=frozenset(i for i, s in steps if s.key in replayable and s.internals),
    )


def known_keys(optimised: nn.Module) -> frozenset[str]:
    """What a plan for this module may name."""
    parts = [part_of(m) for m in optimised.modules() if isinstance(m, Optimized)]
    nodes = ((part.path, n) for part in parts for _, program in part.programs for n in program.graph.nodes)
    return frozenset(join(path, key_of(n)) for path, n in nodes)


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
