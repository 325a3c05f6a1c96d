"""Activations that are written out: which are one with their norm, which are left as they are; both are right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_trains_alike, collected, image

import normpass
from normpass.measure import kept_bytes
from normpass.ops.activation import RULES

SQRT = math.sqrt(2 / math.pi)
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu ** 2": (lambda y: F.relu(y) ** 2, "squared_relu"),
    "relu.square()": (lambda y: y.relu().square(), "squared_relu"),
    "relu · itself": (lambda y: (r := F.relu(y)) * r, "squared_relu"),
    "relu in place, squared": (lambda y: F.relu(y, inplace=True).pow(2), "squared_relu"),
    "y · sigmoid": (lambda y: y * torch.sigmoid(y), "silu"),
    "sigmoid · y": (lambda y: y.sigmoid().mul(y), "silu"),
    "y written to": (lambda y: y.mul_(y.sigmoid()), "silu"),
    "y · relu6 / 6": (lambda y: y * F.relu6(y + 3) / 6, "hardswish"),
    "y · (relu6 / 6)": (lambda y: (F.relu6(y + 3.0) / 6.0) * y, "hardswish"),
    "y · relu6 in place": (lambda y: F.relu6(y + 3.0, inplace=True).div_(6.0) * y, "hardswish"),
    "y · hardtanh": (lambda y: y.mul(F.hardtanh(3 + y, 0, 6)).mul(1 / 6), "hardswish"),
    "y · tanh(softplus)": (lambda y: y * torch.tanh(F.softplus(y)), "mish"),
    "erf": (lambda y: 0.5 * y * (1.0 + torch.erf(y / math.sqrt(2.0))), "gelu"),
    "y · cdf": (lambda y: y * (0.5 * (1 + torch.erf(y * 0.7071067811865475))), "gelu"),
    "tanh of a cubic": (lambda y: 0.5 * y * (1.0 + torch.tanh(SQRT * (y + 0.044715 * torch.pow(y, 3.0)))), "gelu_tanh"),
    "y / (1 + |y|)": (lambda y: y / (1 + y.abs()), "softsign"),
    "y − tanh": (lambda y: y - y.tanh(), "tanhshrink"),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another factor": lambda y: y * torch.sigmoid(1.702 * y),
    "another number": lambda y: y * F.relu6(y + 3) / 5,
    "another bound": lambda y: y * torch.clamp(y + 3, 0, 6) / 6,
    "another power": lambda y: F.relu(y) ** 2.5,
    "a second reader": lambda y: torch.cat([y * (s := torch.sigmoid(y)), s]),
    "y too": lambda y: torch.cat([y * torch.sigmoid(y), y]),
    "written before": lambda y: (s := y.sigmoid(), y.add_(1.0), y * s)[2],
    "sigmoid written to": lambda y: y.sigmoid().mul_(y),
    "a rounded 1/6": lambda y: y * F.hardsigmoid(y),
    "no gradient": lambda y: y * torch.sigmoid(y.detach()),
}


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], norm: nn.Module, adds: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 3, 3)
        self.function, self.adds = function, adds

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        return self.second(self.function(y + x if self.adds else y))


def activations_of(model: nn.Module, x: Tensor) -> list[str]:
    return [choice.site.activation.name for graph in collected(model, x).graphs for choice in graph.choices]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one_with_its_norm(name: str) -> None:
    function, activation = FORMS[name]
    norm, adds = (nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))[list(FORMS).index(name) % 3], name > "s"
    model, x = Block(function, norm, adds).double(), image(requires_grad=True)
    assert activations_of(model, x) == [activation]
    assert_trains_alike(model, x)


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay_as_they_are(name: str) -> None:
    model, x = Block(OTHERS[name], nn.BatchNorm2d(4)).double(), image(requires_grad=True)
    assert activations_of(model, x) == ["relu" if name == "another power" else "identity"]
    if name not in ("written before", "sigmoid written to"):  # backward is refused, as it is without us
        assert_trains_alike(model, x)


def test_hardsigmoid_in_float32_and_under_autocast() -> None:
    model, x = Block(OTHERS["a rounded 1/6"], nn.BatchNorm2d(4)), image().float()
    assert activations_of(model, x) == ["hardswish"]
    optimized, results = normpass.optimize(copy.deepcopy(model)), []
    for m in (model, optimized):
        out = m(x)
        out.sum().backward()
        results.append([out, *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(optimized(x), model(x), rtol=0, atol=0.05)


def test_a_form_keeps_x_alone() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                y = norm(conv(x))
                x = y * torch.sigmoid(y)
            return x

    model, x = Chain(), torch.randn(2, 8, 16, 16)
    assert kept_bytes(normpass.optimize(copy.deepcopy(model)), x) <= 0.3 * kept_bytes(model, x)


def test_infinities_and_nans_are_where_the_form_has_them() -> None:
    """Value and gradient of the activation that stands for a form; and where it has kinks."""
    for function, activation in FORMS.values():
        y = torch.tensor([*map(float, ("inf", "-inf", "nan")), -3, 0, 3], dtype=torch.float64)
        y = y.repeat(16).requires_grad_()  # ATen's loops over vectors: what is left over treats some NaNs otherwise
        found = []
        for act in (lambda t, f=function: f(t * 1), RULES[activation].forward):
            z = act(y)
            found.append([z.detach(), *torch.autograd.grad(z.sum(), y)])
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-12, atol=1e-12)
