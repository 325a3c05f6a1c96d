"""Every network of the sweep trains the same in fp64 after `normpass.optimize`.

With `--results DIR` the table goes to `DIR/networks_torch-VERSION.json`.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path

import normpass
import pytest
import timm
import torch
import torchvision
from exactness import compare
from networks import NETWORKS, Network

pytestmark = pytest.mark.nets

Row = dict[str, bool | float | str]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The rows of this run, written when the last network is done."""
    rows: list[Row] = []
    yield rows
    folder: Path | None = request.config.getoption("--results")
    if folder is not None and rows:
        write(rows, folder)


def write(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (normpass, torch, torchvision, timm)}
    result = {"date": datetime.date.today().isoformat(), "versions": versions, "networks": rows}
    release = torch.__version__.split("+")[0]
    (folder / f"networks_torch-{release}.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
def test_trains_the_same(entry: Network, table: list[Row]) -> None:
    start = time.perf_counter()
    comparison = compare(entry.build, entry.make_inputs, normpass.optimize)
    seconds = time.perf_counter() - start
    table.append(
        {
            "network": entry.name,
            "source": entry.source,
            **comparison.row(),
            "failures": "; ".join(comparison.failures),
            "seconds": round(seconds, 1),
        }
    )
    worst = comparison.worst
    difference = worst.relative(worst.difference)
    print(f"{entry.name:28} {worst.kind:12} {difference:8.1e}  ratio {worst.ratio:6.2g}  {seconds:5.1f} s")
    assert comparison.ok, str(comparison)
