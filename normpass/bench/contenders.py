"""How one network is made ready in the ways that users choose between: eager, ours, torch.compile, checkpoint.

Every contender gets a copy of the network of its own, so that none changes what another measures.

torch.compile's points are those of its partitioner, which decides what forward keeps and what backward computes
again. The flags hold while a contender's graphs are compiled, in a backend of its own: with one backend for all,
the second copy of a class would find and run the code that was compiled for the first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.backends.registry import CompilerFn
from torch._functorch import config as functorch_config
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from normpass import kernels
from normpass.api import optimize
from normpass.backend import compile_graph

Make = Callable[[nn.Module, Tensor, str], nn.Module]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Job(nn.Module):
    """A model with its input: called without arguments, under autocast where a narrower dtype is asked for."""

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.x, self.dtype = model, x, dtype

    def forward(self) -> Any:
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(self.x)


@dataclass(frozen=True)
class Contender:
    """One way to run a network."""

    make: Make
    """(network of its own, its input, compile backend) to what is run"""
    words: str
    channels_last: bool | None = None
    """None: as asked for"""
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """entered around each of its steps"""

    def layout(self, x: Tensor, channels_last: bool) -> torch.memory_format:
        """The memory format of its input and weights; x: (N, C, *)."""
        wanted = channels_last if self.channels_last is None else self.channels_last
        return _CHANNELS_LAST.get(x.dim(), torch.contiguous_format) if wanted else torch.contiguous_format

    def job(self, network: nn.Module, x: Tensor, channels_last: bool, dtype: torch.dtype, backend: str) -> Job:
        """A copy of `network` and `x`, both in the layout, the copy made ready; compiled at its first step."""
        layout = self.layout(x, channels_last)
        own = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=layout)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):  # a budget counts what is kept there
            made = self.make(own, x, backend)
        return Job(made, x, dtype)


def checkpointed(network: nn.Module) -> nn.Module:
    """`network` with every outermost block that holds a batch norm under `torch.utils.checkpoint`.

    A block is an element of an `nn.Sequential` that has parts of its own. Its forward runs twice, and its
    running statistics move twice.
    """
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.Sequential) and _is_block(child):
                blocks.append(child)
            else:
                walk(child)

    walk(network)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return network


def compiled(network: nn.Module, backend: str | CompilerFn, **flags: object) -> nn.Module:
    """`network` under torch.compile with these flags of `torch._functorch.config`, its shapes fixed."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with functorch_config.patch(flags) if flags else contextlib.nullcontext():
            return lookup_backend(backend)(graph, inputs)

    result: Any = torch.compile(network, backend=compile_graph, dynamic=False)
    return result


def _is_block(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in list(module.modules())[1:])


def _eager(network: nn.Module, x: Tensor, backend: str) -> nn.Module:
    return network


def _ours(network: nn.Module, x: Tensor, backend: str) -> nn.Module:
    return optimize(network)


def _ours_within(budget: float) -> Make:
    return lambda network, x, backend: optimize(network, x, memory_budget=budget)


def _checkpoint(network: nn.Module, x: Tensor, backend: str) -> nn.Module:
    return checkpointed(network)


def _compile_normpass(network: nn.Module, x: Tensor, backend: str) -> nn.Module:
    return compiled(network, partial(compile_graph, options={"inner": backend}))


def _compile(**flags: object) -> Make:
    return lambda network, x, backend: compiled(network, backend, **flags)


CONTENDERS = {
    "eager": Contender(_eager, "eager, contiguous", channels_last=False),
    "eager_channels_last": Contender(_eager, "eager, channels_last", channels_last=True),
    "ours": Contender(_ours, "normpass.optimize"),
    "ours_reference": Contender(_ours, "normpass.optimize, without the kernels", around=kernels.disabled),
    "compile": Contender(_compile(), "torch.compile"),
    "compile_ban_recompute": Contender(
        _compile(ban_recompute_materialized_backward=False),
        "torch.compile, ban_recompute_materialized_backward=False",
    ),
    "compile_aggressive": Contender(
        _compile(aggressive_recomputation=True), "torch.compile, aggressive_recomputation=True"
    ),
    "compile_normpass": Contender(_compile_normpass, 'torch.compile, backend="normpass"'),
    "checkpoint": Contender(_checkpoint, "torch.utils.checkpoint around every block"),
}
WITH_BUDGET = ("ours", "compile")
"""Contenders that `NAME@FRACTION` gives a memory budget, as `ours@0.5`."""
COMPILED = ("compile", "compile_ban_recompute", "compile_aggressive", "compile@0.5", "compile_normpass")
"""torch.compile as it comes, with each of its partitioner's points, and with our backend."""
FRONTIER = (
    *("eager", "eager_channels_last", "checkpoint"),
    *("ours", "ours@0.75", "ours@0.6", "ours@0.5", "ours@0.4", "ours@0.3", "ours@0.2"),
    *("compile", "compile_ban_recompute", "compile_aggressive", "compile@0.75", "compile@0.5", "compile@0.25"),
)
"""Ours over a sweep of budgets beside what else trades time for memory."""


def contender(name: str) -> Contender:
    """The contender of that name; `NAME@FRACTION` is one with a memory budget.

    Raises:
        KeyError: there is none.
    """
    kind, at, text = name.partition("@")
    if not at:
        return CONTENDERS[name]
    budget = _fraction(text)
    if kind not in WITH_BUDGET or budget is None:
        raise KeyError(name)
    if kind == "ours":
        return Contender(_ours_within(budget), f"normpass.optimize, memory_budget={budget}")
    return Contender(_compile(activation_memory_budget=budget), f"torch.compile, activation_memory_budget={budget}")


def _fraction(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 1 else None
