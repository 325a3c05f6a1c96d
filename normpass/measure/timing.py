"""Seconds of short calls, side by side: alternating rounds, several calls a sample, events on a GPU.

On a GPU the calls of a sample are queued behind a pause, so that the events between them see the kernels
and not the Python that launches them. That cost is a figure of its own, see `overhead`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from normpass.measure.step_time import StepTime, wait_for

_LEAST_SECONDS = 0.02
"""of one sample on the CPU, so that the clock and a switch of threads are a small part of it"""
_MOST_CALLS = 1000
_CUDA_CALLS = 10
_CUDA_PAUSE = 20_000_000
"""GPU cycles, about 10 ms: the calls of a sample are queued in less"""


class Clock:
    """Takes the time at each `lap`: on the CPU at once, on CUDA where the stream gets there."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def lap(self) -> None:
        """The end of one phase and the start of the next."""
        if not self._cuda:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def phases(self) -> tuple[float, ...]:
        """Seconds from each lap to the next. On CUDA the stream must have passed the last one."""
        if self._cuda:
            return tuple(a.elapsed_time(b) * 1e-3 for a, b in zip(self._events, self._events[1:], strict=False))
        return tuple(b - a for a, b in zip(self._times, self._times[1:], strict=False))


Step = Callable[[int, Clock], None]
"""One call of a contender: (how many came before it, the clock, to be lapped around every phase)."""


def alternate(
    steps: Mapping[str, Step], device: torch.device, rounds: int, least_seconds: float = _LEAST_SECONDS
) -> dict[str, list[StepTime]]:
    """Seconds of each phase of every step, and of all its phases together (last).

    Every round takes one sample of each step, the mean of several calls, in an order that rotates from round
    to round. So the i-th times of two steps were taken side by side: compare them with `measure.ratios`.

    Raises:
        ValueError: no steps, or `rounds` < 1.
    """
    if not steps or rounds < 1:
        raise ValueError(f"needs steps and `rounds` >= 1, not {rounds}")
    names = list(steps)
    calls = {name: _calls(steps[name], device, least_seconds) for name in names}
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    with _without_collector():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                phases = _sample(steps[name], device, calls[name])
                samples[name].append((*phases, sum(phases)))
    return {name: [StepTime.of(phase) for phase in zip(*taken, strict=True)] for name, taken in samples.items()}


def _calls(step: Step, device: torch.device, least_seconds: float) -> int:
    """How many calls make one sample; warms the step up on the way."""
    if device.type == "cuda":
        _sample(step, device, _CUDA_CALLS)
        return _CUDA_CALLS
    _sample(step, device, 1)
    seconds = min(sum(_sample(step, device, 1)) for _ in range(2))
    return min(_MOST_CALLS, max(1, math.ceil(least_seconds / max(seconds, 1e-9))))


def _sample(step: Step, device: torch.device, calls: int) -> tuple[float, ...]:
    """Seconds of each phase, the mean of so many calls one after another."""
    clocks = [Clock(device) for _ in range(calls)]
    wait_for(device)
    if device.type == "cuda":
        torch.cuda._sleep(_CUDA_PAUSE)
    for turn, clock in enumerate(clocks):
        step(turn, clock)
    wait_for(device)
    taken = zip(*(clock.phases() for clock in clocks), strict=True)
    return tuple(sum(phase) / calls for phase in taken)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Garbage is collected once before, which takes as long as many samples, and in the middle of none."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
