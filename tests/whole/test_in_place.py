"""Operations in place around a norm: dtypes, broadcasting, aliases and errors are plain torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normpass

Body = Callable[[nn.BatchNorm2d, Tensor, Tensor], object]


def added(to: Callable, what: Callable) -> Body:
    """`to += what`, each made of the norm's result, x and z."""

    def body(norm: nn.BatchNorm2d, x: Tensor, z: Tensor) -> object:
        y = norm(x)
        first = to(y, x, z)
        first += what(y, x, z)
        return F.relu(first) + y.sum()

    return body


def aliases(norm: nn.BatchNorm2d, x: Tensor, z: Tensor) -> object:
    y = norm(x)
    y += z
    v = y.view(-1)
    v *= 2
    return y, v, y[:]


IMAGES, WHOLE = (2, 4, 5, 5), torch.int64
CASES: dict[str, tuple[Body, Tensor]] = {
    "broader": (added(lambda y, x, z: y, lambda y, x, z: z), torch.ones(3, *IMAGES)),
    "broader than a part": (added(lambda y, x, z: y[:1], lambda y, x, z: z), torch.ones(IMAGES)),
    "broader than an activation": (lambda norm, x, z: F.silu(norm(x)).mul_(z), torch.ones(3, *IMAGES)),
    "a number to integers": (added(lambda y, x, z: z * 2, lambda y, x, z: 0.5), torch.ones(IMAGES, dtype=WHOLE)),
    "the norm to integers": (added(lambda y, x, z: z * 2, lambda y, x, z: y), torch.ones(IMAGES, dtype=WHOLE)),
    "a quotient of integers": (lambda norm, x, z: (z * 2).div_(2) * norm(x), torch.ones(IMAGES, dtype=WHOLE)),
    "integers to the norm": (added(lambda y, x, z: y, lambda y, x, z: z), torch.ones(IMAGES, dtype=WHOLE)),
    "a narrower dtype": (added(lambda y, x, z: y, lambda y, x, z: z), torch.ones(IMAGES)),
    "to a narrower dtype": (added(lambda y, x, z: z * 2, lambda y, x, z: y), torch.ones(IMAGES, dtype=torch.bfloat16)),
    "complex numbers": (added(lambda y, x, z: y, lambda y, x, z: z), torch.ones(IMAGES, dtype=torch.complex64)),
    "to a number that is expanded": (added(lambda y, x, z: z.expand(IMAGES), lambda y, x, z: y), torch.ones(1)),
    "the norm to itself": (added(lambda y, x, z: y, lambda y, x, z: y), torch.ones(1)),
    "aliases": (aliases, torch.ones(1)),
}


class Net(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(4).double(), body

    def forward(self, x: Tensor, z: Tensor) -> object:
        return self.body(self.norm, x, z)


def outcome(model: nn.Module, z: Tensor) -> list[object]:
    x, z = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0), dtype=torch.float64), z.clone()
    x.requires_grad_()
    try:
        y = model(x, z)
    except Exception as error:
        return [type(error), str(error), model.norm.running_mean]
    results = y if isinstance(y, tuple) else (y,)
    sum(t.abs().sum() for t in results).backward()
    places = [t.data_ptr() - results[0].data_ptr() for t in results]
    return [places, [(t.dtype, t.stride()) for t in results], *results, x.grad, z, model.norm.running_mean]


@pytest.mark.parametrize("name", CASES)
def test_as_plain(name: str) -> None:
    body, z = CASES[name]
    plain = Net(body)
    optimized = normpass.optimize(copy.deepcopy(plain))
    expected, found = outcome(plain, z), outcome(optimized, z)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        else:
            assert a == b
