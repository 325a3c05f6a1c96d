"""Units of a network, their footprints and bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normpass.graph.nodes import key_of
from normpass.serialize.traffic import units_of_model

KIB = 1024


class Block(nn.Module):
    """1x1 to half the channels, 3x3 back, the input added."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.pool(self.stem(x))).mean((2, 3)))


def units_by_name(model, *shape, dtype=torch.float32):
    return {unit.name: unit for unit in units_of_model(model, shape, dtype)}


def test_a_layer_with_its_norm_a_block_and_the_head_are_units():
    units = units_by_name(Net(), 2, 3, 16, 16)
    assert list(units) == ["stem", "pool", "block", "mean"]
    assert key_of(units["block"].nodes[0]) == "block.conv1" and units["mean"].last == "head"
    assert units["stem"].input_bytes == 3 * KIB and units["stem"].output_bytes == 8 * KIB
    assert units["mean"].output_bytes == 16


def test_footprints():
    units = units_by_name(Net(), 2, 3, 16, 16)
    assert units["stem"].footprint == units["stem"].footprint_apart == (3 + 8) * KIB
    assert units["pool"].footprint == (8 + 2) * KIB
    # conv2 reads 1 KiB and writes 2, while the block's input, 2 KiB, waits for the addition.
    assert units["block"].footprint == (1 + 2 + 2) * KIB
    assert units["block"].footprint_apart == (2 + 1) * KIB


def test_what_moves_and_what_is_kept():
    units = units_by_name(Net(), 2, 3, 16, 16)
    stem = units["stem"]
    assert stem.weights == 4 * (8 * 3 * 9 + 2 * 8)
    assert stem.saved == (3 + 8 + 8 / 32) * KIB  # the convolution's input, the norm's, a bit per value of the ReLU's
    assert stem.streamed == (3 * (3 + 8) + 8 * 8 + 4 * 8 + 2 * 8 / 32) * KIB
    assert units["pool"].saved == 0.5 * KIB  # a byte for each of 512 values
    assert stem.branching == units["pool"].branching == 0
    assert units["block"].branching == 3 * 2 * KIB + 4 * 2 * KIB  # the input read twice; two terms added


def test_half_precision_counts_half():
    wide, narrow = (units_by_name(Net(), 2, 3, 16, 16, dtype=d)["block"] for d in (torch.float32, torch.float16))
    assert wide.footprint == 2 * narrow.footprint and wide.weights == 2 * narrow.weights


def test_a_sample_counts_the_same_in_any_batch():
    one, many = (units_by_name(Net(), n, 3, 16, 16) for n in (2, 64))
    for name, unit in one.items():
        other = many[name]
        assert (unit.footprint, unit.saved, unit.streamed) == (other.footprint, other.saved, other.streamed)


def test_norms_spelled_otherwise_have_the_same_bytes():
    class Frozen(nn.Module):
        """scale and shift by constants, as a frozen norm is traced"""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.register_buffer("scale", torch.ones(1, 8, 1, 1))

        def forward(self, x):
            return torch.relu(self.conv(x) * self.scale + self.scale)

    units = units_of_model(Frozen(), (2, 3, 16, 16), torch.float32)
    assert [unit.name for unit in units] == ["conv"]
    assert units[0].footprint == (3 + 8) * KIB
    assert units[0].saved == (3 + 8 / 32) * KIB  # constants without a gradient: the product keeps nothing


def test_dense_and_inception_like_modules_are_whole():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return torch.cat([x, y, self.b(torch.cat([x, y], 1))], 1)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Dense(), nn.Conv2d(12, 3, 1))
    units = units_of_model(net, (2, 3, 8, 8), torch.float32)
    assert [unit.name for unit in units] == ["0", "1", "2"]


@pytest.mark.parametrize("unused", [True, False])
def test_what_the_output_does_not_need_counts_for_nothing(unused):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            if unused:
                self.b(x)
            return self.a(x)

    (unit,) = units_of_model(Aside(), (2, 3, 8, 8))
    assert unit.branching == 0 and unit.weights == 4 * 16
