"""The plan of a training step for a memory budget: what it says, how it prints, its form as JSON; and budgets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normpass.analysis.liveness import Use
from normpass.budget import entries
from normpass.errors import InvalidInputError
from normpass.files import path_of, write_json
from normpass.measure import format_bytes
from normpass.rewrite.choices import Decisions

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_VERSION = 2
INDICES = " (indices)"
"""what a pooling keeps beside its result is called by its key and this"""


@dataclass(frozen=True)
class Row:
    """One result that backward needs: what is done with it, and what the other choice would change."""

    key: str
    """the layer or the node that makes it"""
    choice: str
    """kept, rebuilt or replayed"""
    bytes: int
    """of the result (of the indices, where it is replayed)"""
    seconds: float
    """of making it once more"""
    other_bytes: int
    """kept bytes with the other choice, less those with this one"""
    other_seconds: float
    """seconds of rebuilding with the other choice, less those with this one"""


@dataclass(frozen=True)
class StepPlan:
    """What is kept and what is rebuilt in one training step of one model; `optimize(model, plan=…)` applies it."""

    decisions: Decisions
    rows: tuple[Row, ...] = ()
    plain: Use | None = None
    """predicted, as the next two: of the model as it is, of the default, of this plan"""
    default: Use | None = None
    planned: Use | None = None
    budget: str = ""
    """as it was asked for"""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; `from_json` reads `decisions`, which may be edited."""
        predicted = {n: getattr(self, n) for n in ("plain", "default", "planned") if getattr(self, n) is not None}
        return {
            "version": _VERSION,
            "budget": self.budget,
            "decisions": {
                "rewrites": dict(self.decisions.rewrites),
                **{name: sorted(getattr(self.decisions, name)) for name in ("kept", "rebuilt", "replayed")},
            },
            "predicted": {n: {"kept": p.kept, "peak": p.peak, "seconds": p.seconds} for n, p in predicted.items()},
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepPlan:
        """The plan that `to_json` wrote.

        Raises:
            InvalidInputError: it is no such plan.
        """
        given = entries.mapping(data, "plan", _ENTRIES, ("version", "decisions"))
        if given["version"] != _VERSION or isinstance(given["version"], bool):
            raise InvalidInputError(
                f"`plan` is not a plan of version {_VERSION}, its `version` is {given['version']!r:.40}: make it again "
                "with `normpass.plan` and write it with `StepPlan.save`"
            )
        rows = entries.items(given.get("rows", ()), "plan.rows")
        return cls(
            _decisions(given["decisions"]),
            tuple(_row(row, f"plan.rows[{index}]") for index, row in enumerate(rows)),
            budget=entries.text(given.get("budget", ""), "plan.budget"),
            **_predicted(given.get("predicted", {})),
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            InvalidInputError: it cannot be written there.
        """
        write_json(path_of(path, "path"), self.to_json())

    def __str__(self) -> str:
        changed = [row for row in self.rows if row.key.removesuffix(INDICES) in self.decisions.keys]
        differ = "1 result differs" if len(changed) == 1 else f"{len(changed)} results differ"
        lines = [f"plan for a budget of {self.budget}: {differ} from the default"]
        for row in changed:
            lines.append(
                f"  {row.key}: {row.choice} ({format_bytes(row.bytes)}); otherwise "
                f"{'-' if row.other_bytes < 0 else '+'}{format_bytes(abs(row.other_bytes))} kept and "
                f"{_signed(row.other_seconds * 1e3)} ms"
            )
        for name in ("plain", "default", "planned"):
            p: Use | None = getattr(self, name)
            if p is not None:
                rebuilding = f", rebuilding {p.seconds * 1e3:.1f} ms" if p.seconds else ""
                lines.append(
                    f"{name}: kept {format_bytes(p.kept)}, peak {format_bytes(p.peak)}{rebuilding} (predicted)"
                )
        return "\n".join(lines)


def _signed(milliseconds: float) -> str:
    """With two decimals, and no zero below zero."""
    return f"{round(milliseconds, 2) + 0.0:+.2f}"


_ENTRIES = ("version", "budget", "decisions", "predicted", "rows")
_CHOICES = ("rewrites", "kept", "rebuilt", "replayed")


def _decisions(data: Any) -> Decisions:
    given = entries.mapping(data, "plan.decisions", _CHOICES)
    rewrites = entries.mapping(given.get("rewrites", {}), "plan.decisions.rewrites")
    for key, name in rewrites.items():
        if name is not None:
            entries.text(name, f"plan.decisions.rewrites.{key}")
    kept, rebuilt, replayed = (entries.names(given.get(n, ()), f"plan.decisions.{n}") for n in _CHOICES[1:])
    both = sorted(kept & rebuilt)
    if both:
        raise InvalidInputError(f"`plan.decisions`: `{both[0]}` is both in `kept` and in `rebuilt`; take one out")
    return Decisions(rewrites, kept, rebuilt, replayed)


def _predicted(data: Any) -> dict[str, Use]:
    given, uses = entries.mapping(data, "plan.predicted", ("plain", "default", "planned")), {}
    for name, value in given.items():
        at, fields = f"plan.predicted.{name}", ("kept", "peak", "seconds")
        use = entries.mapping(value, at, fields, fields)
        kept, peak = (entries.whole(use[field], f"{at}.{field}") for field in fields[:2])
        uses[name] = Use(kept, peak, entries.number(use["seconds"], f"{at}.seconds"))
    return uses


def _row(data: Any, at: str) -> Row:
    names = tuple(field.name for field in dataclasses.fields(Row))
    given = entries.mapping(data, at, names, names)
    return Row(
        entries.text(given["key"], f"{at}.key"),
        entries.text(given["choice"], f"{at}.choice"),
        entries.whole(given["bytes"], f"{at}.bytes"),
        entries.number(given["seconds"], f"{at}.seconds"),
        entries.whole(given["other_bytes"], f"{at}.other_bytes", None),
        entries.number(given["other_seconds"], f"{at}.other_seconds", None),
    )


def parse_budget(budget: float | str, plain: int) -> int:
    """Bytes of a budget, given as a fraction of `plain` bytes or as a size.

    Raises:
        InvalidInputError: it is neither.
    """
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        if not 0 < budget <= 1:
            raise InvalidInputError(
                f"`memory_budget={budget!r}` is not a fraction between 0 and 1 of what the plain model keeps; "
                'bytes are given as "12GB"'
            )
        return int(budget * plain)
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", budget, re.IGNORECASE) if isinstance(budget, str) else None
    )
    if found is None:
        raise InvalidInputError(f'`memory_budget={budget!r}`: give a fraction such as 0.5, or bytes such as "12GB"')
    return int(float(found[1]) * _UNITS[found[2].upper()])
