"""What the arguments of every command share: how they are read, how what is wrong with them is said, exit statuses.

Bad input ends with status 2 and one line on stderr that says what to do; status 1 means that the work itself failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from normpass import models
from normpass.budget.step_plan import parse_budget
from normpass.errors import InvalidInputError
from normpass.files import write_json
from normpass.passes import CHANGES

FAILED = 1
BAD_INPUT = 2
_WIDE = 160  # columns of a table that goes into a file


class Parser(argparse.ArgumentParser):
    """Bad arguments get one line, not the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def size_in_bytes(text: str) -> int:
    """`10MiB` in bytes."""
    try:
        return parse_budget(text, 0)
    except InvalidInputError as error:
        raise argparse.ArgumentTypeError(f"`{text}` is not a size such as 10MiB") from error


def budget(text: str) -> float | str:
    """A share of what plain keeps, or what `normpass.plan` takes as text."""
    try:
        given: float | str = float(text)
    except ValueError:
        given = text
    try:
        parse_budget(given, 1)
    except InvalidInputError as error:
        raise argparse.ArgumentTypeError(
            f"`{text}` is not a budget: write a share of what plain keeps, as 0.5, or a size, as 12GB"
        ) from error
    return given


def change(text: str) -> str:
    """The name of one change."""
    if text not in CHANGES:
        raise argparse.ArgumentTypeError(
            f'"{text}" is not known; known are {", ".join(CHANGES)}; for several repeat the option'
        )
    return text


def picture(text: str) -> Path:
    """A PNG file to write to."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"`{text}` is not the name of a PNG file: let it end in .png")
    return output(text)


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in text.split(",") if name]


def shape(text: str) -> tuple[int, ...]:
    """`2x3x224x224`."""
    try:
        return models.parse_input(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def image_shape(text: str) -> tuple[int, ...]:
    """A shape of four sizes."""
    sizes = shape(text)
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"`{text}` is not a shape of an image: write 4 sizes, like 16x64x56x56")
    return sizes


def shapes(text: str) -> list[tuple[int, ...]]:
    """Shapes of several inputs."""
    sizes = text.split(",")
    if len(sizes) > 2 and all(size.strip().isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"`{text:.80}` are {len(sizes)} inputs of one size each: the sizes of one are joined by x, like 2x3x224x224"
        )
    try:
        return models.parse_inputs(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output(text: str) -> Path:
    """A file to write to; refused before the work where its folder is missing."""
    path = Path(text)
    if os.path.isdir(path):  # which, unlike `Path.is_dir`, never raises
        raise argparse.ArgumentTypeError(f"`{text}` is a folder: name a file in it")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"no folder `{path.parent}`: create it first")
    return path


def console() -> Console:
    """The terminal, or a file that takes wide tables."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def write_report(path: Path | None, content: object, option: str = "--json") -> int:
    """Write a JSON file where one was named; the exit status."""
    try:
        if path is not None:
            write_json(path, content)
    except OSError as error:
        return cannot_write(path, error, option)
    return 0


def cannot_write(path: Path | None, error: OSError, option: str) -> int:
    """Say that a file cannot be written; the exit status."""
    return refuse(f"cannot write `{path}`: {error.strerror}; name another file with {option}")


def refuse(reason: object) -> int:
    """Say in one line what is wrong; the exit status."""
    print(f"normpass: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return BAD_INPUT
