"""A network under `torch.compile(backend="normpass")` beside the plain one: numbers, graphs, kept bytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from nested import leaves
from networks import Network
from torch import Tensor, nn
from torch._dynamo.utils import counters

import normpass
from normpass.measure import kept_bytes

Numbers = dict[str, list[Tensor]]


def compile_with(model: nn.Module, inner: str) -> Any:
    """The model under our backend, in one graph, with code of its own."""
    torch.compiler.reset()
    return torch.compile(model, backend="normpass", options={"inner": inner}, fullgraph=True)


def quietly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The call without what torch itself warns of while it compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def train(model: nn.Module, forward: Callable, inputs: Callable[[int], tuple], dtype: torch.dtype, steps=2) -> Numbers:
    """Outputs and gradients of SGD steps, and the buffers afterwards, by kind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    numbers: Numbers = {"outputs": [], "gradients": []}
    for step in range(steps):
        torch.manual_seed(step)
        outputs = [
            t for _, t in leaves(quietly(forward, *(x.to(dtype) for x in inputs(step)))) if t.is_floating_point()
        ]
        optimizer.zero_grad()
        torch.stack([t.square().mean() for t in outputs]).sum().backward()
        optimizer.step()
        numbers["outputs"] += [t.detach() for t in outputs]
        numbers["gradients"] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    numbers["buffers"] = [b.clone() for b in model.buffers()]
    return numbers


def largest_difference(found: Numbers, expected: Numbers) -> float:
    """The largest difference over the largest magnitude of its kind; counters must be equal."""
    worst = 0.0
    for kind, tensors in expected.items():
        assert [t.shape for t in found[kind]] == [t.shape for t in tensors], kind
        scale = max((float(t.abs().max()) for t in tensors if t.is_floating_point()), default=1.0)
        for a, b in zip(found[kind], tensors, strict=True):
            if b.is_floating_point():
                worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
            else:
                assert torch.equal(a, b), kind
    return worst


def _format_of(x: Tensor, wanted: torch.memory_format) -> torch.memory_format:
    return torch.contiguous_format if wanted is torch.preserve_format or x.dim() != 4 else wanted


def compare(
    entry: Network,
    inner: str,
    memory_format: torch.memory_format = torch.preserve_format,
) -> dict[str, Any]:
    """Two steps in float64 of the plain network and of the compiled one, and how many graphs there were.

    `difference` is between the two; `graphs` counts them over five steps, `graphs of another batch` those that a
    batch of one more sample adds; `kept` is in bytes, plain, of `optimize` and of the backend.
    """
    dtype = torch.float64
    plain = entry.build().to(dtype, memory_format=memory_format)
    own, optimized = copy.deepcopy(plain), normpass.optimize(copy.deepcopy(plain))

    def inputs(step: int) -> tuple:
        return tuple(
            x.to(dtype).contiguous(memory_format=_format_of(x, memory_format)) for x in entry.make_inputs(step)
        )

    expected = train(plain, plain, inputs, dtype)
    compiled = compile_with(own, inner)
    before = counters["stats"]["unique_graphs"]
    found = train(own, compiled, inputs, dtype)
    row: dict[str, Any] = {"network": entry.name, "inner": inner, "difference": largest_difference(found, expected)}
    x = inputs(0)[0]
    for _ in range(3):
        quietly(compiled, x)
    row["graphs"] = counters["stats"]["unique_graphs"] - before
    kept = quietly(kept_bytes, compiled, x)
    row["kept"] = {"plain": kept_bytes(plain, x), "optimize": kept_bytes(optimized, x), "backend": kept}
    before = counters["stats"]["unique_graphs"]
    quietly(compiled, torch.cat((x, x[:1])))
    row["graphs of another batch"] = counters["stats"]["unique_graphs"] - before
    return row
