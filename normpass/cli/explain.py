"""`normpass explain MODEL`: what would be rewritten, why the rest would not, plans, plots and traffic."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

import normpass
from normpass import measure, models, passes
from normpass.cli import arguments
from normpass.cli.arguments import cannot_write, refuse, write_report
from normpass.environment import last_level_cache
from normpass.report.plots import Curve, plot_memory
from normpass.serialize.traffic import traffic_report

_DTYPES = ("float32", "float64", "bfloat16", "float16")


_NEED_INPUT = ("plot", "budget", "serialize", "change", "allow_lossy", "no_winograd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:callable")
    parser.add_argument(
        "--input",
        type=arguments.shapes,
        help="shapes of the inputs, as 2x3x224x224 (the default of torchvision and timm; without it norms are listed)",
    )
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the report here as well")
    parser.add_argument(
        "--budget", type=arguments.budget, metavar="B", help="plan for this much kept memory: 0.5 of plain, or 12GB"
    )
    parser.add_argument("--tune", action="store_true", help="measure what rebuilding takes, for --budget")
    parser.add_argument(
        "--plan", type=arguments.output, metavar="FILE", help="write the plan for --budget here, as JSON"
    )
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="PNG", help="draw the memory along a step, plain and optimized"
    )
    parser.add_argument("--serialize", action="store_true", help="run chains of layers sub-batch by sub-batch")
    parser.add_argument("--traffic", action="store_true", help="and say what moves to and from memory, modelled")
    parser.add_argument(
        "--buffer",
        type=arguments.size_in_bytes,
        metavar="SIZE",
        help="what a sub-batch may take, as 10MiB (default: the last cache)",
    )
    parser.add_argument("--allow-lossy", action="store_true", help="allow in-place activated batch norm")
    parser.add_argument("--no-winograd", action="store_true", help="leave 3x3 convolutions to torch")
    parser.add_argument(
        "--change",
        type=arguments.change,
        action="append",
        default=[],
        help="change the model, as `leaky_relu`; may be repeated",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: %(default)s)")
    parser.set_defaults(run=run)


def _check_partners(options: argparse.Namespace) -> None:
    """Refuse what has no effect without another option."""
    for option, others in (("plan", ("budget",)), ("tune", ("budget",)), ("buffer", ("serialize", "traffic"))):
        if getattr(options, option) and not any(getattr(options, other) for other in others):
            words = " or ".join(f"--{other}" for other in others)
            raise normpass.InvalidInputError(f"--{option} does nothing without {words}: add it, or leave it out")


def run(options: argparse.Namespace) -> int:
    """Explain, draw and write what was asked for; the exit status."""
    _check_partners(options)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = models.load(options.model).to(dtype)
    default = models.default_input(options.model, model)
    if options.input is None and default is not None:
        options.input = [default]
    if options.traffic and len(options.input or ()) != 1:
        raise normpass.InvalidInputError("--traffic needs --input, the shape of one tensor")
    for option in _NEED_INPUT if options.input is None else ():
        if getattr(options, option):
            raise normpass.InvalidInputError(
                f"--{option.replace('_', '-')} needs --input: without one nothing runs, and the norms are listed only"
            )
    inputs = None if options.input is None else tuple(torch.randn(s, dtype=dtype) for s in options.input)
    try:
        with Console(stderr=True).status("measuring"):
            serialize = passes.SerializeMinibatch(options.buffer) if options.serialize else False
            chosen = {"changes": options.change, "allow_lossy": options.allow_lossy, "serialize": serialize}
            chosen["winograd"] = not options.no_winograd
            report = normpass.explain(model, inputs, memory_budget=options.budget, tune=options.tune, **chosen)
            curves = _curves(model, inputs or (), report, chosen) if options.plot else ()
    except ValueError as error:  # also of `measure`: a frozen model, an output without floating tensors
        return refuse(error)
    console = Console()
    console.print(report) if console.is_terminal else print(report)
    if options.traffic:
        print(_traffic(model, options, dtype))
    try:
        if options.plot:
            plot_memory(curves, f"Memory along one training step: {options.model}", options.plot)
    except OSError as error:
        return cannot_write(options.plot, error, "--plot")
    if (
        options.plan
        and report.plan is not None
        and (failed := write_report(options.plan, report.plan.to_json(), "--plan"))
    ):
        return failed
    return write_report(options.json, report.to_json())


def _traffic(model: nn.Module, options: argparse.Namespace, dtype: torch.dtype) -> str:
    if options.change:
        model = normpass.restore(normpass.optimize(model, changes=options.change), keep_changes=True)
    size = options.buffer or last_level_cache(torch.device("cpu"))
    return traffic_report(model, options.input[0], dtype=dtype, buffer_bytes=size)


def _curves(model: nn.Module, inputs: Sequence[torch.Tensor], report: normpass.Report, chosen: dict) -> list[Curve]:
    """Memory along one step of the model as it is and as the report describes it, in train mode."""
    optimized = normpass.optimize(model, plan=report.plan, **chosen)
    both = {"plain": model.train(), "optimized": optimized.train()}
    return [Curve(n, measure.kept_bytes(m, *inputs), measure.memory_timeline(m, *inputs)) for n, m in both.items()]
