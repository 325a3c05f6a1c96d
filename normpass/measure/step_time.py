"""Seconds of a training step: models side by side, round by round."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from normpass.copies.untouched import leaves_of, untouched
from normpass.errors import InvalidInputError
from normpass.measure.step import Loss, checked_device, forward_of, run_step


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: median, lower and upper quartile, and every round's time in order."""

    median: float
    low: float
    high: float
    times: tuple[float, ...]

    @classmethod
    def of(cls, times: Sequence[float]) -> StepTime:
        """What the rounds' times, at least one, amount to."""
        return cls(*quartiles(times), tuple(times))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time relative to a base, round by round: median, lower and upper quartile."""

    median: float
    low: float
    high: float


def step_time(
    models: Mapping[str, nn.Module],
    *inputs: object,
    rounds: int = 10,
    loss: Loss | None = None,
    warmup: int = 2,
    around: Mapping[str, Callable[[], contextlib.AbstractContextManager[object]]] | None = None,
) -> dict[str, StepTime]:
    """Seconds of forward, loss and backward for each model, measured side by side.

    Every round runs each model once, in an order that rotates from round to round, so that slow drifts of
    the machine fall on all of them; compare with `ratios`. Every step starts without gradients, and inside the
    context that `around` has for its model.

    Raises:
        InvalidInputError: no models, `rounds` < 1, `warmup` < 0, or as for `peak_bytes`.
        TypeError: as for `peak_bytes`.
    """
    if not isinstance(models, Mapping):
        raise InvalidInputError(
            f'`models` has a name for each: step_time({{"plain": model}}, …), it is a {type(models).__name__}'
        )
    if not models or rounds < 1 or warmup < 0:
        raise InvalidInputError(f"needs models, `rounds` >= 1 and `warmup` >= 0, not {rounds} and {warmup}")
    devices = {name: checked_device(model, inputs) for name, model in models.items()}
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(untouched(model, inputs))
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with (around or {}).get(name, contextlib.nullcontext)():
                    seconds = _seconds(models[name], inputs, loss, devices[name])
                if turn >= 0:
                    times[name].append(seconds)
    return {name: StepTime.of(values) for name, values in times.items()}


def ratios(times: Mapping[str, StepTime], base: str) -> dict[str, Ratio]:
    """Each entry's time over the time of `base` in the same round (the base's own ratio is 1).

    Raises:
        InvalidInputError: there is no `base` among the entries.
    """
    if base not in times:
        raise InvalidInputError(f"no entry `{base}` to compare with; there are: {', '.join(times) or 'none'}")
    paired = {n: [a / b for a, b in zip(t.times, times[base].times, strict=True)] for n, t in times.items()}
    return {name: Ratio(*quartiles(values)) for name, values in paired.items()}


def _seconds(model: nn.Module, inputs: Sequence[object], loss: Loss | None, device: torch.device) -> float:
    for leaf in leaves_of(model, inputs):
        leaf.grad = None
    wait_for(device)
    start = time.perf_counter()
    run_step(partial(forward_of, model, inputs, {}), loss)
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high
