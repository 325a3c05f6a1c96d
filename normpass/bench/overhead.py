"""What one BatchNorm-ReLU site costs in Python and dispatch: on a tensor so small that nothing else takes time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from normpass import kernels, ops
from normpass.measure.timing import Clock, alternate
from normpass.recipe import notes
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, split_norm_act

Forward = Callable[[nn.BatchNorm2d, Tensor], Tensor]

_SHAPE = (2, 16, 4, 4)


def call_overhead(rounds: int = 10) -> dict[str, float]:
    """Microseconds of one site on the CPU, in training, x of 2×16×4×4 in float32; the median over `rounds`.

    Returns:
        "<way> forward" and "<way> step" (forward and backward) for each way: "plain" is `nn.BatchNorm2d` and
        `nn.ReLU`; "dispatcher" the ops as `torch.func`, modes and tracing call them; "eager" the same without
        the dispatcher, as a rewritten model calls them; "eager split" with its recipe noted, and the hooks of an
        optimized model in place; "reference" is "eager" without kernels.
    """
    x = torch.randn(_SHAPE, requires_grad=True)
    grad = torch.randn(_SHAPE)
    ways: dict[str, Forward] = {
        "plain": _plain,
        "dispatcher": _dispatcher,
        "eager": _eager,
        "eager split": _eager_split,
        "reference": _reference,
    }
    steps = {name: partial(_step, way, nn.BatchNorm2d(_SHAPE[1]), x, grad) for name, way in ways.items()}
    taken = alternate(steps, x.device, rounds)
    found = {}
    for name, (forward, _, whole) in taken.items():
        found[f"{name} forward"] = forward.median * 1e6
        found[f"{name} step"] = whole.median * 1e6
    return found


def _step(way: Forward, norm: nn.BatchNorm2d, x: Tensor, grad: Tensor, turn: int, clock: Clock) -> None:
    clock.lap()
    z = way(norm, x)
    clock.lap()
    torch.autograd.backward(z, grad)
    clock.lap()


def _plain(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return torch.relu(norm(x))


def _eager(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return fused_norm_act(FunctionalBatchNorm.of(norm), x, None, "relu")


def _eager_split(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    with notes.recording():
        return split_norm_act(FunctionalBatchNorm.of(norm), x, None, "relu")


def _reference(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    with kernels.disabled():
        return _eager(norm, x)


def _dispatcher(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, var = ops.moments(x.detach())
    count = x.numel() // x.shape[1]
    assert norm.num_batches_tracked is not None and norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked.add_(1)
    new = ops.updated_running_stats(norm.running_mean, norm.running_var, mean, var, 0.1, count)
    norm.running_mean.copy_(new[0])
    norm.running_var.copy_(new[1])
    return ops.norm_act(x, None, norm.weight, norm.bias, mean, var, norm.eps, True, "relu")
