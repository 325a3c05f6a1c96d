"""The benchmarks' rows as tables for people; computes nothing but geometric means."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from rich.table import Table

from normpass.bench.convolutions import ConvolutionRow
from normpass.bench.layers import COPY, LayerRow, shape_text
from normpass.bench.networks import Row
from normpass.bench.norm_bytes import ByteRow
from normpass.bench.ops import KernelRow
from normpass.bench.sample_norms import SampleNormRow
from normpass.measure import Ratio, format_bytes
from normpass.report.plots import Point

_HEADS = {
    "ours_kept": "kept",
    "eager_contiguous": "contiguous",
    "eager_out_of_place": "out of place",
    "cudnn": "cuDNN",
    "aten": "ATen",
}


def network_table(rows: Sequence[Row], title: str) -> Table:
    """One network: a line for each contender, its bytes and times beside the base's."""
    first = rows[0]
    base = next(row for row in rows if row.base == row.contender)
    heads = ("contender", "layout", "kept", "", "peak", "", "step", f"time / {base.contender}", "rebuilds")
    table = Table(*heads, title=f"{first.network}, {shape_text(first.input)}, {first.dtype}: {title}")
    for row in rows:
        if row.error:
            table.add_row(row.contender, row.layout, "did not run")
            continue
        table.add_row(
            row.contender,
            row.layout,
            *_bytes(row.kept, base.kept),
            *_bytes(row.peak, base.peak),
            seconds_text(row.seconds or 0),
            _ratio(Ratio(row.ratio or 0, row.ratio_low or 0, row.ratio_high or 0)),
            "" if row.rebuilds is None else f"{row.rebuilds}, of one {row.most_rebuilds}",
        )
    if any(row.compiled_while_timed for row in rows):
        table.caption = "torch.compile compiled again while the steps were timed: times are spoilt"
    return table


def frontier_points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows of one network (as a record holds them) as points of time against memory."""
    base = next(row for row in rows if row["base"] == row["contender"])
    ran = [row for row in rows if not row["error"]]
    return [Point(r["contender"], _group(r["contender"]), r["kept"] / base["kept"], r["ratio"]) for r in ran]


def _group(contender: str) -> str:
    if contender.startswith("compile"):
        return "torch.compile"
    return "normpass" if contender.startswith("ours") else "eager"


def layer_table(cases: Sequence[Sequence[LayerRow]], title: str) -> Table:
    """One layer: a line for each shape, ours and the others as ratios to eager; the last line has geometric means."""
    first = cases[0][0]
    by_name = [{row.contender: row for row in rows} for rows in cases]
    others = [name for name in by_name[0] if name not in ("ours", "eager", COPY)]
    heads = ["eager", "of copy", "ours", "of copy", "ours / eager", "forward", "backward"]
    heads += [f"{_HEADS.get(name, name)} / eager" for name in others]
    table = Table("shape", *heads, title=f"{first.layer}, {first.dtype}, {first.layout}: {title}")
    for found in by_name:
        table.add_row(
            shape_text(found["eager"].shape),
            *_time_of(found["eager"]),
            *_time_of(found["ours"]),
            *(_ratio_of(found["ours"], phase) for phase in ("both", "forward", "backward")),
            *(_ratio_of(found[name], "both") for name in others),
        )
    table.add_section()
    means = [_geometric_mean([f["ours"] for f in by_name], phase) for phase in ("both", "forward", "backward")]
    means += [_geometric_mean([f[name] for f in by_name], "both") for name in others]
    table.add_row("geometric mean", "", "", "", "", *means)
    return table


def kernel_table(cases: Sequence[Sequence[KernelRow]], title: str) -> Table:
    """A line for each shape: time of each op alone and the fraction of the speed of copying as many bytes."""
    first = cases[0][0]
    heads = (row.kernel for row in cases[0])
    table = Table("shape", *heads, title=f"ops alone, of copy's speed, {first.dtype}, {first.layout}: {title}")
    for rows in cases:
        table.add_row(shape_text(rows[0].shape), *(f"{seconds_text(r.seconds)} {r.of_copy:.2f}" for r in rows))
    table.add_section()
    table.add_row("one call", *(f"{row.call_microseconds:.1f} µs" for row in cases[0]))
    return table


def byte_table(rows: Sequence[ByteRow]) -> Table:
    """A line for each contender: gigabytes that the norms of a step move, and of eager's."""
    first, eager = rows[0], next(row.total for row in rows if row.contender == "eager")
    heads = ("contender", "norms, forward", "norms, backward", "gradients added", "run again", "together", "of eager's")
    table = Table(*heads, title=f"{first.network}, {shape_text(first.input)}, {first.dtype}: GB that a step moves")
    for row in rows:
        parts = row.forward, row.backward, row.additions, row.replays, row.total
        table.add_row(row.contender, *(f"{part * 1e-9:.2f}" for part in parts), f"{row.total / eager:.2f}")
    return table


def convolution_table(rows: Sequence[ConvolutionRow], title: str) -> Table:
    """A line for each pass of each convolution: its time, the vendor's and their ratio."""
    heads = ("convolution", "of", "computes", "vendor's", "ours", "ours / vendor's")
    table = Table(*heads, title=f"convolutions, float32, {rows[0].layout}: {title}")
    for row in rows:
        shapes = f"{shape_text(row.shape)} to {row.channels}"
        times = seconds_text(row.vendor_seconds), seconds_text(row.seconds)
        table.add_row(row.convolution, shapes, row.computes, *times, _ratio(row.ratio))
    return table


def sample_norm_table(rows: Sequence[SampleNormRow], title: str) -> Table:
    """A line for each norm and shape, forward and backward together, and the geometric means of the ratios."""
    heads = ("layer", "of", "layout", "eager", "ours", "ours / eager", "result kept / eager")
    table = Table(*heads, title=f"norms, float32: {title}")
    for layer in dict.fromkeys(row.layer for row in rows):
        of_layer = [row for row in rows if row.layer == layer]
        for row in of_layer:
            times = seconds_text(row.eager_seconds), seconds_text(row.seconds)
            compared = _ratio(row.ratio), _ratio(row.kept_ratio)
            table.add_row(layer, shape_text(row.shape), row.layout, *times, *compared)
        means = (geometric_mean([getattr(row, name).median for row in of_layer]) for name in ("ratio", "kept_ratio"))
        table.add_row(layer, "geometric mean", "", "", "", *(f"{mean:.2f}" for mean in means), end_section=True)
    return table


def seconds_text(seconds: float) -> str:
    """`0.0123` as `12.3 ms`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.3f} s"


def _bytes(own: int | None, base: int | None) -> tuple[str, str]:
    if own is None or not base:
        return "" if own is None else format_bytes(own), ""
    return format_bytes(own), f"{own / base:.3f}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _time_of(row: LayerRow) -> tuple[str, str]:
    phase = row.phases.get("both")
    return ("did not run", "") if phase is None else (seconds_text(phase.seconds), f"{phase.of_copy:.2f}")


def _ratio_of(row: LayerRow, name: str) -> str:
    phase = row.phases.get(name)
    if phase is None:
        return "did not run"
    return _ratio(phase.ratio) if name == "both" and row.contender == "ours" else f"{phase.ratio.median:.2f}"


def _geometric_mean(rows: Sequence[LayerRow], name: str) -> str:
    found = [phase.ratio.median for row in rows if (phase := row.phases.get(name))]
    return f"{statistics.geometric_mean(found):.2f}" if found else ""
