"""Every network of the sweep trains the same in fp64 after `normpass.optimize`."""

from __future__ import annotations

import time

import pytest
from exactness import compare
from networks import CHANNELS_LAST, NETWORKS, Network

import normpass

pytestmark = pytest.mark.nets


@pytest.mark.parametrize("entry", (*NETWORKS, *CHANNELS_LAST), ids=lambda entry: entry.name)
def test_trains_the_same(entry: Network, results) -> None:
    start = time.perf_counter()
    comparison = compare(entry.build, entry.make_inputs, normpass.optimize)
    seconds = time.perf_counter() - start
    results.add(
        "networks",
        {
            "network": entry.name,
            "source": entry.source,
            **comparison.row(),
            "failures": "; ".join(comparison.failures),
            "seconds": round(seconds, 1),
        },
    )
    worst = comparison.worst
    difference = worst.relative(worst.difference)
    print(f"{entry.name:28} {worst.kind:12} {difference:8.1e}  ratio {worst.ratio:6.2g}  {seconds:5.1f} s")
    assert comparison.ok, str(comparison)
