"""The command line: `normpass demo`, `explain MODEL`, `convert MODEL OUT`, `bench [MODEL…]`,
`bench kernels`, `bench convolutions`, `bench frontier MODEL`, `bench bytes MODEL`, `kernels`.

Reads the arguments, prints what the library returns. Bad input ends with status 2 and one line on stderr
that says what to do; status 1 means that the work itself failed (the demo's losses differ, ours did not run).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from torch import nn

import normpass
from normpass import bench, cli_convert, demo, kernels, measure, models, passes
from normpass.bench_bytes import byte_rows
from normpass.bench_layers import DEFAULT_SHAPES, LAYERS, LAYOUTS, Case
from normpass.bench_networks import NETWORKS, Setting
from normpass.bench_tables import byte_table, frontier_points
from normpass.contenders import COMPILED, CONTENDERS, FRONTIER
from normpass.environment import environment, last_level_cache, openmp_runtimes
from normpass.files import write_json
from normpass.plots import Curve, plot_frontier, plot_memory
from normpass.step_plan import parse_budget
from normpass.traffic import traffic_report

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_BENCH_DTYPES = ("float32", "bfloat16", "float16")
_BAD_INPUT = 2
_FAILED = 1
_BENCHES = ("kernels", "convolutions", "frontier", "bytes")
_WIDE = 160  # columns of a table that goes into a file


class _Parser(argparse.ArgumentParser):
    """Bad arguments get one line, not the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (by default `sys.argv`'s) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = shlex.join(["normpass", *arguments])
    if arguments[:1] == ["bench"] and arguments[1:2] and arguments[1] in _BENCHES:  # else argparse takes it for a model
        arguments[:2] = [" ".join(arguments[:2])]
    options = _parser().parse_args(arguments)
    options.given = given
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
    _add_demo(commands.add_parser("demo", help="train plain and optimised side by side and compare"))
    _add_explain(commands.add_parser("explain", help="say what would be rewritten, and why the rest would not"))
    words = "write a trained model as ONNX, torch.export or weights, verified"
    cli_convert.add_arguments(commands.add_parser("convert", help=words), _shapes, _output)
    _add_bench(commands.add_parser("bench", help="time, kept and peak bytes of whole networks, side by side"))
    _add_bench_kernels(commands.add_parser("bench kernels", help="batch norm and activation, and each op alone"))
    words = "convolutions that have kernels on the CPU, beside the vendor's"
    _add_bench_convolutions(commands.add_parser("bench convolutions", help=words))
    _add_bench_frontier(commands.add_parser("bench frontier", help="time against memory over a sweep of budgets"))
    _add_bench_bytes(
        commands.add_parser("bench bytes", help="bytes that the norms of a step move on CUDA, without a GPU")
    )
    kernels_ = commands.add_parser("kernels", help="say which kernels are there, and why others are not")
    kernels_.add_argument("--json", type=_output, metavar="FILE", help="write it here as well")
    kernels_.set_defaults(run=_kernels)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=demo.MODEL, help="a classification network (default: %(default)s)")
    parser.add_argument("--steps", type=_count, default=demo.STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=_count, default=demo.BATCH, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=_count, default=demo.SIZE, help="pixels a side (default: %(default)s)")
    parser.add_argument("--out", type=_output, default="normpass-demo.png", help="the plot (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:callable")
    parser.add_argument(
        "--input",
        type=_shapes,
        help="shapes of the inputs, as 2x3x224x224 (the default of torchvision and timm; without it norms are listed)",
    )
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the report here as well")
    parser.add_argument(
        "--budget", type=_budget, metavar="B", help="plan for this much kept memory: 0.5 of plain, or 12GB"
    )
    parser.add_argument("--tune", action="store_true", help="measure what rebuilding takes, for --budget")
    parser.add_argument("--plan", type=_output, metavar="FILE", help="write the plan for --budget here, as JSON")
    parser.add_argument("--plot", type=_output, metavar="PNG", help="draw the memory along a step, plain and optimised")
    parser.add_argument("--serialize", action="store_true", help="run chains of layers sub-batch by sub-batch")
    parser.add_argument("--traffic", action="store_true", help="and say what moves to and from memory, modelled")
    parser.add_argument(
        "--buffer", type=_bytes, metavar="SIZE", help="what a sub-batch may take, as 10MiB (default: the last cache)"
    )
    parser.add_argument("--allow-lossy", action="store_true", help="allow in-place activated batch norm")
    parser.add_argument("--no-winograd", action="store_true", help="leave 3x3 convolutions to torch")
    parser.add_argument("--change", action="append", default=[], help="change the model, as `leaky_relu`")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: %(default)s)")
    parser.set_defaults(run=_explain)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help=f"as for explain (default: {' '.join(NETWORKS)})")
    parser.add_argument(
        "--input", type=_shape, default="2x3x224x224", help="shape of the one input (default: %(default)s)"
    )
    parser.add_argument("--batch", type=_count, help="another batch than that of --input")
    parser.add_argument("--channels-last", action="store_true", help="convert network and input to channels_last")
    parser.add_argument(
        "--with", dest="contenders", type=_names, metavar="NAMES", help=f"contenders: {','.join(CONTENDERS)}"
    )
    parser.add_argument("--compile", action="store_true", help=f"and {', '.join(COMPILED)}: about a minute each")
    parser.add_argument("--base", metavar="NAME", help="whose times to compare with (default: eager in the layout)")
    _add_common(parser, rounds=5)
    parser.set_defaults(run=_bench)


