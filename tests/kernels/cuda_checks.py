"""What the tests of the CUDA kernels compare: one site of random values, the kernels' results, the formulas in fp64.

Used with the emulated device and on GPUs. Tensors are (outer, channels, inner), as `Layout` says they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import Kernels, Layout, Norm, Running
from normpass.kernels.masks import bytes_of_mask, packed, unpacked

EPS = 1e-5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FORWARD: dict[str, Callable[..., Tensor]] = {
    "identity": lambda y: y * 1,
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "clamp": torch.clamp,
    "open_clamp": torch.clamp,
    "threshold": F.threshold,
    "squared_relu": lambda y: F.relu(y) ** 2,
}
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "hardtanh": (-1.0, 1.5),
    "leaky_relu": (0.1,),
    "elu": (0.7,),
    "celu": (0.5,),
    "softplus": (2.0, 20.0),
    "hardshrink": (1.0,),
    "softshrink": (1.0,),
    "clamp": (-1.0, 1.5),
    "open_clamp": (-1.0, 1.5),
    "threshold": (0.0, 1.5),
}
INVERTIBLE = ("identity", "leaky_relu", "elu", "selu", "celu")
KINKS = (-3.0, -1.0, 0.0, 1.5, 3.0)


def statistics_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype, slack: float = 1.0, terms: Tensor | None = None
) -> None:
    """Within 1e-5 of the largest value (1e-12 in fp64), and one rounding of each value to a 16-bit `got`.

    `slack` allows for this many more roundings of 16-bit values that went into the result; `terms` are what it is a
    sum of, where they may cancel.
    """
    assert got.isfinite().all(), f"{name} has values that are not finite"
    want = want.to(got.device)
    scale = want.abs().max()
    if terms is not None:
        scale = torch.maximum(scale, terms.abs().max().to(got.device))
    limit = (1e-12 if dtype == torch.float64 else 1e-5) * scale
    if got.dtype.itemsize == 2:
        rounding = torch.finfo(got.dtype).eps / 2
        limit = limit + 1.01 * rounding * want.abs() + (slack - 1) * rounding * scale + torch.finfo(got.dtype).tiny
    excess = ((got.double() - want).abs() - limit).max().item()
    assert excess <= 0, f"{name} is off by {excess:.3g} beyond the limit; the largest value is {scale.item():.3g}"


@dataclass
class Site:
    """Random arguments of one call; `offset` is mean/std of x, 16-bit values are rounded before anything is wanted."""

    layout: Layout
    dtype: torch.dtype
    activation: str = "relu"
    residual: bool = False
    affine: bool = True
    batch_statistics: bool = True
    offset: float = 0.5
    device: str = "cpu"
    weight: Tensor | None = None
    bias: Tensor | None = None
    args: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float64)

        self.args = ARGUMENTS.get(self.activation, ())
        statistics = statistics_of(self.dtype)
        self.x = (random(*self.layout) + self.offset).to(self.dtype)
        self.added = random(*self.layout).to(self.dtype) if self.residual else None
        wide = self.x.double()
        self.mean = wide.mean((0, 2)).to(statistics)
        self.var = wide.var((0, 2), correction=0).to(statistics)
        if not self.batch_statistics:
            self.mean, self.var = self.mean + 0.1, self.var * 1.2
        if self.affine and self.weight is None:
            self.weight = random(self.layout.channels).to(statistics)
            self.bias = random(self.layout.channels).to(statistics)
        self.grad = (random(*self.layout)).to(self.dtype)
        y = self.y()
        near = torch.stack([(y - kink).abs() < 1e-4 for kink in KINKS]).any(0)
        self.grad[near] = 0  # there act' depends on the last bit

    def keep_weight_from_zero(self) -> Site:
        """In-place ABN divides by it: near 0 the last bits of z decide."""
        assert self.weight is not None
        self.weight = self.weight + self.weight.sign() * 0.5
        return self

    @property
    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.mean, self.var, EPS, self.activation, self.args)

    def scale(self) -> Tensor:
        r = (self.var.double() + EPS).rsqrt()
        return r if self.weight is None else r * self.weight.double()

    def y(self) -> Tensor:
        y = (self.x.double() - self.mean.double()[:, None]) * self.scale()[:, None]
        if self.bias is not None:
            y = y + self.bias.double()[:, None]
        return y if self.added is None else y + self.added.double()

    def z(self) -> Tensor:
        return FORWARD[self.activation](self.y(), *self.args)

    def dy(self, y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        z = FORWARD[self.activation](y, *self.args)
        return torch.autograd.grad(z, y, self.grad.double())[0]


def gradients(dy: Tensor, centred: Tensor, slope: Tensor, batch_statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias from dy, x̂ and a."""
    s1, s2 = dy.sum((0, 2)), (dy * centred).sum((0, 2))
    rest = dy
    if batch_statistics:
        m = dy.numel() // dy.shape[1]
        rest = dy - s1[:, None] / m - centred * s2[:, None] / m
    return slope[:, None] * rest, s2, s1


