"""The benchmarks, case by case: measured, printed as tables and recorded as JSON.

Times are ratios measured side by side in one run, never compared across runs. The record is written before the
first case and again after each: what was measured survives an interruption, and a file that cannot be written is
found out at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from normpass.bench import sample_norms
from normpass.bench.convolutions import CASES, bench_convolution
from normpass.bench.layers import Case, bench_layer, shape_text
from normpass.bench.networks import Setting, bench_network, check_contenders
from normpass.bench.ops import bench_kernels
from normpass.bench.overhead import call_overhead
from normpass.bench.tables import convolution_table, kernel_table, layer_table, network_table, sample_norm_table
from normpass.files import write_json


@dataclass
class Record:
    """What a benchmark was taken with and its rows so far, in a JSON file where `path` names one."""

    path: Path | None
    found: dict[str, Any]
    """as `normpass.environment.environment` returns it"""
    rows: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The device and torch's version, for the heading of a table."""
        return f"{self.found['device']}, torch {self.found['versions']['torch']}"

    def add(self, kind: str, rows: Iterable[Any]) -> None:
        """Append rows (dataclasses) under the name `kind` and write the file."""
        self.rows.setdefault(kind, []).extend(asdict(row) for row in rows)
        self.write()

    def write(self) -> None:
        """Write the file, where there is one.

        Raises:
            OSError: it cannot be written.
        """
        if self.path is not None:
            write_json(self.path, {**self.found, **self.rows})


def run_networks(
    networks: Sequence[str],
    setting: Setting,
    contenders: Sequence[str],
    base: str,
    record: Record,
    console: Console,
    named: Sequence[str] = (),
) -> bool:
    """Bench the networks one after another, a table for each; whether ours ran, and the contenders that were `named`.

    Raises:
        ModelSpecError, InvalidInputError, BenchError: as `bench_network`.
        OSError: the record cannot be written.
    """
    check_contenders(contenders, base)
    record.write()
    complete = True
    for network in networks:
        with Console(stderr=True).status(f"bench {network}"):
            rows = bench_network(network, setting, contenders, base)
        record.add("rows", rows)
        console.print(network_table(rows, record.title))
        complete &= _print_errors(rows, console, named)
    return complete


def run_kernels(
    cases: Sequence[Case],
    layers: Sequence[str],
    rounds: int,
    compile_backend: str | None,
    record: Record,
    console: Console,
) -> bool:
    """Bench every layer and then every op alone on the cases, a table for each; whether `ours` ran on all.

    Raises:
        BenchError: as `bench_layer`.
        OSError: the record cannot be written.
    """
    record.write()
    complete = True
    for layer in layers:
        rows = []
        for case in cases:
            with Console(stderr=True).status(f"bench {layer} {shape_text(case.shape)}"):
                rows.append(bench_layer(replace(case, layer=layer), rounds, compile_backend))
            record.add("layers", rows[-1])
        console.print(layer_table(rows, record.title))
        complete &= _print_errors([row for of_case in rows for row in of_case], console)
    ops = []
    for case in cases:
        with Console(stderr=True).status(f"bench ops {shape_text(case.shape)}"):
            ops.append(bench_kernels(case, rounds))
        record.add("kernels", ops[-1])
    console.print(kernel_table(ops, record.title))
    _run_overhead(rounds, record, console)
    return complete


def run_convolutions(layout: str, rounds: int, record: Record, console: Console) -> None:
    """Bench the convolutions that have kernels of ours on the CPU, in one table.

    Raises:
        OSError: the record cannot be written.
    """
    record.write()
    rows = []
    for case in CASES:
        with Console(stderr=True).status(f"bench convolutions {shape_text(case[1])}"):
            found = bench_convolution(*case, layout, rounds)
        record.add("convolutions", found)
        rows += found
    console.print(convolution_table(rows, record.title))


def run_sample_norms(layout: str, rounds: int, record: Record, console: Console) -> None:
    """Bench norms with a sample's own statistics, in one table.

    Raises:
        OSError: the record cannot be written.
    """
    record.write()
    rows = []
    for layer, shapes in sample_norms.CASES.items():
        for shape in shapes:
            own = "contiguous" if layer.startswith("LayerNorm") else layout
            with Console(stderr=True).status(f"bench norms {shape_text(shape)}"):
                rows.append(sample_norms.bench_sample_norm(layer, shape, own, rounds))
            record.add("sample_norms", rows[-1:])
    console.print(sample_norm_table(rows, record.title))


def _run_overhead(rounds: int, record: Record, console: Console) -> None:
    record.rows["call_overhead_microseconds"] = overhead = call_overhead(rounds)
    record.write()
    words = ", ".join(f"{name} {value:.1f}" for name, value in overhead.items())
    console.print(f"one call on a tiny tensor, in µs on the CPU: {words}", markup=False, highlight=False)


def _print_errors(rows: Iterable[Any], console: Console, named: Sequence[str] = ()) -> bool:
    """Say why which contender did not run; whether ours did, within budgets too, and those that were `named`."""
    failed = {(row.contender, row.error): None for row in rows if row.error}
    for contender, error in failed:
        console.print(f"{contender} did not run: {error}", markup=False, highlight=False)
    return not any(contender.partition("@")[0] == "ours" or contender in named for contender, _ in failed)
