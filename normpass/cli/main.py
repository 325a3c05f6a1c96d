"""The command line: `normpass demo`, `explain MODEL`, `convert MODEL OUT`, `bench …`, `kernels`.

Reads the arguments, prints what the library returns. Bad input ends with status 2 and one line on stderr
that says what to do; status 1 means that the work itself failed (the demo's losses differ; ours, or a contender that
was named, did not run).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

import normpass
from normpass import kernels
from normpass.cli import bench, convert, explain
from normpass.cli.arguments import FAILED, Parser, cannot_write, count, output, refuse, write_report
from normpass.demo import training as demo
from normpass.environment import openmp_runtimes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (by default `sys.argv`'s) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(bench.with_benchmark(words) if words[:1] == ["bench"] else words)
    options.given = shlex.join(["normpass", *words])
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except normpass.NormpassError as error:
        return refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="normpass", description="Train with the same numbers and half the activation memory.")
    version = f"normpass {normpass.__version__} (torch {torch.__version__})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train plain and optimized side by side and compare"))
    words = "say what would be rewritten, and why the rest would not"
    explain.add_arguments(commands.add_parser("explain", help=words))
    words = "write a trained model as ONNX, torch.export or weights, verified"
    convert.add_arguments(commands.add_parser("convert", help=words))
    words = "measure: whole networks side by side, or kernels, convolutions, budgets, bytes, sub-batches"
    bench.add_arguments(commands.add_parser("bench", help=words))
    kernels_ = commands.add_parser("kernels", help="say which kernels are there, and why others are not")
    kernels_.add_argument("--json", type=output, metavar="FILE", help="write it here as well")
    kernels_.set_defaults(run=_kernels)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=demo.MODEL, help="a classification network (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=demo.STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=demo.BATCH, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=count, default=demo.SIZE, help="pixels a side (default: %(default)s)")
    parser.add_argument("--out", type=output, default="normpass-demo.png", help="the plot (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    console = Console()
    result = demo.run(options.model, options.steps, options.batch, options.size, console)
    try:
        demo.plot(result, options.out)
    except OSError as error:
        return cannot_write(options.out, error, "--out")
    console.print(f"memory along the step, before and after: {options.out}")
    return 0 if result.agrees else FAILED


def _kernels(options: argparse.Namespace) -> int:
    rows = [row._asdict() for row in kernels.status()]
    for row in rows:
        print(f"{row['device']:5} {'kernels' if row['available'] else 'no kernels'}: {row['words']}")
    runtimes = openmp_runtimes()
    if runtimes is not None:
        print(f"OpenMP runtimes in this process ({len(runtimes)}): {', '.join(runtimes) or 'none'}")
        if len(runtimes) > 1:
            print("each has threads of its own, together more than there are cores: leave out what loads the second")
    found = {"kernels": rows, "threads": torch.get_num_threads(), "openmp": runtimes}
    return write_report(options.json, found)
