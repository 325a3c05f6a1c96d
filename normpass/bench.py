"""`python -m normpass.bench`: step time, kept and peak bytes and rebuilds of whole networks, against eager.

Times are ratios measured side by side in one run, never compared across runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from normpass import measure, models
from normpass._version import __version__
from normpass.api import optimize
from normpass.measure import format_bytes
from normpass.recipe import Rebuilds

NETWORKS = tuple(f"torchvision:{n}" for n in ("resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0"))


@dataclass(frozen=True)
class Row:
    """One network in train mode, float32; bytes and seconds of one step."""

    network: str
    input: tuple[int, ...]
    kept_plain: int
    kept_optimised: int
    peak_plain: int
    peak_optimised: int
    seconds_plain: float
    """median over the rounds"""
    seconds_optimised: float
    ratio: float
    """optimised over plain, round by round: median"""
    ratio_low: float
    """lower quartile"""
    ratio_high: float
    """upper quartile"""
    rebuilds: int
    """tensors rebuilt in one backward"""
    most_rebuilds: int
    """the most often that one tensor is rebuilt in one backward"""


def bench(network: str, shape: tuple[int, ...], device: str = "cpu", rounds: int = 5) -> Row:
    """Measure the network that the name `network` stands for.

    Args:
        network: as for `normpass.models.load`.
        shape: of the one input, (N, C, spatial…).
        device: "cpu" or "cuda".
        rounds: timed steps of each model, plain and optimised in turn.

    Raises:
        ModelSpecError: nothing can be built from `network`.
        InvalidInputError: it does not run on an input of that shape.
    """
    torch.manual_seed(0)
    plain = models.load(network).to(device)
    x = torch.randn(shape, device=device)
    optimised = optimize(plain, x)
    pair = {"plain": plain, "optimised": optimised}
    total, most = count_rebuilds(optimised, x)
    times = measure.step_time(pair, x, rounds=rounds)
    ratio = measure.ratios(times, "plain")["optimised"]
    return Row(
        network=network,
        input=shape,
        kept_plain=measure.kept_bytes(plain, x),
        kept_optimised=measure.kept_bytes(optimised, x),
        peak_plain=measure.peak_bytes(plain, x),
        peak_optimised=measure.peak_bytes(optimised, x),
        seconds_plain=times["plain"].median,
        seconds_optimised=times["optimised"].median,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        rebuilds=total,
        most_rebuilds=most,
    )


def count_rebuilds(optimised: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Rebuilds in one backward: of all tensors together, and the most of any one tensor."""
    with measure.untouched(optimised, x), Rebuilds() as rebuilds:
        optimised(x).square().mean().backward()
    return rebuilds.total, rebuilds.most


def environment(device: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a result was taken with: command, date, device and versions."""
    instructions = torch.backends.cpu.get_cpu_capability()
    cpu = f"CPU {platform.machine()} {instructions}, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", "-m", "normpass.bench", *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else cpu,
        "versions": {"normpass": __version__, "python": platform.python_version(), **_versions()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Bench the networks one after another, print a table and write JSON; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: leave out --device cuda")
    try:
        shape = models.parse_input(options.input)
        shape = (options.batch or shape[0], *shape[1:])
        networks = track(options.model or NETWORKS, console=Console(stderr=True), description="bench")
        rows = [bench(network, shape, options.device, options.rounds) for network in networks]
    except ValueError as error:  # a name, a shape or a network that does not fit
        parser.error(" ".join(str(error).split()))
    found = environment(options.device, arguments)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(rows, found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m normpass.bench", description=__doc__)
    parser.add_argument("--model", action="append", help=f"repeatable (default: {' '.join(NETWORKS)})")
    parser.add_argument("--input", default="2x3x224x224", help="shape of the input (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="another batch size than that of --input")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def _table(rows: Sequence[Row], found: dict[str, Any]) -> Table:
    title = f"optimised against eager: {found['device']}, torch {found['versions']['torch']}"
    table = Table("network", "input", "kept", "", "peak", "", "time / eager", "rebuilds", "of one", title=title)
    for row in rows:
        table.add_row(
            row.network,
            "x".join(map(str, row.input)),
            *_bytes(row.kept_plain, row.kept_optimised),
            *_bytes(row.peak_plain, row.peak_optimised),
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
            str(row.rebuilds),
            str(row.most_rebuilds),
        )
    return table


def _bytes(plain: int, optimised: int) -> tuple[str, str]:
    return f"{format_bytes(plain)} → {format_bytes(optimised)}", f"{optimised / plain:.3f}"


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("torchvision", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
