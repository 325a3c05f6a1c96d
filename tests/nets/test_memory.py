"""The memory bars on whole networks, and the peak on every one of them."""

import json

import pytest
import torch
from memory import BARS, image
from networks import NETWORKS

import normpass
from normpass.measure import kept_bytes, peak_bytes
from normpass.models import load

pytestmark = pytest.mark.nets


@pytest.mark.parametrize("name", BARS)
def test_bars(name, results):
    plain = load(f"torchvision:{name}")
    optimised = normpass.optimize(plain)
    x = image()
    kept = [kept_bytes(m, x) for m in (plain, optimised)]
    peak = [peak_bytes(m, x) for m in (plain, optimised)]
    row = {"network": name, "input": "2x3x224x224", "dtype": "float32", "kept": kept, "peak": peak}
    results.add("memory", row)
    print(json.dumps(row))
    assert kept[1] <= BARS[name][0] * kept[0]
    assert peak[1] <= BARS[name][1] * peak[0]
