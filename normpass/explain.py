"""The report of an optimised model: what its programs did, and what is measured before and after."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from normpass.capture import NORM_BASES
from normpass.concatenation import NO_CONCATENATION
from normpass.graph import module_of
from normpass.measure import kept_bytes, peak_bytes
from normpass.module import Part, Program, join, part_of
from normpass.planner import Choice
from normpass.report import Memory, Report, Row


def make_report(
    model: nn.Module, optimised: nn.Module, arguments: tuple[tuple, dict] | None, plan: Any = None
) -> Report:
    """Collect the rows of every part; with `arguments` measure both models in train mode."""
    root = part_of(optimised)
    rows: list[Row] = []
    derived: Counter[str] = Counter()
    convolutions = 0
    for path in root.parts:
        part: Part = part_of(optimised.get_submodule(path))
        program = part.programs[0][1]
        rows += _rows(path, program, part.options.decisions.below(path).kept)
        derived.update(program.derived.values())
        convolutions += len(program.convolutions)
    regions = part_of(optimised).programs[0][1].regions if part_of(optimised).programs else None
    rows += _serialised(model, regions)
    rows += _left_out(model, {row.path for row in rows}, root.untraceable)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order.get(row.path, len(order)))
    memory = _measure(model, optimised, arguments) if arguments is not None else None
    return Report(
        type(model).__name__,
        tuple(rows),
        root.untraceable,
        dict(derived),
        convolutions,
        memory,
        plan,
        _region_lines(regions),
    )


def _rows(path: str, program: Program, kept: frozenset[str]) -> list[Row]:
    rows = []
    for choice in program.plan.choices:
        match = choice.match
        told = [r for r in choice.refusals if r.rewrite != "inplace_abn" and r.reason != NO_CONCATENATION]
        reason = "; ".join(dict.fromkeys(r.reason for r in told))
        rows.append(
            Row(
                join(path, choice.site.path),
                choice.site.pattern,
                match.rewrite if match else None,
                _kept_of(choice, kept),
                reason,
            )
        )
    return rows


def _serialised(model: nn.Module, regions: Any) -> list[Row]:
    """Norms that run sub-batch by sub-batch, with the layers around them."""
    nodes = (node for group in (regions.groups if regions else ()) for unit in group.units for node in unit.nodes)
    layers = {str(node.target): module_of(node, model) for node in nodes}
    norms = {path: layer for path, layer in layers.items() if isinstance(layer, NORM_BASES)}
    return [Row(path, type(norm).__name__, "serialize_minibatch", None, "") for path, norm in norms.items()]


def _region_lines(regions: Any) -> tuple[str, ...]:
    """What runs sub-batch by sub-batch, and what does not, in words."""
    if regions is None:
        return ()
    lines = [f"{group.name}: {group.iterations} sub-batches of {group.sub_batch} samples" for group in regions.groups]
    return (*lines, *(f"{refusal.path or 'the model'} runs whole: {refusal.reason}" for refusal in regions.refusals))


def _kept_of(choice: Choice, kept: frozenset[str]) -> str | None:
    """Which tensor of the site is kept, where the plan keeps the results in `kept`."""
    if choice.match is None:
        return None
    return "x and z" if choice.site.path in kept else choice.match.kept


def _left_out(model: nn.Module, seen: set[str], untraceable: dict[str, str]) -> list[Row]:
    """Norms that no captured graph calls."""
    rows = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, NORM_BASES) or path in seen:
            continue
        owner = max((p for p in untraceable if f"{path}.".startswith(join(p, ""))), key=len, default=None)
        if owner is not None:
            reason = f"`{owner or type(model).__name__}` cannot be traced: {untraceable[owner]}"
        else:
            reason = "the traced forward does not call it"
        rows.append(Row(path, type(module).__name__, None, None, reason))
    return rows


def _measure(model: nn.Module, optimised: nn.Module, arguments: tuple[tuple, dict]) -> Memory:
    args, kwargs = arguments
    modes = [(m, m.training) for m in (*model.modules(), *optimised.modules())]
    model.train()
    optimised.train()
    try:
        kept = [kept_bytes(m, *args, **kwargs) for m in (model, optimised)]
        peak = [peak_bytes(m, *args, **kwargs) for m in (model, optimised)]
    finally:
        for module, training in modes:
            module.training = training
    return Memory(*kept, *peak)