def check_moments(kernels: Kernels, x: Tensor, layout: Layout, *, tolerance: float | None = None) -> None:
    """Mean within `tolerance` of a standard deviation or its own last bits, variance within it, relative."""
    statistics = statistics_of(x.dtype)
    tolerance = tolerance or (1e-12 if x.dtype == torch.float64 else 1e-5)
    mean, var = (torch.empty(layout.channels, dtype=statistics, device=x.device) for _ in range(2))
    kernels.moments(mean, var, x, layout)
    want_mean, want_var = x.double().mean((0, 2)), x.double().var((0, 2), correction=0)
    limit = tolerance * want_var.sqrt() + 4 * torch.finfo(statistics).eps * want_mean.abs()
    assert ((mean.double() - want_mean).abs() <= limit).all()
    assert ((var.double() - want_var).abs() <= tolerance * want_var).all()

    running = Running(torch.randn_like(mean), torch.rand_like(mean), 0.3)
    m = layout.outer * layout.inner
    want = 0.7 * running.mean + 0.3 * mean, 0.7 * running.var + 0.3 * var * (m / max(m - 1, 1))
    again = torch.empty_like(mean), torch.empty_like(var)
    kernels.moments(*again, x, layout, running)
    assert torch.equal(again[0], mean) and torch.equal(again[1], var), "not deterministic"
    for got, wanted in zip(running[:2], want, strict=True):
        torch.testing.assert_close(got, wanted)


def check_norm_act(kernels: Kernels, site: Site) -> Tensor:
    z = torch.empty_like(site.x)
    kernels.norm_act(z, site.x, site.added, site.norm, site.layout)
    assert_close("z", z, site.z(), site.dtype)
    return z


def check_norm_act_backward(kernels: Kernels, site: Site, needs: Sequence[bool] = (True, True, True, True)) -> None:
    results = outputs(site, needs)
    kernels.norm_act_backward(*results, site.grad, site.x, site.added, site.norm, site.batch_statistics, site.layout)
    dy = site.dy(site.y())
    r = (site.var.double() + EPS).rsqrt()
    centred = (site.x.double() - site.mean.double()[:, None]) * r[:, None]
    want_dx, want_dweight, want_dbias = gradients(dy, centred, site.scale(), site.batch_statistics)
    wanted = want_dx, dy, want_dweight, want_dbias
    compare(site, results, wanted, dy, slack=3 if results[1] is not None else 1)


def check_gradient_in_two_parts(kernels: Kernels, site: Site, needs: Sequence[bool] = (True, True, True, True)) -> None:
    """The kernels add two parts to the bits of their sum as it would be stored."""
    parts = site.grad, site.grad.flip(0) * 0.37
    found = []
    for grad, *other in (parts, (parts[0] + parts[1],)):
        results = outputs(site, needs)
        kernels.norm_act_backward(
            *results, grad, site.x, site.added, site.norm, site.batch_statistics, site.layout, *other
        )
        found.append(results)
    for name, apart, whole in zip(("dx", "dresidual", "dweight", "dbias"), *found, strict=True):
        assert apart is None or torch.equal(apart, whole), f"{name} is not that of the sum"


