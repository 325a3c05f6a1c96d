"""What is kept for backward, and the peak over a step, as fractions of plain eager mode."""

import copy

import pytest
import torch
from memory import TEN_BLOCKS, image, ten_blocks

import normpass
from normpass.measure import kept_bytes, peak_bytes


@pytest.mark.parametrize("name", TEN_BLOCKS)
def test_ten_blocks_keep_one_tensor_each(name):
    activation, bar = TEN_BLOCKS[name]
    plain = ten_blocks(activation)
    optimized = normpass.optimize(plain)
    x = image()
    kept = kept_bytes(optimized, x) / kept_bytes(plain, x)
    peak = peak_bytes(optimized, x) / peak_bytes(plain, x)
    print(f"ten conv-BN-{name}: kept {kept:.3f}, peak {peak:.3f} of plain")
    assert kept <= bar
    assert peak <= 1.0
    with torch.no_grad():
        assert optimized(image(32)).grad_fn is None


def test_lossy_in_place_abn_keeps_as_little():
    plain = ten_blocks(TEN_BLOCKS["leaky_relu"][0])
    optimized = normpass.optimize(plain, allow_lossy=True)
    assert kept_bytes(optimized, image(64)) / kept_bytes(plain, image(64)) <= 0.52


@pytest.mark.parametrize("frozen", ["convs", "norms", "first half"])
def test_frozen_parameters_never_cost_more_than_plain(frozen):
    plain = ten_blocks(TEN_BLOCKS["relu"][0])
    for index, layer in enumerate(plain):
        is_norm = isinstance(layer, torch.nn.BatchNorm2d)
        if index < 15 if frozen == "first half" else is_norm == (frozen == "norms"):
            layer.requires_grad_(False)
    optimized = normpass.optimize(copy.deepcopy(plain))
    assert kept_bytes(optimized, image(64)) <= kept_bytes(plain, image(64))
