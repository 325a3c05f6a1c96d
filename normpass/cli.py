"""The command line: `normpass demo`, `normpass explain MODEL`.

Reads the arguments, prints what the library returns. Bad input ends with status 2 and one line on stderr
that says what to do; status 1 means that the work itself failed (the demo's losses differ).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

import normpass
from normpass import demo, models

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Bad arguments get one line, not the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (by default `sys.argv`'s) and return its exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (normpass.NormpassError, models.ModelSpecError) as error:
        return _refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normpass", description="Train with the same numbers and half the activation memory.")
    version = f"normpass {normpass.__version__} (torch {torch.__version__})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo_ = commands.add_parser("demo", help="train plain and optimised side by side and compare")
    demo_.add_argument("--model", default=demo.MODEL, help="a classification network (default: %(default)s)")
    demo_.add_argument("--steps", type=_count, default=demo.STEPS, help="training steps (default: %(default)s)")
    demo_.add_argument("--batch", type=_count, default=demo.BATCH, help="images a step (default: %(default)s)")
    demo_.add_argument("--size", type=_count, default=demo.SIZE, help="pixels a side (default: %(default)s)")
    demo_.add_argument("--out", type=_output, default="normpass-demo.png", help="the plot (default: %(default)s)")
    demo_.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="say what would be rewritten, and why the rest would not")
    explain.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:callable")
    explain.add_argument(
        "--input", type=_shapes, help="shapes of the inputs, as 2x3x224x224: measure kept and peak bytes too"
    )
    explain.add_argument("--json", type=_output, metavar="FILE", help="write the report here as well")
    explain.add_argument("--allow-lossy", action="store_true", help="allow in-place activated batch norm")
    explain.add_argument("--change", action="append", default=[], help="change the model, as `leaky_relu`")
    explain.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: %(default)s)")
    explain.set_defaults(run=_explain)
    return parser


def _demo(options: argparse.Namespace) -> int:
    console = Console()
    result = demo.run(options.model, options.steps, options.batch, options.size, console)
    try:
        demo.plot(result, options.out)
    except OSError as error:
        return _refuse(f"cannot write `{options.out}`: {error.strerror}; name another file with --out")
    console.print(f"memory along the step, before and after: {options.out}")
    return 0 if result.agrees else 1


def _explain(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = models.load(options.model).to(dtype)
    inputs = None if options.input is None else tuple(torch.randn(s, dtype=dtype) for s in options.input)
    try:
        with Console(stderr=True).status("measuring" if inputs else "tracing"):
            report = normpass.explain(model, inputs, changes=options.change, allow_lossy=options.allow_lossy)
    except ValueError as error:  # also of `measure`: a frozen model, an output without floating tensors
        return _refuse(error)
    console = Console()
    console.print(report) if console.is_terminal else print(report)
    if options.json is None:
        return 0
    try:
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    except OSError as error:
        return _refuse(f"cannot write `{options.json}`: {error.strerror}; name another file with --json")
    return 0


def _refuse(reason: object) -> int:
    print(f"normpass: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return _BAD_INPUT


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        return models.parse_inputs(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _output(text: str) -> Path:
    """A file to write to; refused before the work where its folder is missing."""
    path = Path(text)
    if os.path.isdir(path):  # which, unlike `Path.is_dir`, never raises
        raise argparse.ArgumentTypeError(f"`{text}` is a folder: name a file in it")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"no folder `{path.parent}`: create it first")
    return path