def check_mask(kernels: Kernels, site: Site) -> None:
    """Forward writes the mask as the plain formula lays it out, and every gradient is that of the residual."""
    norm, size = site.norm, site.x.element_size()
    z, plain_z = torch.empty_like(site.x), torch.empty_like(site.x)
    mask = torch.full((bytes_of_mask(site.layout, size),), 0xAA, dtype=torch.uint8, device=site.x.device)
    kernels.norm_act(plain_z, site.x, site.added, norm, site.layout)
    kernels.norm_act(z, site.x, site.added, norm, site.layout, mask)
    assert torch.equal(z, plain_z)
    slopes, y = RULES[site.activation].two_slopes, site.y()
    assert slopes is not None
    is_near = torch.stack([(y - kink).abs() < 1e-4 for kink in KINKS]).any(0)
    wrong = unpacked(mask, site.layout, size) != slopes.passes(y, *site.args)
    assert not (wrong & ~is_near).any()
    assert torch.equal(packed(unpacked(mask, site.layout, size), size), mask), "bits beyond the last value are 0"
    for needs in ((True,) * 4, (True, False, True, True), (False, True, False, False)):
        for other in (None, site.grad.flip(0) * 0.37):
            found = [outputs(site, needs), outputs(site, needs)]
            for results, (residual, *more) in zip(found, ((site.added, other), (None, other, mask)), strict=True):
                kernels.norm_act_backward(
                    *results, site.grad, site.x, residual, norm, site.batch_statistics, site.layout, *more
                )
            for name, by_residual, by_mask in zip(("dx", "dresidual", "dweight", "dbias"), *found, strict=True):
                assert by_residual is None or torch.equal(by_residual, by_mask), f"{name} of {needs}"


def check_normalized_residual(kernels: Kernels, site: Site) -> None:
    """The bits, of the mask too, that a residual gives which the kernels have stored."""
    of_residual = Norm(site.bias, site.weight, site.mean + 0.25, site.var * 2, 1e-3, "identity", ())
    stored, *found = (torch.empty_like(site.x) for _ in range(3))
    masks = [torch.zeros(bytes_of_mask(site.layout, site.x.element_size()), dtype=torch.uint8) for _ in range(2)]
    masks = [mask.to(site.x.device) for mask in masks]
    kernels.norm_act(stored, site.added, None, of_residual, site.layout)
    kernels.norm_act(found[0], site.x, stored, site.norm, site.layout, masks[0])
    kernels.norm_act(found[1], site.x, site.added, site.norm, site.layout, masks[1], of_residual)
    assert torch.equal(*found) and torch.equal(*masks)
    kernels.norm_act(found[1].fill_(torch.nan), site.x, site.added, site.norm, site.layout, None, of_residual)
    assert torch.equal(*found), "made again, without a mask"


