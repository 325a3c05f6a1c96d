"""`normpass bench`: whole networks, the kernels, convolutions, budgets, bytes and sub-batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import normpass
from normpass import models
from normpass.bench import run as bench
from normpass.bench import serialized
from normpass.bench.contenders import COMPILED, CONTENDERS, FRONTIER
from normpass.bench.layers import DEFAULT_SHAPES, LAYERS, LAYOUTS, Case
from normpass.bench.networks import NETWORKS, Setting
from normpass.bench.norm_bytes import byte_rows
from normpass.bench.tables import byte_table, frontier_points
from normpass.cli import arguments
from normpass.cli.arguments import FAILED, cannot_write, console, refuse
from normpass.environment import environment
from normpass.report.plots import plot_frontier

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands below `normpass bench`."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (add, words) in _benchmarks().items():
        add(commands.add_parser(name, help=words))


def with_benchmark(words: list[str]) -> list[str]:
    """`bench MODEL…` is `bench networks MODEL…`."""
    known = (*_benchmarks(), "-h", "--help")
    return words if words[1:2] and words[1] in known else [words[0], "networks", *words[1:]]


def _benchmarks() -> dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]]:
    """What stands behind `bench`: its arguments and what it does."""
    return {
        "networks": (_add_networks, "time, kept and peak bytes of whole networks (the default)"),
        "kernels": (_add_kernels, "batch norm and activation, and each op alone"),
        "convolutions": (_add_convolutions, "convolutions that have kernels on the CPU, beside the vendor's"),
        "norms": (_add_norms, "group, instance and layer norm with an activation, on the CPU"),
        "frontier": (_add_frontier, "time against memory over a sweep of budgets"),
        "bytes": (_add_bytes, "bytes that the norms of a step move on CUDA, without a GPU"),
        "serialized": (_add_serialized, "sub-batches around the size of the device's cache"),
    }


def _add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help=f"as for explain (default: {' '.join(NETWORKS)})")
    parser.add_argument(
        "--input", type=arguments.shape, default="2x3x224x224", help="shape of the one input (default: %(default)s)"
    )
    parser.add_argument("--batch", type=arguments.count, help="another batch than that of --input")
    parser.add_argument("--channels-last", action="store_true", help="convert network and input to channels_last")
    parser.add_argument(
        "--with", dest="contenders", type=arguments.names, metavar="NAMES", help=f"contenders: {','.join(CONTENDERS)}"
    )
    parser.add_argument("--compile", action="store_true", help=f"and {', '.join(COMPILED)}: about a minute each")
    parser.add_argument("--base", metavar="NAME", help="whose times to compare with (default: eager in the layout)")
    _add_common(parser, rounds=5)
    parser.set_defaults(run=_networks)


def _add_frontier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for explain")
    parser.add_argument(
        "--input", type=arguments.shape, default="2x3x224x224", help="shape of the one input (default: %(default)s)"
    )
    parser.add_argument("--channels-last", action="store_true", help="convert network and input to channels_last")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile: about a minute each")
    parser.add_argument("--plot", type=arguments.picture, metavar="PNG", help="draw it here")
    _add_common(parser, rounds=7)
    parser.set_defaults(run=_frontier)


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", type=arguments.image_shape, nargs="+", help="of x, as 16x64x56x56 (default: ResNet-50's)"
    )
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last", help="(default: %(default)s)")
    parser.add_argument("--layer", choices=tuple(LAYERS), nargs="+", default=["bn_relu"], help="(default: bn_relu)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile: seconds a shape")
    _add_common(parser, rounds=10)
    parser.set_defaults(run=_kernels)


def _add_convolutions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=arguments.count, default=10, help="samples of each (default: %(default)s)")
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_convolutions)


def _add_norms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="contiguous", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=arguments.count, default=10, help="samples of each (default: %(default)s)")
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_norms)


def _add_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for explain")
    words = "shape of the one input (default: %(default)s)"
    parser.add_argument("--input", type=arguments.shape, default="256x3x224x224", help=words)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="(default: %(default)s)")
    words = "fractions of what the plain model keeps, to plan for (default: 0.8)"
    parser.add_argument("--budget", type=float, nargs="+", default=[0.8], metavar="FRACTION", help=words)
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_bytes)


def _add_serialized(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--batch", type=arguments.count, default=16, help="(default: %(default)s)")
    words = "height and width of the images of the deep table (default: %(default)s)"
    parser.add_argument("--size", type=arguments.count, default=224, help=words)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=arguments.count, default=5, help="samples of each (default: %(default)s)")
    both = ["exact", "deep"]
    parser.add_argument("--tables", nargs="+", default=both, choices=both, help="(default: both)")
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the figures here as well")
    parser.set_defaults(run=_serialized)


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the activations (default: float32; bfloat16 for kernels on a GPU); a network narrows by autocast",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=arguments.count, default=rounds, help="samples of each (default: %(default)s)")
    parser.add_argument("--json", type=arguments.output, metavar="FILE", help="write the figures here as well")


def _networks(options: argparse.Namespace) -> int:
    _check_device(options.device)
    shape = (options.batch or options.input[0], *options.input[1:])
    dtype = getattr(torch, options.dtype or "float32")
    setting = Setting(shape, dtype, options.channels_last, options.device, options.rounds)
    contenders = [*(options.contenders or setting.default_contenders), *(COMPILED if options.compile else ())]
    record = bench.Record(options.json, environment(options.device, options.given))
    base = options.base or setting.default_base
    try:
        named = (*(options.contenders or ()), *(COMPILED if options.compile else ()))
        networks = options.model or NETWORKS
        complete = bench.run_networks(networks, setting, contenders, base, record, console(), named)
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    except ValueError as error:  # of `measure`: a frozen model, an output without floating tensors
        return refuse(error)
    return 0 if complete else FAILED


def _frontier(options: argparse.Namespace) -> int:
    _check_device(options.device)
    dtype = getattr(torch, options.dtype or "float32")
    setting = Setting(options.input, dtype, options.channels_last, options.device, options.rounds)
    names = [name for name in FRONTIER if not (options.no_compile and name.startswith("compile"))]
    record = bench.Record(options.json, environment(options.device, options.given))
    try:
        complete = bench.run_networks([options.model], setting, names, setting.default_base, record, console())
        if options.plot:
            plot_frontier(frontier_points(record.rows["rows"]), f"{options.model}: {record.title}", options.plot)
    except OSError as error:
        return cannot_write(options.json or options.plot, error, "--json or --plot")
    except ValueError as error:
        return refuse(error)
    return 0 if complete else FAILED


def _kernels(options: argparse.Namespace) -> int:
    _check_device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    shapes = options.shape or [models.parse_input(text) for text in DEFAULT_SHAPES[options.device]]
    device = torch.device(options.device)
    cases = [Case(options.layer[0], shape, dtype, options.layout, device) for shape in shapes]
    record = bench.Record(options.json, environment(options.device, options.given))
    backend = None if options.no_compile else "inductor"
    try:
        complete = bench.run_kernels(cases, options.layer, options.rounds, backend, record, console())
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    return 0 if complete else FAILED


def _convolutions(options: argparse.Namespace) -> int:
    record = bench.Record(options.json, environment("cpu", options.given))
    try:
        bench.run_convolutions(options.layout, options.rounds, record, console())
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    return 0


def _norms(options: argparse.Namespace) -> int:
    record = bench.Record(options.json, environment("cpu", options.given))
    try:
        bench.run_sample_norms(options.layout, options.rounds, record, console())
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    return 0


def _bytes(options: argparse.Namespace) -> int:
    record = bench.Record(options.json, environment("cpu", options.given))
    try:
        rows = byte_rows(
            options.model, models.load(options.model), options.input, getattr(torch, options.dtype), options.budget
        )
        record.add("bytes", rows)
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    console().print(byte_table(rows))
    return 0


def _serialized(options: argparse.Namespace) -> int:
    _check_device(options.device)
    record = bench.Record(options.json, environment(options.device, options.given))
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    try:
        record.write()
        for row in serialized.rows(options.tables, options.batch, options.size, dtype, device, options.rounds):
            print(serialized.format_row(row), flush=True)
            record.add("rows", [row])
    except OSError as error:
        return cannot_write(options.json, error, "--json")
    return 0


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise normpass.NormpassError("torch sees no CUDA device: leave out --device cuda")
