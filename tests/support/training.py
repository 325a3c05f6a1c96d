"""Train a plain and an optimized model alike in fp64 and compare every number: the light form of `exactness`.

For networks of two or three layers, where no rounding adds up: outputs, gradients of parameters and inputs at
every step, buffers, parameters and eval outputs agree to 1e-11 of the largest number of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from nested import leaves
from torch import Tensor, nn

import normpass
from normpass.collect import Collected, captured_graphs
from normpass.optimized import state_of
from normpass.pipeline import Request, Rewritten
from normpass.report.explain import norm_rows
from normpass.report.summary import Row

Numbers = dict[str, Tensor | None]
TOLERANCE = 1e-11


def image(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """Normal fp64 values of `shape`, (2, 3, 8, 8) if none is given."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape or (2, 3, 8, 8), generator=generator, dtype=torch.float64)
    return values.requires_grad_() if requires_grad else values


_RANGES = (("weight", -1.5, 1.5), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2))


def spread(model: nn.Module) -> nn.Module:
    """The model in fp64, its norms' weights, biases and running statistics away from 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        for name, low, high in _RANGES:
            values = getattr(module, name, None)
            if values is not None and not isinstance(values, nn.parameter.UninitializedTensorMixin):
                values.data.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return model.double()


def loss_of(output: object) -> Tensor:
    """A random linear functional of every floating tensor of `output`."""
    generator = torch.Generator().manual_seed(7)
    terms = [
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for _, t in leaves(output)
        if t.is_floating_point()
    ]
    return torch.stack(terms).sum()


def train(
    model: nn.Module, args: tuple, kwargs: dict | None = None, *, steps: int = 2, run: Callable | None = None
) -> Numbers:
    """Two SGD steps in the model's mode, then a forward in eval mode; every number by its name.

    `run(model, *args, **kwargs)` takes the place of the call.
    """
    run = run or (lambda m, *a, **k: m(*a, **k))
    numbers: Numbers = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    inputs = [t for _, t in leaves((args, kwargs or {})) if t.requires_grad]
    for step in range(steps):
        optimizer.zero_grad()
        for tensor in inputs:
            tensor.grad = None
        torch.manual_seed(step)
        output = run(model, *args, **(kwargs or {}))
        loss = loss_of(output)
        if loss.requires_grad:
            loss.backward()
        numbers |= {f"{step} output {name}": t.detach().clone() for name, t in leaves(output)}
        gradients = {name: p.grad for name, p in model.named_parameters()}
        numbers |= {f"{step} gradient {name}": None if g is None else g.clone() for name, g in gradients.items()}
        numbers |= {f"{step} input gradient {i}": t.grad for i, t in enumerate(inputs)}
        optimizer.step()
    numbers |= {name: p.detach().clone() for name, p in model.named_parameters()}
    numbers |= {name: b.clone() for name, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        numbers |= {f"eval output {name}": t for name, t in leaves(run(model, *args, **(kwargs or {})))}
    return numbers


def assert_equal(plain: Numbers, other: Numbers) -> None:
    """The same names in the same order, None where there is None, every number within TOLERANCE."""
    assert list(plain) == list(other)
    floats = [t for t in plain.values() if t is not None and t.is_floating_point() and t.numel()]
    scale = max((float(t.nan_to_num(0, 0, 0).abs().max()) for t in floats), default=0.0)
    for name, expected in plain.items():
        found = other[name]
        assert (expected is None) == (found is None), f"{name}: {found}, plain gives {expected}"
        if expected is None:
            continue
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        torch.testing.assert_close(
            found,
            expected,
            rtol=0,
            atol=scale * TOLERANCE,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_trains_alike(
    model: nn.Module,
    *args: Any,
    prepare: Callable[[nn.Module], Any] | None = None,
    after: Callable[[nn.Module], Any] | None = None,
    run: Callable | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Compare the trained `model` with its optimized copy; returns that copy.

    `prepare` changes the plain model before `optimize`, `after` both of them afterwards.
    """
    if prepare is not None:
        prepare(model)
    optimized = normpass.optimize(copy.deepcopy(model))
    if after is not None:
        after(model)
        after(optimized)
    plain = train(model, args, kwargs, run=run)
    assert_equal(plain, train(optimized, args, kwargs, run=run))
    return optimized


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the gradients that there are and the buffers of one step; without gradients, of one forward."""
    model.zero_grad()
    y = model(x)
    if y.requires_grad:
        y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_same_step(plain: nn.Module, other: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    """Every number of a `step` of both agrees, to `tolerance` of the largest one of its tensor or of 1."""
    before, after = step(plain, x), step(other, x)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max()))


def collected(model: nn.Module, *args: Any, **kwargs: Any) -> Collected:
    """The graphs of one forward of a copy of `model`, which stays as it is; of `image()` if no arguments are given."""
    return captured_graphs(model, ((args or (() if kwargs else (image(),))), kwargs), Request())


def captures_of(optimized: nn.Module) -> list[Rewritten]:
    """Grows with every graph that is captured from now on."""
    seen: list[Rewritten] = []
    state_of(optimized).observers.append(lambda rewritten, inputs: seen.append(rewritten))
    return seen


def norms(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Row]:
    """Path of each norm -> what the report says of it."""
    return {row.path: row for row in norm_rows(model, collected(model, *args, **kwargs))}


def rewrites(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Path of each norm -> the rewrite it gets from `optimize`, None where it is left alone."""
    return {path: row.rewrite for path, row in norms(model, *args, **kwargs).items()}


def reasons(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Path of each norm -> why it is left alone, or why a better rewrite was refused."""
    return {path: row.reason for path, row in norms(model, *args, **kwargs).items()}


class ConvNet(nn.Module):
    """Two conv-norm-ReLU blocks, the second with a residual, and a linear head."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.act(self.bn(self.conv(h)) + h)
        return self.fc(h.mean((2, 3)))
