"""Options and fixtures of the test suite."""

from __future__ import annotations

import datetime
import gc
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch._dynamo  # before the heap is frozen

from normpass.capture.dynamo import raising

PACKAGES = ("torch", "torchvision", "timm")
LONGEST = """
whole/test_random_graphs.py
whole/test_sync_norm.py
kernels/test_cuda_emulated.py
kernels/test_cuda_compile.py
passes/test_share_statistics.py
whole/test_backend.py
passes/test_join_norms.py
passes/test_kalman.py
whole/test_odd_norms.py
passes/test_sparse_switchable.py
conversion/test_convert.py
cli/test_cli.py
budget/test_budget.py
nn/test_export.py
nn/test_nodes.py
whole/test_odd_batches.py
whole/test_doors.py
whole/test_writes_around_a_norm.py
""".split()
"""The files that take longest. They begin, so that no process is alone with one of them at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="write the tables of the long sweeps here, a JSON file for each table and torch version",
    )
    parser.addoption("--renew-golden", action="store_true", help="write the texts of tests/golden anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


@pytest.fixture(scope="module", autouse=True)
def left_behind() -> Iterator[None]:
    """What a file leaves in Dynamo's caches is dropped, and what stays of it is not looked through again.

    A process that has run fifty files holds millions of objects, through which each `gc.collect` would go.
    """
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def rewriting_errors_are_raised() -> Iterator[None]:
    """No test passes because a graph that could not be rewritten ran as it was."""
    with raising():
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
