"""Each op alone, without autograd, beside a copy of as many bytes: how close its kernels come to the memory's limit.

Bytes are the fewest that the algorithm moves, in arrays the size of x: see `KERNELS`.
"""

from __future__ import annotations

import statistics as statistics_of
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from normpass import ops
from normpass.bench.layers import COPY, Case, copy_step, make_inputs, name_of, of_copy
from normpass.measure.step_time import wait_for
from normpass.measure.timing import Clock, alternate


@dataclass(frozen=True)
class Statistics:
    """The per-channel arguments of an op, each (C,), float32."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


Kernel = Callable[[tuple[Tensor, ...], Statistics], object]
_EPS = 1e-5
_CALLS = 50
_FEW, _MANY = 2, 16
_LEAKY = ("leaky_relu", (0.01,))
_ALL = (True, True, True, True)


@dataclass(frozen=True)
class KernelRow:
    """One op on one shape; or the copy of one array."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    arrays: int
    """the size of x, that are read or written"""
    seconds: float
    """median over the rounds"""
    seconds_low: float
    """lower quartile"""
    seconds_high: float
    """upper quartile"""
    gigabytes_per_second: float
    of_copy: float
    """the time of copying as many bytes over this time: 1 is the speed of the copy"""
    call_microseconds: float
    """of Python until the call returns, on a tensor so small that nothing else takes time: median over the rounds"""


def _moments(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    return ops.moments(inputs[0])


def _norm_act(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    return ops.norm_act(inputs[0], None, s.weight, s.bias, s.mean, s.var, _EPS, True, "relu")


def _norm_add_act(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    return ops.norm_act(inputs[0], inputs[2], s.weight, s.bias, s.mean, s.var, _EPS, True, "relu")


def _norm_act_backward(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    x, grad, _ = inputs
    needs = (True, False, True, True)
    return ops.norm_act_backward(grad, x, None, s.weight, s.bias, s.mean, s.var, _EPS, True, "relu", (), needs)


def _norm_add_act_backward(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    x, grad, residual = inputs
    return ops.norm_act_backward(grad, x, residual, s.weight, s.bias, s.mean, s.var, _EPS, True, "relu", (), _ALL)


def _inplace_abn_backward(inputs: tuple[Tensor, ...], s: Statistics) -> object:
    z, grad, _ = inputs
    return ops.inplace_abn_backward(grad, z, s.weight, s.bias, s.var, _EPS, True, *_LEAKY, _ALL[:3])


KERNELS: dict[str, tuple[int, Kernel]] = {
    "moments": (1, _moments),  # read x
    "norm_act": (2, _norm_act),  # read x, write z; the rebuild of z in backward is this too
    "norm_act_backward": (5, _norm_act_backward),  # read x, dz; read x, dz, write dx
    "norm_add_act": (3, _norm_add_act),  # and read the residual
    "norm_add_act_backward": (7, _norm_add_act_backward),  # and read the residual, write its gradient; dx is from that
    "inplace_abn_backward": (5, _inplace_abn_backward),  # read z, dz; read z, dz, write dx
}


def bench_kernels(case: Case, rounds: int = 10) -> list[KernelRow]:
    """Every op on the shape, dtype and layout of a case (its layer does not matter), alternating; the copy is last.

    Args:
        case: (N, C, *) shape, dtype and layout of x; per-channel values are float32.
        rounds: samples of each.
    """
    torch.manual_seed(0)
    inputs = make_inputs(case, count=3)
    with torch.no_grad():
        statistics = _statistics(inputs[0][0])
        steps = {name: partial(_step, kernel, inputs, statistics) for name, (_, kernel) in KERNELS.items()}
        copy = partial(copy_step, [given[0] for given in inputs], torch.empty_like(inputs[0][0]))
        times = alternate({**steps, COPY: copy}, case.device, rounds)
        calls = _call_microseconds(case, rounds)
    size = inputs[0][0].nbytes
    rows = []
    for name, (*_, taken) in times.items():
        arrays = 2 if name == COPY else KERNELS[name][0]
        speed = arrays * size / taken.median * 1e-9
        fraction = of_copy(taken, times[COPY][-1], arrays)
        described = (name, case.shape, name_of(case.dtype), case.layout, arrays)
        rows.append(KernelRow(*described, taken.median, taken.low, taken.high, speed, fraction, calls[name]))
    return rows


def _call_microseconds(case: Case, rounds: int) -> dict[str, float]:
    """Of each op, and of the copy; on a GPU the calls are queued, and nobody waits for them in between."""
    inputs = make_inputs(replace(case, shape=(_FEW, _MANY, *[_FEW] * (len(case.shape) - 2))), count=3)[0]
    statistics, target = _statistics(inputs[0]), torch.empty_like(inputs[0])
    calls: dict[str, Callable[[], object]] = {
        name: partial(kernel, inputs, statistics) for name, (_, kernel) in KERNELS.items()
    }
    calls[COPY] = partial(target.copy_, inputs[0])
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            taken[name].append(_seconds_of(call, case.device) / _CALLS * 1e6)
    return {name: statistics_of.median(found[1:]) for name, found in taken.items()}  # the first compiles


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    seconds = time.perf_counter() - start
    wait_for(device)
    return seconds


def _statistics(x: Tensor) -> Statistics:
    mean, var = ops.moments(x)
    return Statistics(torch.ones_like(mean), torch.zeros_like(mean), mean, var)


def _step(kernel: Kernel, inputs: list[tuple[Tensor, ...]], s: Statistics, turn: int, clock: Clock) -> None:
    given = inputs[turn % len(inputs)]
    clock.lap()
    kernel(given, s)
    clock.lap()
