"""SyncBatchNorm on parts of a batch, one a process, against BatchNorm on the whole batch in one process.

The loss is a sum over samples, so that the processes' gradients add up to those of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from nested import leaves
from torch import Tensor, nn

import normpass

Numbers = dict[str, Tensor]
Change = Callable[[nn.Module], nn.Module]
LIMIT = 1e-9


def synced(model: nn.Module) -> nn.Module:
    """A copy with SyncBatchNorms, not optimized."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def optimized(model: nn.Module) -> nn.Module:
    return normpass.optimize(synced(model))


def summed(output: object, mine: slice, total: int) -> Tensor:
    """A random linear functional of the samples `mine` of `total`, and a little of their cubes."""
    generator = torch.Generator().manual_seed(7)
    terms = []
    for _, t in leaves(output):
        factors = torch.randn((total, *t.shape[1:]), generator=generator, dtype=torch.float64)[mine]
        terms.append((factors * (t + 0.1 * t**3)).sum())
    return torch.stack(terms).sum()


def trained(model: nn.Module, x: Tensor, sizes: Sequence[int], rank: int | None, steps: int = 3) -> Numbers:
    """Every number of some SGD steps: of one process's part of x, or with `rank=None` of all of it.

    Gradients of parameters are those of all processes.
    """
    first = 0 if rank is None else sum(sizes[:rank])
    mine = slice(first, first + (len(x) if rank is None else sizes[rank]))
    numbers: Numbers = {}
    named = getattr(model, "_orig_mod", model)  # of torch.compile
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    own = x[mine].detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    for step in range(steps):
        optimizer.zero_grad()
        own.grad = None
        output = model(own)
        summed(output, mine, len(x)).backward()
        for name, p in named.named_parameters():
            if p.grad is not None:
                if rank is not None:
                    dist.all_reduce(p.grad)
                numbers[f"{step} gradient {name}"] = p.grad.clone()
        numbers |= {f"{step} output {name}": t.detach() for name, t in leaves(output)}
        numbers |= {} if own.grad is None else {f"{step} input": own.grad.clone()}
        optimizer.step()
    numbers |= {f"buffer {name}": b.detach().clone() for name, b in named.named_buffers()}
    return numbers | {f"parameter {name}": p.detach().clone() for name, p in named.named_parameters()}


def assert_as_whole(part: Numbers, whole: Numbers, sizes: Sequence[int], rank: int, limit: float = LIMIT) -> None:
    """Equal, to `limit` of the largest number of each kind; the whole batch's outputs are taken apart."""
    first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
    assert list(part) == list(whole)
    scales: dict[str, float] = {}
    for name, t in whole.items():
        kind = _kind(name)
        scales[kind] = max(scales.get(kind, 0.0), float(t.abs().max()))
    for name, expected in whole.items():
        if _kind(name) in ("output", "input"):
            expected = expected[first:last]
        found = part[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        difference = float((found - expected).abs().max()) if found.numel() else 0.0
        assert difference <= limit * scales[_kind(name)], f"{name}: {difference} of {scales[_kind(name)]}"


def _kind(name: str) -> str:
    words = name.split()
    return words[1] if words[0].isdigit() else words[0]


def check(
    model: nn.Module, x: Tensor, sizes: Sequence[int], rank: int, change: Change = optimized, limit: float = LIMIT
) -> nn.Module:
    """Compare `change(model)` on this process's part with BatchNorm on the whole; returns what `change` gave."""
    changed = change(model)
    part = trained(changed, x, sizes, rank)
    assert_as_whole(part, trained(copy.deepcopy(model), x, sizes, None), sizes, rank, limit)
    return changed
