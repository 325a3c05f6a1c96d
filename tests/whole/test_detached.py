"""What changes no number and all the same something: `detach_`, and decompositions that go by who wants a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_equal, image, spread, train

import normpass

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.other, self.body = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), body

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.a(x)))
        return self.b(torch.tanh(self.other(self.body(self, z)))) + z

    @property
    def matrix(self) -> Tensor:
        return self.b.weight.flatten(1)

    @property
    def symmetric(self) -> Tensor:
        return self.matrix @ self.matrix.T + torch.eye(4, dtype=torch.float64)


def assert_as_plain(body: Body) -> None:
    torch.manual_seed(0)
    plain = spread(Net(body))
    optimized = normpass.optimize(copy.deepcopy(plain))
    assert_equal(train(plain, (image(),)), train(optimized, (image(),)))


def written_as_statement(net: Net, z: Tensor) -> Tensor:
    y = torch.sin(z)
    y.detach_()
    return y + z


def truncated(net: Net, z: Tensor) -> Tensor:
    h = torch.zeros_like(z)
    for step in range(3):
        h = torch.tanh(h + z)
        if step == 1:
            h.detach_()
    return h


DETACHED: dict[str, Body] = {
    "a statement": written_as_statement,
    "an expression": lambda net, z: z + (z * 2).detach_(),
    "a function": lambda net, z: z + torch.detach_(z * 2),
    "a norm": lambda net, z: net.norm(z).detach_() + z,
    "an activation": lambda net, z: F.relu(net.norm(z)).detach_() * z,
    "a convolution": lambda net, z: z * net.b(z).detach_(),
    "truncated backpropagation": truncated,
}


@pytest.mark.parametrize("name", DETACHED)
def test_detached_in_place(name: str) -> None:
    assert_as_plain(DETACHED[name])


DECOMPOSED: dict[str, Body] = {
    "matrix_norm": lambda net, z: z / torch.linalg.matrix_norm(net.matrix, 2),
    "nuclear norm": lambda net, z: z / torch.linalg.matrix_norm(net.matrix, "nuc"),
    "svdvals": lambda net, z: z / torch.linalg.svdvals(net.matrix).max(),
    "cond": lambda net, z: z / torch.linalg.cond(net.symmetric),
    "eigvalsh": lambda net, z: z / torch.linalg.eigvalsh(net.symmetric).amax(),
    "eigvals": lambda net, z: z / torch.linalg.eigvals(net.symmetric).abs().amax(),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decomposed(name: str) -> None:
    assert_as_plain(DECOMPOSED[name])
