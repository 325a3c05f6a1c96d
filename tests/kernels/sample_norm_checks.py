"""What the tests of norms with a sample's own statistics compare: a kernel's results and ATen's in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cuda_checks import ARGUMENTS, EPS, FORWARD, KINKS, assert_close, statistics_of
from torch import Tensor

from normpass.kernels.contract import Groups, Norm, Rows, SampleNorms

NAMES = ("dx", "dresidual", "dweight", "dbias")
Needs = Sequence[bool]
ALL = (True,) * 4


@dataclass
class SampleSite:
    """Random arguments of one call. A `Rows` is (rows, width), `Groups` is (samples, channels, spatial) as it lies."""

    shape: Groups | Rows
    dtype: torch.dtype
    activation: str = "relu"
    residual: bool = False
    affine: bool = True
    offset: float = 0.5
    device: str = "cpu"
    eps: float = EPS
    args: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float64)

        self.args = ARGUMENTS.get(self.activation, ())
        statistics, size = statistics_of(self.dtype), self.size
        self.x = self.lying(random(*size) * 1.5 + self.offset)
        self.added = self.lying(random(*size)) if self.residual else None
        self.weight = random(size[1]).to(statistics) if self.affine else None
        self.bias = random(size[1]).to(statistics) if self.affine and not self.is_rms else None
        self.grad = self.lying(random(*size))
        y = self.y(*self.wide())
        near = torch.stack([(y - kink).abs() < 1e-4 for kink in KINKS]).any(0)
        self.grad[near] = 0  # there act' depends on the last bit

    @property
    def size(self) -> tuple[int, ...]:
        shape = self.shape
        return tuple(shape[:2]) if isinstance(shape, Rows) else (shape.samples, shape.channels, shape.spatial)

    @property
    def is_rms(self) -> bool:
        return isinstance(self.shape, Rows) and not self.shape.is_centred

    @property
    def moments(self) -> tuple[int, ...]:
        shape = self.shape
        return (shape.rows,) if isinstance(shape, Rows) else (shape.samples, shape.groups)

    def lying(self, t: Tensor) -> Tensor:
        """`t` in the dtype, as `shape` says that it lies."""
        t = t.to(self.dtype)
        is_last = isinstance(self.shape, Groups) and self.shape.is_rows
        return t.transpose(1, 2).contiguous().transpose(1, 2) if is_last else t.contiguous()

    def wide(self) -> list[Tensor]:
        """What is there of x, the residual, the weight and the bias, in float64."""
        return [t.double() for t in (self.x, self.added, self.weight, self.bias) if t is not None]

    def y(self, x: Tensor, *others: Tensor) -> Tensor:
        """By ATen."""
        added, *vectors = others if self.residual else (None, *others)
        weight, bias = (*vectors, None, None)[:2]
        shape = self.shape
        if isinstance(shape, Groups):
            y = F.group_norm(x, shape.groups, weight, bias, self.eps)
        elif shape.is_centred:
            y = F.layer_norm(x, x.shape[1:], weight, bias, self.eps)
        else:
            y = F.rms_norm(x, x.shape[1:], weight, self.eps)
        return y if added is None else y + added

    def wanted(self) -> tuple[Tensor, dict[str, Tensor]]:
        """z, and the gradients of what is there."""
        inputs = [t.requires_grad_() for t in self.wide()]
        z = FORWARD[self.activation](self.y(*inputs), *self.args)
        there = (True, self.residual, self.weight is not None, self.bias is not None)
        names = [name for name, t in zip(NAMES, there, strict=True) if t]
        gradients = torch.autograd.grad(z, inputs, self.grad.double())
        return z.detach(), dict(zip(names, gradients, strict=True))

    def norm(self, mean: Tensor, var: Tensor) -> Norm:
        return Norm(self.weight, self.bias, mean, var, self.eps, self.activation, self.args)

    def new_norm(self) -> Norm:
        """With moments that are not there yet."""
        empty = torch.full(self.moments, torch.nan, dtype=statistics_of(self.dtype), device=self.device)
        return self.norm(empty, empty.clone())

    def outputs(self, needs: Needs) -> dict[str, Tensor | None]:
        like = zip(NAMES, (self.x, self.added, self.weight, self.bias), needs, strict=True)
        return {name: torch.full_like(t, torch.nan) if needed and t is not None else None for name, t, needed in like}


def forward(kernels: SampleNorms, site: SampleSite, norm: Norm, is_given: bool) -> Tensor:
    z = torch.full_like(site.x, torch.nan)
    if isinstance(site.shape, Rows):
        kernels.row_norm_act(z, site.x, norm, is_given, site.shape)
    else:
        kernels.group_norm_act(z, site.x, site.added, norm, is_given, site.shape)
    return z


def backward(kernels: SampleNorms, site: SampleSite, norm: Norm, needs: Needs = ALL) -> dict[str, Tensor | None]:
    found = site.outputs(needs)
    if isinstance(site.shape, Rows):
        outputs = [found[name] for name in NAMES if name != "dresidual"]
        kernels.row_norm_act_backward(*outputs, site.grad, site.x, norm, site.shape)
    else:
        kernels.group_norm_act_backward(*found.values(), site.grad, site.x, site.added, norm, site.shape)
    return found


def check(
    kernels: SampleNorms, site: SampleSite, needs: Needs = ALL, bit_for_bit: bool = True
) -> dict[str, Tensor | None]:
    """z, z made again from its moments, bit for bit, and every gradient that is needed; these are returned."""
    want_z, want = site.wanted()
    norm = site.new_norm()
    z, again = (forward(kernels, site, norm, is_given) for is_given in (False, True))
    assert_close("z", z, want_z, site.dtype)
    assert_close("z made again", again, want_z, site.dtype)
    assert torch.equal(z, again) or not bit_for_bit, "not the same when it is made again"
    found = backward(kernels, site, norm, needs)
    for name, got in found.items():
        if got is not None:
            assert_close(name, got, want[name], site.dtype, 1, terms(site, norm) if name == "dx" else want["dx"])
    return found


def terms(site: SampleSite, norm: Norm) -> Tensor:
    """What dx is a sum of."""
    scale = (norm.var.double() + site.eps).rsqrt().max() * site.grad.double().abs().max()
    return scale if site.weight is None else scale * site.weight.double().abs().max()
