"""RReLU and activations that are an autograd function of the model's own: what is kept, and what `explain` says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_trains_alike, image

import normpass
from normpass.measure import kept_bytes


class Swish(torch.autograd.Function):
    """As libraries of layers have it, to keep x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


def chain(activation: nn.Module, count: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), copy.deepcopy(activation)) for _ in range(count)]
    return nn.Sequential(*[layer for three in layers for layer in three])


ACTIVATIONS = {
    "rrelu": (nn.RReLU(), "random slopes"),
    "rrelu in place": (nn.RReLU(inplace=True), "random slopes"),
    "own function": (Own(), "autograd function of the model's own"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_trains_alike_and_explain_says_why_it_is_left(name: str) -> None:
    activation, reason = ACTIVATIONS[name]
    model, x = chain(activation, 2).double(), image(2, 8, 8, 8, requires_grad=True)
    assert all(reason in row.reason for row in normpass.explain(model, x).rows)
    assert_trains_alike(model, x)  # the same draws: a seed is set before each step


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rrelu_draws_and_lies_as_torchs_in_every_layout(layout: str, inplace: bool) -> None:
    for first in (nn.Identity(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)):
        model, results = nn.Sequential(first, nn.RReLU(inplace=inplace)).double(), []
        for m in (copy.deepcopy(model), normpass.optimize(model)):
            x = LAYOUTS[layout](image(2, 4, 5, 6)).requires_grad_()
            torch.manual_seed(0)
            z = m(x * 1)
            results.append((z, *torch.autograd.grad(z.square().sum(), x)))
        torch.testing.assert_close(*results, rtol=0, atol=1e-13)
        assert results[0][0].stride() == results[1][0].stride()


def test_rrelu_keeps_its_slopes_and_no_result() -> None:
    for inplace in (False, True):
        model, x = chain(nn.RReLU(inplace=inplace)), torch.randn(2, 8, 32, 32)
        optimized = normpass.optimize(copy.deepcopy(model))
        plain, kept = kept_bytes(model, x), kept_bytes(optimized, x)
        assert kept <= (0.75 if inplace else 0.55) * plain  # the norm's input and the slopes
        (graph,) = normpass.explain(model, x).graphs
        assert abs(graph.kept_after - kept) <= 0.01 * kept


def test_rrelu_with_a_range_of_nothing_half_precision_and_a_compiler() -> None:
    for kind, x in ((nn.RReLU(0.2, 0.2), image(2, 8, 6, 6)), (nn.RReLU(), image(2, 8, 6, 6).bfloat16())):
        model, outputs = chain(kind, 1).to(x.dtype), []
        for m in (model, normpass.optimize(copy.deepcopy(model))):
            torch.manual_seed(1)
            out = m(x)
            out.sum().backward()
            outputs.append(out)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-10, atol=1e-2)
    model = chain(nn.RReLU(), 2)
    compiled = torch.compile(copy.deepcopy(model), backend="normpass", options={"inner": "aot_eager"})
    compiled(image(2, 8, 6, 6).float()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compiled.parameters())
    torch._dynamo.reset()


class UNet(nn.Module):
    """Without norms."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation
        sizes = ((3, 8), (8, 8), (8, 16), (16, 16), (24, 8), (8, 8))
        self.convs = nn.ModuleList(nn.Conv2d(*size, 3, padding=1) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.convs
        x = self.act(b(self.act(a(x))))
        y = self.act(d(self.act(c(F.max_pool2d(x, 2)))))
        y = F.interpolate(y, scale_factor=2)
        return self.act(f(self.act(e(torch.cat([x, y], 1)))))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.SiLU(), nn.GELU(), nn.PReLU()], ids=str)
def test_behind_a_convolution_without_a_norm(activation: nn.Module) -> None:
    """One tensor for each convolution: its result, from which the activation is made again, or the activation's."""
    model, x = UNet(activation), torch.randn(2, 3, 32, 32)
    kept = kept_bytes(normpass.optimize(copy.deepcopy(model)), x)
    one = 2 * 8 * 32 * 32 * 4
    results = (2 + 2 * 0.5 + 2) * one  # of six convolutions, two at a quarter of the size with twice the channels
    pooling = (0.25 + 0.5) * one  # its result, and indices of 64 bits
    assert kept <= results + pooling
    assert_trains_alike(model.double(), x.double())
