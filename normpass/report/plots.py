"""Pictures: memory along one training step, and time against memory. Draw what was measured; compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normpass.extras import needed
from normpass.files import appearing, path_of
from normpass.measure import Timeline, format_bytes

_COLORS = ("#8a8f98", "#0b6fb8", "#c2571a", "#3a8f4d")


@dataclass(frozen=True)
class Curve:
    """Memory of one model along one step."""

    name: str
    kept: int
    """bytes kept for backward"""
    timeline: Timeline


@dataclass(frozen=True)
class Point:
    """One way to run a model."""

    name: str
    group: str
    """points of one group have one colour"""
    memory: float
    """kept bytes, as a fraction of eager's"""
    time: float
    """of a step, as a fraction of eager's"""


def plot_memory(curves: Sequence[Curve], title: str, path: str | Path) -> None:
    """Draw the memory along one step of several models to a PNG file.

    Raises:
        OSError: the file cannot be written.
        NotAvailableError: matplotlib is not installed.
    """
    figure, axes = _figure()
    for curve, color in zip(curves, _COLORS, strict=False):
        label = f"{curve.name}: kept {format_bytes(curve.kept)}, peak {format_bytes(curve.timeline.peak)}"
        mebibytes = [count / 2**20 for count in curve.timeline.bytes]
        phases = _phases(curve.timeline)
        axes.plot(phases, mebibytes, color=color, drawstyle="steps-post", linewidth=1.5, label=label)
        axes.fill_between(phases, mebibytes, step="post", color=color, alpha=0.15)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xticks([0, 1, 2], ["start", "forward ends", "backward ends"])
    axes.set_xlabel("time in the step (forward and backward drawn equally wide)")
    axes.set_ylabel("MiB above parameters and gradients")
    axes.set_title(title)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.25 * max(curve.timeline.peak for curve in curves) / 2**20)
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    with appearing(path_of(path, "path")) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_frontier(points: Sequence[Point], title: str, path: str | Path) -> None:
    """Draw time against memory to a PNG file: a line through the points of each group.

    Raises:
        OSError: the file cannot be written.
        NotAvailableError: matplotlib is not installed.
    """
    figure, axes = _figure()
    for group, color in zip(dict.fromkeys(point.group for point in points), _COLORS, strict=False):
        own = sorted((p for p in points if p.group == group), key=lambda p: p.memory)
        axes.plot([p.memory for p in own], [p.time for p in own], "o-", color=color, linewidth=1, label=group)
        for p in own:
            axes.annotate(p.name, (p.memory, p.time), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("kept for backward, as a fraction of eager")
    axes.set_ylabel("time of a step, as a fraction of eager")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.legend()
    axes.grid(alpha=0.3)
    with appearing(path_of(path, "path")) as file:
        figure.savefig(file, format="png", dpi=120)


def _figure() -> tuple[Any, Any]:
    figure = needed("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    needed("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _phases(timeline: Timeline) -> list[float]:
    """When each event happened: 0 to 1 in forward, 1 to 2 in backward."""
    split, end = timeline.seconds[timeline.forward_end], timeline.seconds[-1]
    return [t / split if t <= split else 1 + (t - split) / (end - split) for t in timeline.seconds]
