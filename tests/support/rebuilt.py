"""Networks whose tensors are rebuilt in backward, and what is held of them."""

from __future__ import annotations

import functools
import gc

import torch
import torch.nn.functional as F
from torch import nn
from training import spread

import normpass
from normpass.recipe.recipes import Recipe

C = 4


def block(inputs: int = C, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


class ResidualChain(nn.Module):
    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.stem, self.blocks = block(3), nn.ModuleList([block() for _ in range(length)])
        self.last = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        z = F.relu(self.stem(x))
        for layers in self.blocks:
            z = F.relu(layers(z) + z)
        return self.last(z)


class DenseBlock(nn.Module):
    def __init__(self, length: int = 4) -> None:
        super().__init__()
        self.stem = block(3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(C * (k + 1)) for k in range(length)])
        self.convs = nn.ModuleList([nn.Conv2d(C * (k + 1), C, 3, padding=1) for k in range(length)])
        self.last = nn.Conv2d(C * (length + 1), 2, 1)

    def forward(self, x):
        features = [F.relu(self.stem(x))]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.last(torch.cat(features, 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3), block()
        self.down, self.up = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        self.last = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        z = F.silu(self.b(F.silu(self.a(x))))
        gate = self.up(F.silu(self.down(z.mean((2, 3), keepdim=True)))).sigmoid()
        return self.last(z * gate)


class SharedResult(nn.Module):
    """One activation, read by five."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3)
        self.readers = nn.ModuleList([nn.Conv2d(C, 2, 1) for _ in range(4)])

    def forward(self, x):
        z = F.silu(self.a(x))
        return sum(reader(z) for reader in self.readers) + F.max_pool2d(z, 3, 1, 1)[:, :2]


NETS = [ResidualChain, DenseBlock, SqueezeExcite, SharedResult]


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls())


@functools.cache
def optimized_net(cls: type[nn.Module]) -> nn.Module:
    """One for all tests that do not change it: a capture takes half a second."""
    return normpass.optimize(make(cls))


def values_held() -> list[Recipe]:
    return [o for o in gc.get_objects() if type(o) is Recipe and o.made is not None]
