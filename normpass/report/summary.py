"""What was chosen and measured, as a table, JSON and text. Computes nothing."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from normpass.measure import counted, format_bytes

_SAVES_NOTHING = 0.995
"""what is kept, of plain's, from which it prints as 1.00"""


@dataclass(frozen=True)
class Row:
    """One norm of the model."""

    path: str
    pattern: str
    rewrite: str | None
    """the rewrite that was applied; None if the norm is left alone"""
    kept: str | None
    """which of x (the norm's input) and z (the activation's output) is kept for backward; None for neither"""
    reason: str
    """why it is left alone, or why a rewrite that keeps less was refused"""


@dataclass(frozen=True)
class GraphRow:
    """One captured graph of the forward."""

    nodes: int
    norms: int
    kept_before: int
    """bytes that autograd keeps of the graph as it was captured, worked out from shapes"""
    kept_after: int
    """bytes that are kept of the rewritten one"""
    ends: str = ""
    """why the graph ends where it does, and the line; empty at the end of forward"""


@dataclass(frozen=True)
class KeptRow:
    """One thing that is kept for backward."""

    path: str
    """what makes it"""
    bytes: int
    needed_by: tuple[str, ...]
    """whose backward reads it; nobody's where only what is made again does"""


@dataclass(frozen=True)
class Memory:
    """Bytes in train mode on the example inputs."""

    kept_before: int
    kept_after: int
    peak_before: int
    peak_after: int


@dataclass(frozen=True)
class Report:
    """Every norm of a model with what is done to it; prints as a table."""

    model: str
    rows: tuple[Row, ...]
    graphs: tuple[GraphRow, ...] = ()
    """none where no example inputs were given, or nothing was captured"""
    has_run: bool = True
    """whether example inputs were given: without them it is not known what is done with a norm"""
    failures: tuple[str, ...] = ()
    """why code was not captured, or a graph not rewritten"""
    derived: dict[str, int] = field(default_factory=dict)
    """function -> how many of its results are rebuilt instead of kept, beside the norms"""
    convolutions: int = 0
    """how many run kernels of normpass on the CPU, at the shapes and dtypes of the example inputs"""
    largest: tuple[KeptRow, ...] = ()
    """what is kept that is largest"""
    memory: Memory | None = None
    unmeasured: str = ""
    """why there is no `memory`, where example inputs were given"""
    plan: Any = None
    """the `StepPlan`, where a memory budget was named"""
    regions: tuple[str, ...] = ()
    """what runs sub-batch by sub-batch, and what does not and why, where that was asked for"""

    @property
    def rewritten(self) -> int:
        """How many norms are rewritten."""
        return sum(row.rewrite is not None for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        found = asdict(replace(self, plan=None))
        return {**found, "plan": None if self.plan is None else self.plan.to_json()}

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, force_terminal=False, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def __rich__(self) -> Group:
        table = Table("norm", "pattern", "rewrite", "kept", "reason", title=f"normpass: {self.model}")
        for row in self.rows:
            table.add_row(row.path, row.pattern, row.rewrite or self._no_rewrite, row.kept or "", row.reason)
        return Group(table, *(Text(line) for line in self.summary()))

    def summary(self) -> list[str]:
        """The lines below the table."""
        norms = counted(len(self.rows), "norm")
        if not self.has_run:
            return [f"{norms}; give example inputs to see what is done with them"]
        lines = [f"{self.rewritten} of {norms} rewritten, in {counted(len(self.graphs), 'graph')}"]
        if not self.graphs:
            lines = [f"{norms}; nothing was captured, so the plain model runs"]
        if self.derived:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.derived.items()))
            lines.append(f"also rebuilt instead of kept: {counts}")
        if self.convolutions:
            lines.append(f"convolutions that run kernels of normpass on the CPU: {self.convolutions}")
        lines += [f"the graph breaks: {graph.ends}" for graph in self.graphs if graph.ends]
        lines += [f"not captured: {failure}" for failure in self.failures]
        if self.memory is not None:
            m = self.memory
            lines.append(_compared("kept for backward", m.kept_before, m.kept_after))
            lines.append(_compared("peak over a step", m.peak_before, m.peak_after))
            if self.rewritten and self.plan is None and m.kept_after >= _SAVES_NOTHING * m.kept_before:
                lines.append("this saves nothing: what plain keeps cannot be made again cheaply from less")
        if self.unmeasured:
            lines.append(f"kept bytes and peak are not measured: {self.unmeasured}")
        if self.largest:
            lines.append("largest of what is kept:")
            lines += [_kept_line(row) for row in self.largest]
        return [*lines, *self.regions, *self._plan_lines()]

    @property
    def _no_rewrite(self) -> str:
        return "left alone" if self.has_run else "unknown"

    def _plan_lines(self) -> list[str]:
        return [] if self.plan is None else str(self.plan).splitlines()


def _kept_line(row: KeptRow) -> str:
    readers = ", ".join(row.needed_by[:3]) + (", …" if len(row.needed_by) > 3 else "")
    return f"  {format_bytes(row.bytes)} {row.path}, for {readers or 'what is rebuilt from it'}"


def _compared(what: str, before: int, after: int) -> str:
    ratio = f" ({after / before:.2f})" if before else ""
    return f"{what}: {format_bytes(before)} plain, {format_bytes(after)} optimized{ratio}"