def _add_bench_frontier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for explain")
    parser.add_argument(
        "--input", type=_shape, default="2x3x224x224", help="shape of the one input (default: %(default)s)"
    )
    parser.add_argument("--channels-last", action="store_true", help="convert network and input to channels_last")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile: about a minute each")
    parser.add_argument("--plot", type=_output, metavar="PNG", help="draw it here")
    _add_common(parser, rounds=7)
    parser.set_defaults(run=_bench_frontier)


def _add_bench_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=_image_shape, nargs="+", help="of x, as 16x64x56x56 (default: ResNet-50's)")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last", help="(default: %(default)s)")
    parser.add_argument("--layer", choices=tuple(LAYERS), nargs="+", default=["bn_relu"], help="(default: bn_relu)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile: seconds a shape")
    _add_common(parser, rounds=10)
    parser.set_defaults(run=_bench_kernels)


def _add_bench_convolutions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=10, help="samples of each (default: %(default)s)")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_bench_convolutions)


def _add_bench_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for explain")
    words = "shape of the one input (default: %(default)s)"
    parser.add_argument("--input", type=_shape, default="256x3x224x224", help=words)
    parser.add_argument("--dtype", choices=_BENCH_DTYPES, default="bfloat16", help="(default: %(default)s)")
    words = "fractions of what the plain model keeps, to plan for (default: 0.8)"
    parser.add_argument("--budget", type=float, nargs="+", default=[0.8], metavar="FRACTION", help=words)
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_bench_bytes)


def _bench_bytes(options: argparse.Namespace) -> int:
    record = bench.Record(options.json, environment("cpu", options.given))
    try:
        rows = byte_rows(
            options.model, models.load(options.model), options.input, getattr(torch, options.dtype), options.budget
        )
        record.add("bytes", rows)
    except OSError as error:
        return _cannot_write(options.json, error, "--json")
    _console().print(byte_table(rows))
    return 0


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--dtype",
        choices=_BENCH_DTYPES,
        help="of the activations (default: float32; bfloat16 for kernels on a GPU); a network narrows by autocast",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=rounds, help="samples of each (default: %(default)s)")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the figures here as well")


def _demo(options: argparse.Namespace) -> int:
    console = Console()
    result = demo.run(options.model, options.steps, options.batch, options.size, console)
    try:
        demo.plot(result, options.out)
    except OSError as error:
        return _cannot_write(options.out, error, "--out")
    console.print(f"memory along the step, before and after: {options.out}")
    return 0 if result.agrees else _FAILED


