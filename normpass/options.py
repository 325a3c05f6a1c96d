"""The options of `optimize`, `plan` and `explain`: what may be given, and what goes together.

    options ──► Request

All of it is checked before anything runs, so that the same is said whichever function is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from normpass import passes
from normpass.budget.step_plan import StepPlan, parse_budget
from normpass.errors import InvalidInputError
from normpass.files import read_json
from normpass.pipeline import Request
from normpass.rewrite.choices import DEFAULT


def read_options(
    *,
    changes: Any = (),
    allow_lossy: Any = False,
    winograd: Any = True,
    memory_budget: Any = None,
    tune: Any = False,
    plan: StepPlan | None = None,
    serialize: Any = False,
) -> Request:
    """What was asked for.

    Raises:
        InvalidInputError: an option has a value that is not allowed, or does not go with another.
    """
    for name, value in (("allow_lossy", allow_lossy), ("winograd", winograd), ("tune", tune)):
        if not isinstance(value, bool):
            raise InvalidInputError(f"`{name}` must be True or False, it is {value!r}")
    if plan is not None and memory_budget is not None:
        raise InvalidInputError("give either `plan` or `memory_budget`: a plan was made for a budget already")
    if serialize is not False and memory_budget is not None:
        raise InvalidInputError("give either `serialize` or `memory_budget`: regions are not planned for a budget")
    if tune and memory_budget is None:
        raise InvalidInputError("`tune=True` measures for a plan: give a `memory_budget` as well, or leave it out")
    if memory_budget is not None:
        parse_budget(memory_budget, 1)
    decisions = DEFAULT if plan is None else plan.decisions
    return Request(_read_changes(changes), allow_lossy, winograd, decisions, _read_regions(serialize))


def read_plan(plan: Any) -> StepPlan | None:
    """A plan as it is, as what its `to_json` returned, or from the file of that path; None for none.

    Raises:
        InvalidInputError: it is no plan.
    """
    if plan is None or isinstance(plan, StepPlan):
        return plan
    if isinstance(plan, (str, Path)):
        plan = read_json(Path(plan), "plan")
    return StepPlan.from_json(plan)


def check_paths(model: nn.Module, serialize: Any) -> None:
    """InvalidInputError where a `SerializeNorms` names what cannot be a convolution of `model`."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for path in getattr(serialize, "paths", ()):
        if path not in modules and not _may_be_a_call(path, modules):
            raise InvalidInputError(
                f"`serialize`: `{path}` is in no {type(model).__name__}: `normpass.explain` with a SerializeNorms "
                "without paths says which convolutions may be named"
            )


def _may_be_a_call(path: str, modules: set[str]) -> bool:
    """Whether it reads as a function of convolution in one of the modules: `block.conv2d`, `block.conv2d.2`."""
    parts = path.split(".")
    if parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1]) in modules and parts[-1].startswith("conv")


def _read_regions(serialize: Any) -> passes.SerializeMinibatch | passes.SerializeNorms | None:
    if serialize is False:
        return None
    if serialize is True:
        return passes.SerializeMinibatch()
    if isinstance(serialize, (passes.SerializeMinibatch, passes.SerializeNorms)):
        return serialize
    raise InvalidInputError(f"`serialize` is True, False, a SerializeMinibatch or a SerializeNorms, not {serialize!r}")


def _read_changes(changes: Any) -> tuple[Any, ...]:
    if isinstance(changes, str):
        raise InvalidInputError(f'`changes` is a sequence of names or option objects: changes=("{changes}",)')
    if not isinstance(changes, Iterable):
        raise InvalidInputError(
            f"`changes` is a sequence of names or option objects, not {changes!r}: changes=() makes none"
        )
    found = tuple(_read_change(change) for change in changes)
    replaced: dict[str, Any] = {}
    for change in found:
        other = replaced.setdefault(change.replaces, change)
        if other is not change:
            raise InvalidInputError(f"`changes`: {other!r} and {change!r} both replace {change.replaces}: name one")
    return found


def _read_change(change: Any) -> Any:
    known = ", ".join(f'"{name}"' for name in passes.CHANGES)
    if isinstance(change, str):
        if change not in passes.CHANGES:
            raise InvalidInputError(f'`changes`: "{change}" is not known; known are {known}')
        return passes.CHANGES[change]()
    if type(change) not in passes.CHANGES.values():
        raise InvalidInputError(f"`changes`: {change!r} is neither a name ({known}) nor an option object")
    return change


__all__ = ["check_paths", "read_options", "read_plan"]
