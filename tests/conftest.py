"""Options and fixtures of the test suite."""

from __future__ import annotations

import datetime
import gc
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 - before the heap is frozen

from normpass.capture import raising

PACKAGES = ("torch", "torchvision", "timm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="write the tables of the long sweeps here, a JSON file for each table and torch version",
    )


class Results:
    """The tables of one run: rows of plain values, gathered by the tests and written at its end."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict]] = {}

    def add(self, table: str, row: dict) -> None:
        self.tables.setdefault(table, []).append(row)

    def write(self, folder: Path) -> None:
        """`TABLE_torch-VERSION.json` for each table: the date, the versions of the packages, the rows."""
        folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in PACKAGES}
        release = versions["torch"].split("+")[0]
        for table, rows in self.tables.items():
            result = {"date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}
            (folder / f"{table}_torch-{release}.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Where the long sweeps put their rows; `--results DIR` writes them."""
    gathered = Results()
    yield gathered
    folder: Path | None = request.config.getoption("--results")
    if folder is not None:
        gathered.write(folder)


@pytest.fixture(scope="session", autouse=True)
def frozen_heap() -> None:
    """`kept_bytes` collects garbage, which takes half a second where all that torch has imported is looked through.

    Dynamo makes so many objects that Python's own collections, one after 700 new ones, are a tenth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def rewriting_errors_are_raised() -> Iterator[None]:
    """No test passes because a graph that could not be rewritten ran as it was."""
    with raising():
        yield
