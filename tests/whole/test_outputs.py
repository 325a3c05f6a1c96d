"""Outputs keep their types; layers that draw random numbers draw the same."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conv_blocks import C, block
from torch import nn
from training import assert_trains_alike, image, spread

Pair = namedtuple("Pair", "first second")


class Outputs(nn.Module):
    """Two blocks whose results come back in a structure."""

    def __init__(self, structure) -> None:
        super().__init__()
        self.a, self.b, self.structure = block(inplace=True), block(C, C, inplace=True), structure

    def forward(self, x):
        h = self.a(x)
        return self.structure(h, self.b(h))


def as_dict(h, z):
    return {"ordered": OrderedDict(h=h, z=z, n=3), "list": [h, (z, None), "name"], "pair": Pair(z, [h]), "z": z}


def as_pair(h, z):
    return Pair({"a": h}, OrderedDict(b=Pair(z, [h])))


@pytest.mark.parametrize("structure", [as_dict, as_pair], ids=lambda s: s.__name__)
def test_outputs_keep_their_types(structure) -> None:
    model = spread(Outputs(structure))
    optimized = assert_trains_alike(model, image(requires_grad=True))
    expected, found = model(image()), optimized(image())

    def types(value):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return type(value), [types(item) for item in items]

    assert types(found) == types(expected)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    assert not any(vars(leaf) for leaf in leaves)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(inplace=True), block(C, C, inplace=True), block(C, C, inplace=True)
        self.drop, self.spatial = nn.Dropout(0.3), nn.Dropout2d(0.3, inplace=True)
        self.depth = torchvision.ops.StochasticDepth(0.4, "row")
        self.path = timm.layers.DropPath(0.4)

    def forward(self, x):
        h = self.drop(self.a(x))
        h = self.depth(self.b(h)) + h
        h = F.dropout(self.spatial(h), 0.2, self.training)
        return self.path(self.c(h)) + h


def test_random_layers_draw_the_same() -> None:
    """And leave the generator where plain leaves it."""
    model = spread(Random())
    states = []
    for m in (model, assert_trains_alike(model, image())):
        torch.manual_seed(0)
        m.train()(image())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