def split(site: Site, t: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """The pieces of a concatenation in memory of their own, named (N, Cᵢ, rest) as the layouts are."""
    return [piece.contiguous() for piece in t.split(list(channels), 1)]


def check_cat_norm_act(kernels: Kernels, site: Site, channels: Sequence[int]) -> Tensor:
    z, xs = torch.full_like(site.x, torch.nan), split(site, site.x, channels)
    kernels.cat_norm_act(z, xs, site.norm, site.layout)
    assert_close("z", z, site.z(), site.dtype)
    return z


def check_cat_norm_act_backward(
    kernels: Kernels, site: Site, channels: Sequence[int], adds: Sequence[bool] | None = None
) -> None:
    """Both passes. Where a piece is added to, what was there before stays a part of the result."""
    adds = adds or [False] * len(channels)
    xs, whole = split(site, site.x, channels), torch.zeros_like(site.x)
    before = torch.cat([torch.full_like(x, 0.25 * add) for x, add in zip(xs, adds, strict=True)], 1).double()
    dxs = [torch.full_like(x, 0.25 if add else torch.nan) for x, add in zip(xs, adds, strict=True)]
    totals = [torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device) for x in xs]
    dweight, dbias = (torch.full_like(site.mean, torch.nan) for _ in range(2))
    kernels.cat_norm_act_backward(dxs, adds, totals, dweight, dbias, site.grad, xs, site.norm, site.layout)
    means = site.mean.split(list(channels))
    for dx, x, mean, total in zip(dxs, xs, means, totals, strict=True):
        layout = Layout(site.layout.outer, x.shape[1], site.layout.inner)
        kernels.add_statistics_gradient(dx, x, mean.clone(), total, layout)
    dy = site.dy(site.y())
    r = (site.var.double() + EPS).rsqrt()
    centred = (site.x.double() - site.mean.double()[:, None]) * r[:, None]
    want_dx, want_dweight, want_dbias = gradients(dy, centred, site.scale(), True)
    wanted = want_dx + before.to(want_dx.device), dy, want_dweight, want_dbias
    compare(site, (torch.cat(dxs, 1, out=whole), None, dweight, dbias), wanted, dy, slack=3)


def check_inplace_abn_backward(kernels: Kernels, site: Site, needs: Sequence[bool] = (True, True, True)) -> None:
    z = site.z().clamp(min=-0.6 if site.activation == "elu" else None, max=4).to(site.dtype)
    dx, _, dweight, dbias = results = outputs(site, (needs[0], False, *needs[1:]))
    norm = site.norm._replace(mean=None)
    kernels.inplace_abn_backward(dx, dweight, dbias, site.grad, z, norm, site.batch_statistics, site.layout)
    y = inverse(z.double(), site.activation, site.args)
    weight = torch.ones_like(site.var) if site.weight is None else site.weight
    smallest = torch.finfo(weight.dtype).eps
    divisor = torch.where(weight < 0, -weight.abs().clamp(min=smallest), weight.abs().clamp(min=smallest)).double()
    bias = torch.zeros_like(divisor) if site.bias is None else site.bias.double()
    centred = (y - bias[:, None]) / divisor[:, None]
    dy = site.dy(y)
    dx, dweight, dbias = gradients(dy, centred, site.scale(), site.batch_statistics)
    compare(site, results, (dx, dy, dweight, dbias), dy)


def inverse(z: Tensor, activation: str, args: Sequence[float]) -> Tensor:
    if activation == "identity":
        return z
    if activation == "leaky_relu":
        return torch.where(z > 0, z, z / args[0])
    alpha, scale, input_scale = {
        "elu": lambda: (args[0], 1.0, 1.0),
        "celu": lambda: (args[0], 1.0, 1 / args[0]),
        "selu": lambda: (1.6732632423543772, 1.0507009873554805, 1.0),
    }[activation]()
    return torch.where(z > 0, z / scale, (z / (scale * alpha)).clamp(max=0).log1p() / input_scale)


def outputs(site: Site, needs: Sequence[bool]) -> list[Tensor | None]:
    """dx, dresidual, dweight and dbias, filled with NaN; None where not needed or without an input."""
    there = (True, True, site.weight is not None, site.bias is not None)
    like = (site.x, site.x, site.mean, site.mean)
    return [torch.full_like(t, torch.nan) if n and h else None for t, n, h in zip(like, needs, there, strict=True)]


def compare(
    site: Site, results: Sequence[Tensor | None], wanted: Sequence[Tensor], dy: Tensor, slack: float = 1
) -> None:
    terms = (site.scale()[:, None] * dy, dy, dy, dy)
    names = ("dx", "dresidual", "dweight", "dbias")
    for name, got, want, cancelling in zip(names, results, wanted, terms, strict=True):
        if got is not None:
            assert_close(name, got, want, site.dtype, slack if name == "dx" else 1, cancelling)
