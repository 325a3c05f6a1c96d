"""Bytes that the norms of a training step move on CUDA, without a GPU: eager, ours, and ours within budgets.

The step runs on the CPU with a few samples, and every byte is counted for as many as asked. Ours calls the host code of
the CUDA kernels on a device that counts instead of launching (`normpass.kernels.cuda.counting`); what ATen does beside
them is read from a profile. The norms' share of a step is

    norms       moments, normalization, activation and residual, forward and backward; what is rebuilt too
    additions   of the gradients of a tensor with several readers, by autograd: two are read, one is written
    replays     convolutions and poolings that a plan runs again in backward

Eager's kernels are ATen's: a batch norm reads x for the moments and again for y; each activation and addition is a pass
of its own. What convolutions move otherwise is the same for all and not counted.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchRuntimeError

from normpass import kernels
from normpass.budget import cost
from normpass.budget.planning import plan_graphs
from normpass.errors import InvalidInputError
from normpass.kernels.cuda.counting import CountingDevice
from normpass.kernels.cuda.kernels import CudaKernels
from normpass.kernels.cuda.library import GuardedKernels
from normpass.measure.memory import profiled
from normpass.optimized import optimize_in_place
from normpass.pipeline import NOTES_ITSELF, Request, Rewritten, rewrite
from normpass.rewrite.choices import Decisions
from normpass.serialize.traffic import graph_of

SAMPLES = 2
"""that the step is run with: a norm needs more than one value a channel"""

_NORMS = {
    **{"aten::native_batch_norm": 3, "aten::cudnn_batch_norm": 3, "aten::native_batch_norm_backward": 5},
    **{"aten::relu": 2, "aten::relu_": 2, "aten::threshold_backward": 3, "aten::silu": 2, "aten::silu_": 2},
    **{"aten::silu_backward": 3, "aten::hardtanh": 2, "aten::hardtanh_": 2, "aten::hardtanh_backward": 3},
}
_ADDITIONS = ("aten::add", "aten::add_")


@dataclass(frozen=True)
class ByteRow:
    """What one contender moves in a step."""

    network: str
    input: tuple[int, ...]
    dtype: str
    contender: str
    forward: int
    """bytes of the norms"""
    backward: int
    """the same"""
    additions: int = 0
    replays: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.additions + self.replays


def byte_rows(
    network: str, model: nn.Module, shape: Sequence[int], dtype: torch.dtype, budgets: Sequence[float] = (0.8,)
) -> list[ByteRow]:
    """Eager, ours, ours with every result kept, and ours within each budget, in channels_last.

    Args:
        model: takes one tensor; left as it is.
        shape: of the input, (N, C, H, W): bytes are those of N samples, and plans are made for them.
        dtype: of activations and convolutions; norms keep their parameters in float32.
        budgets: fractions of what the plain model keeps; which results these keep is planned by CUDA's rates.

    Raises:
        InvalidInputError: it does not run on an input of that shape.
        InfeasibleBudgetError: a budget cannot be kept.
        InvalidModelError: it is no single graph.
    """
    plain = _in_dtype(model, dtype)
    rewritten = _rewritten(plain, shape, dtype)
    decisions = {"ours": Decisions(), "ours_kept": Decisions(kept=_rebuilt(rewritten))}
    seconds = functools.partial(cost.seconds, device="cuda")
    for budget in budgets:
        decisions[f"ours@{budget:g}"] = plan_graphs([rewritten], budget, seconds=seconds).decisions
    x = torch.ones(SAMPLES, *shape[1:], dtype=dtype).contiguous(memory_format=torch.channels_last)
    described = network, tuple(shape), str(dtype).removeprefix("torch.")
    models: dict[str, nn.Module] = {"eager": copy.deepcopy(plain)}
    for name, chosen in decisions.items():
        models[name] = optimize_in_place(copy.deepcopy(plain), Request(decisions=chosen))
    rows = []
    for name, candidate in models.items():
        forward, backward, added = (count * shape[0] // SAMPLES for count in _moved(candidate, x))
        replays = _of_replays(rewritten, decisions.get(name, Decisions()))
        rows.append(ByteRow(*described, name, forward, backward, added, replays))
    return rows


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    other = copy.deepcopy(model).to(dtype=dtype).to(memory_format=torch.channels_last).train()
    for module in other.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.to(_dtype_of_norms(dtype))
    return other


def _dtype_of_norms(dtype: torch.dtype) -> torch.dtype:
    """Of a norm's parameters, as under autocast."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rewritten(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Rewritten:
    """The graph at the full batch, on tensors without memory."""
    without_memory: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        other = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        without_memory[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
    x = torch.empty(tuple(shape), dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    try:
        graph_module, inputs = graph_of(copy.deepcopy(model, without_memory), x)
    except TorchRuntimeError as error:
        name = type(model).__name__
        raise InvalidInputError(f"{name} does not run on an input of shape {tuple(shape)}: {error}") from error
    with kernels.replaced("meta", GuardedKernels(CudaKernels(CountingDevice()))):  # which know what they keep
        return rewrite(graph_module, inputs, Request())


def _rebuilt(rewritten: Rewritten) -> frozenset[str]:
    assert rewritten.found is not None
    steps, maker = rewritten.found.facts.steps, rewritten.found.maker
    return frozenset(steps[maker[value]].key for value in rewritten.again)


def _of_replays(rewritten: Rewritten, decisions: Decisions) -> int:
    """What runs again: arguments and results, of a pooling with its indices."""
    assert rewritten.found is not None
    facts = rewritten.found.facts
    keys = decisions.rebuilt | decisions.replayed
    again = [step for step in facts.steps if step.key in keys and step.target not in NOTES_ITSELF]  # which are launches
    return sum(cost.moved(step, facts) + (step.internals if step.key in decisions.replayed else 0) for step in again)


def _moved(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Of one step: the norms forward and backward, additions of gradients."""
    device = CountingDevice()
    with kernels.replaced("cpu", GuardedKernels(CudaKernels(device))):
        model(x)  # is captured
        device.launches.clear()
        with profiled(shapes=True) as of_forward:
            loss = model(x).float().mean()
        by_kernels = device.total()
        device.launches.clear()
        with profiled(shapes=True) as of_backward:
            loss.backward()
    size, forward, backward = x.element_size(), _operators(of_forward), _operators(of_backward)
    joins, added = (3 * size * sum(map(_of_addition, events)) for events in (forward, backward))
    norms, gradients = (size * sum(map(_of_norm, events)) for events in (forward, backward))
    return by_kernels + joins + norms, device.total() + gradients, added


Event = tuple[str, list[list[int]]]
"""An operator and the shapes of its arguments."""


def _operators(records: list[Any]) -> list[Event]:
    return [(record.name(), record.shapes()) for record in records if record.kind() == "push"]


def _of_norm(event: Event) -> int:
    name, shapes = event
    return _NORMS[name] * math.prod(shapes[0]) if name in _NORMS and shapes and len(shapes[0]) > 1 else 0


def _of_addition(event: Event) -> int:
    """Values of one of two activations that are added."""
    name, shapes = event
    adds = name in _ADDITIONS and len(shapes) > 1 and len(shapes[0]) > 2 and list(shapes[0]) == list(shapes[1])
    return math.prod(shapes[0]) if adds else 0
