"""`normpass convert MODEL OUT` and `normpass convert --from-onnx IN.onnx OUT.onnx`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from normpass import models
from normpass.cli.arguments import FAILED, output, shapes
from normpass.conversion.convert import Conversion, convert
from normpass.conversion.from_onnx import convert_onnx
from normpass.conversion.weights import load_weights
from normpass.errors import ConversionError, InvalidInputError
from normpass.files import appearing, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.usage = (
        "normpass convert MODEL OUT --input 1x3x224x224 [options]\n"
        "       normpass convert --from-onnx IN.onnx OUT.onnx [--report FILE]"
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="MODEL OUT",
        help="torchvision:NAME, timm:NAME, package.module:callable or a file with a whole model; "
        "the file to write, .onnx, .pt2 or .safetensors",
    )
    parser.add_argument("--from-onnx", type=Path, metavar="IN.onnx", help="fold and fuse an ONNX graph instead")
    parser.add_argument("--input", type=shapes, help="shapes of the inputs, as 1x3x224x224")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, or a torch.save'd state_dict")
    parser.add_argument("--opset", type=int, metavar="N", help="of the ONNX operators (default: torch's)")
    parser.add_argument("--dynamic-batch", action="store_true", help="let the batch have any size")
    parser.add_argument("--report", type=output, metavar="FILE", help="write what was done here, as JSON")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="load MODEL from a file of torch.save, which runs its code"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, print what was done; the exit status."""
    try:
        with contextlib.ExitStack() as stack:
            report = None if options.report is None else stack.enter_context(appearing(options.report))
            with Console(stderr=True).status("converting"):
                result = _from_onnx(options) if options.from_onnx is not None else _from_model(options)
            if report is not None:
                write_json(report, result.to_json())
    except ConversionError as error:
        print(f"normpass: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    print(result)
    return 0


def _from_onnx(options: argparse.Namespace) -> Conversion:
    given = [name for name in ("input", "weights", "opset") if getattr(options, name) is not None]
    given += [name for name in ("dynamic_batch", "trust_pickle") if getattr(options, name)]
    if given:
        raise InvalidInputError(f"--{given[0].replace('_', '-')} does not go with --from-onnx: leave it out")
    if len(options.names) != 1:
        raise InvalidInputError("write `normpass convert --from-onnx IN.onnx OUT.onnx`")
    return convert_onnx(options.from_onnx, options.names[0])


def _from_model(options: argparse.Namespace) -> Conversion:
    if len(options.names) != 2:
        raise InvalidInputError("write `normpass convert MODEL OUT --input 1x3x224x224`")
    spec, out = options.names
    torch.manual_seed(0)
    model = _whole_model(Path(spec), options.trust_pickle) if Path(spec).is_file() else models.load(spec)
    if options.weights is not None:
        load_weights(model, options.weights)
    inputs = None if options.input is None else tuple(torch.randn(shape) for shape in options.input)
    return convert(model, out, inputs, opset=options.opset, dynamic_batch=options.dynamic_batch)


def _whole_model(path: Path, is_trusted: bool) -> nn.Module:
    """The module in a file of `torch.save(model, path)`, plain or optimized."""
    if not is_trusted:
        raise InvalidInputError(
            f"`{path}` as MODEL would run the code in it: add --trust-pickle if you know where it is from, "
            "or name the model's builder and give the file with --weights"
        )
    try:
        with models.current_directory_on_path():
            model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise InvalidInputError(f"`{path}` cannot be loaded ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"`{path}` holds a {type(model).__name__}, no whole model: name the model's builder and give the file "
            "with --weights"
        )
    return model