def _explain(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = models.load(options.model).to(dtype)
    default = models.default_input(options.model, model)
    if options.input is None and default is not None:
        options.input = [default]
    if options.plot and options.input is None:
        raise normpass.InvalidInputError("--plot needs --input: memory depends on the shapes")
    if options.traffic and len(options.input or ()) != 1:
        raise normpass.InvalidInputError("--traffic needs --input, the shape of one tensor")
    inputs = None if options.input is None else tuple(torch.randn(s, dtype=dtype) for s in options.input)
    try:
        with Console(stderr=True).status("measuring"):
            serialize = passes.SerializeMinibatch(options.buffer) if options.serialize else False
            chosen = {"changes": options.change, "allow_lossy": options.allow_lossy, "serialize": serialize}
            chosen["winograd"] = not options.no_winograd
            report = normpass.explain(model, inputs, memory_budget=options.budget, tune=options.tune, **chosen)
            curves = _curves(model, inputs or (), report, chosen) if options.plot else ()
    except ValueError as error:  # also of `measure`: a frozen model, an output without floating tensors
        return _refuse(error)
    console = Console()
    console.print(report) if console.is_terminal else print(report)
    if options.traffic:
        print(_traffic(model, options, dtype))
    try:
        if options.plot:
            plot_memory(curves, f"Memory along one training step: {options.model}", options.plot)
    except OSError as error:
        return _cannot_write(options.plot, error, "--plot")
    if (
        options.plan
        and report.plan is not None
        and (failed := _write_json(options.plan, report.plan.to_json(), "--plan"))
    ):
        return failed
    return _write_json(options.json, report.to_json())


def _traffic(model: nn.Module, options: argparse.Namespace, dtype: torch.dtype) -> str:
    size = options.buffer or last_level_cache(torch.device("cpu"))
    return traffic_report(model, options.input[0], dtype=dtype, buffer_bytes=size)


def _curves(model: nn.Module, inputs: Sequence[torch.Tensor], report: normpass.Report, chosen: dict) -> list[Curve]:
    """Memory along one step of the model as it is and as the report describes it, in train mode."""
    optimised = normpass.optimize(model, plan=report.plan, **chosen)
    both = {"plain": model.train(), "optimised": optimised.train()}
    return [Curve(n, measure.kept_bytes(m, *inputs), measure.memory_timeline(m, *inputs)) for n, m in both.items()]


def _bench(options: argparse.Namespace) -> int:
    _check_device(options.device)
    shape = (options.batch or options.input[0], *options.input[1:])
    dtype = getattr(torch, options.dtype or "float32")
    setting = Setting(shape, dtype, options.channels_last, options.device, options.rounds)
    contenders = [*(options.contenders or setting.default_contenders), *(COMPILED if options.compile else ())]
    record = bench.Record(options.json, environment(options.device, options.given))
    base = options.base or setting.default_base
    try:
        complete = bench.run_networks(options.model or NETWORKS, setting, contenders, base, record, _console())
    except OSError as error:
        return _cannot_write(options.json, error, "--json")
    except ValueError as error:  # of `measure`: a frozen model, an output without floating tensors
        return _refuse(error)
    return 0 if complete else _FAILED


def _bench_frontier(options: argparse.Namespace) -> int:
    _check_device(options.device)
    dtype = getattr(torch, options.dtype or "float32")
    setting = Setting(options.input, dtype, options.channels_last, options.device, options.rounds)
    names = [name for name in FRONTIER if not (options.no_compile and name.startswith("compile"))]
    record = bench.Record(options.json, environment(options.device, options.given))
    try:
        complete = bench.run_networks([options.model], setting, names, setting.default_base, record, _console())
        if options.plot:
            plot_frontier(frontier_points(record.rows["rows"]), f"{options.model}: {record.title}", options.plot)
    except OSError as error:
        return _cannot_write(options.json or options.plot, error, "--json or --plot")
    except ValueError as error:
        return _refuse(error)
    return 0 if complete else _FAILED


def _bench_kernels(options: argparse.Namespace) -> int:
    _check_device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    shapes = options.shape or [models.parse_input(text) for text in DEFAULT_SHAPES[options.device]]
    device = torch.device(options.device)
    cases = [Case(options.layer[0], shape, dtype, options.layout, device) for shape in shapes]
    record = bench.Record(options.json, environment(options.device, options.given))
    backend = None if options.no_compile else "inductor"
    try:
        complete = bench.run_kernels(cases, options.layer, options.rounds, backend, record, _console())
    except OSError as error:
        return _cannot_write(options.json, error, "--json")
    return 0 if complete else _FAILED


def _bench_convolutions(options: argparse.Namespace) -> int:
    record = bench.Record(options.json, environment("cpu", options.given))
    try:
        bench.run_convolutions(options.layout, options.rounds, record, _console())
    except OSError as error:
        return _cannot_write(options.json, error, "--json")
    return 0


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
    return _write_json(options.json, found)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise normpass.NormpassError("torch sees no CUDA device: leave out --device cuda")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def _write_json(path: Path | None, content: object, option: str = "--json") -> int:
    try:
        if path is not None:
            write_json(path, content)
    except OSError as error:
        return _cannot_write(path, error, option)
    return 0


def _cannot_write(path: Path | None, error: OSError, option: str) -> int:
    return _refuse(f"cannot write `{path}`: {error.strerror}; name another file with {option}")


def _refuse(reason: object) -> int:
    print(f"normpass: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return _BAD_INPUT


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def _bytes(text: str) -> int:
    try:
        return parse_budget(text, 0)
    except normpass.InvalidInputError as error:
        raise argparse.ArgumentTypeError(f"`{text}` is not a size such as 10MiB") from error


def _budget(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _shape(text: str) -> tuple[int, ...]:
    try:
        return models.parse_input(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _image_shape(text: str) -> tuple[int, ...]:
    shape = _shape(text)
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(f"`{text}` is not a shape of an image: write 4 sizes, like 16x64x56x56")
    return shape


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
