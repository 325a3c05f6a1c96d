"""The benchmark of sub-batches: what it measures and prints, on regions and networks small enough to test."""

import json

import pytest
import torch
from torch import nn

from normpass.bench import serialized as bench
from normpass.bench.serialized import Region, Row
from normpass.cli.main import main

CPU = torch.device("cpu")


def test_an_exact_row():
    row = bench.exact_row(Region(4, 8, 1, 6), 6, torch.float32, CPU, [2000, 4000], rounds=1)
    assert row.table == "exact" and row.what == "4 -> 8 1x1 on 6x6" and list(row.time) == [2000, 4000]
    assert all(ratio > 0 for ratio in row.time.values()) and row.peak == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deep_row(dtype):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())

    row = bench.deep_row("net", make, (8, 3, 16, 16), dtype, CPU, [20_000], rounds=1)
    assert row.dtype == str(dtype).removeprefix("torch.")
    assert 0 < row.peak[20_000] < 0.8 and row.time[20_000] > 0


def test_a_line():
    row = Row("deep", "net", 8, "float32", {2**20: 1.034, 2**21: 0.95}, {2**20: 0.2, 2**21: 0.25}, 2**21)
    assert bench.format_row(row) == "deep  net: 1 MiB 1.03 (peak 0.20), 2 MiB 0.95 (peak 0.25)"


def test_the_regions_are_those_of_resnet50():
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    found = set()
    for name, size in (("layer1", 56), ("layer2", 28), ("layer3", 14), ("layer4", 7)):
        for block in getattr(model, name):
            stride = block.conv2.stride[0]
            for conv, at in ((block.conv2, size * stride), (block.conv3, size)):
                found.add(Region(conv.in_channels, conv.out_channels, conv.kernel_size[0], at, conv.stride[0]))
    assert found == set(bench.RESNET50)


def test_the_command_writes_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RESNET50", (Region(4, 4, 1, 6),))
    monkeypatch.setattr(bench, "SHARES", (1.0,))
    out = tmp_path / "record.json"
    command = f"bench serialized --device cpu --batch 4 --rounds 1 --tables exact --json {out}"
    assert main(command.split()) == 0
    record = json.loads(out.read_text())
    assert [row["what"] for row in record["rows"]] == ["4 -> 4 1x1 on 6x6"] and "torch" in record["versions"]
    assert record["command"].endswith(command) and "exact 4 -> 4" in capsys.readouterr().out
