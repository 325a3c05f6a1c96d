"""The demo: train one network plain and optimized, and compare losses, memory and time.

Training runs in float64, so that rounding stays out of sight: training amplifies a difference of one
rounding about a hundredfold a step, and in float32 even two plain runs whose images differ by one ulp
are a percent apart within five steps. Memory and time are measured in float32, as people train.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from normpass import measure, models
from normpass.api import optimize
from normpass.copies.untouched import untouched
from normpass.demo import digits
from normpass.errors import NormpassError
from normpass.measure import Ratio, StepTime, Timeline, format_bytes
from normpass.report.plots import Curve, plot_memory

MODEL, STEPS, BATCH, SIZE = "torchvision:resnet18", 6, 16, 96

_NAMES = ("plain", "optimized")
_NEEDS = {"torchvision": "torchvision", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_CLASSES = 10
_TOLERANCE = 1e-6  # of the loss; what float64 leaves of the amplification described above
_ROUNDS = 5
_MEASURED = 2 * (2 + 2 + _ROUNDS + 1)  # steps it takes: kept, timeline, time with one to warm up, of two networks


class DemoError(NormpassError, ValueError):
    """The demo cannot run: a package is missing, or the network or the sizes do not suit it."""


@dataclass(frozen=True)
class Result:
    """What the demo found; pairs are (plain, optimized)."""

    model: str
    losses: tuple[tuple[float, float], ...]
    """one pair a training step"""
    kept: tuple[int, int]
    """bytes kept for backward"""
    timelines: tuple[Timeline, Timeline]
    times: tuple[StepTime, StepTime]
    ratio: Ratio
    """time of an optimized step over the plain step beside it"""

    @property
    def agrees(self) -> bool:
        """Whether every loss is the same up to rounding."""
        return all(abs(after - before) <= _TOLERANCE * abs(before) for before, after in self.losses)


def run(model: str, steps: int, batch: int, size: int, console: Console) -> Result:
    """Train and measure the network that the name `model` stands for; print what comes out.

    Args:
        model: as for `normpass.models.load`; a classification network.
        steps: training steps.
        batch: images a step.
        size: height and width of the images, in pixels.
        console: where the progress bar and the tables go.

    Raises:
        DemoError: a package is missing, or the network does not classify images of that size.
        ModelSpecError: nothing can be built from `model`.
    """
    _check_packages()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = models.load(model)
        batches = _batches(batch, size)
        images, labels = next(batches)
        _check_network(model, plain, images)
        console.print(f"{model}: {steps} steps on {batch} digits of {size}x{size}, plain and optimized")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("training", total=2 * steps + _MEASURED)
            losses = _train(plain, itertools.islice(batches, steps), partial(progress.advance, task))
            progress.update(task, description="measuring")
            result = _measure(model, plain, images, labels, losses, partial(progress.advance, task))
    _print(result, console)
    return result


def plot(result: Result, path: Path) -> None:
    """Draw the memory along one step, plain and optimized, to a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    curves = [Curve(*given) for given in zip(_NAMES, result.kept, result.timelines, strict=True)]
    plot_memory(curves, f"Memory along one training step: {result.model}", path)


def _check_packages() -> None:
    missing = [package for name, package in _NEEDS.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'the demo needs {" and ".join(missing)}: pip install "normpass[demo]"')


def _batches(batch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: pass after pass over the digits."""
    try:
        passes = (digits.batches(batch, size, seed) for seed in itertools.count())
        first = next(passes)
    except ValueError as error:
        raise DemoError(f"{error}: choose another --batch") from error
    return itertools.chain(first, itertools.chain.from_iterable(passes))


def _check_network(spec: str, model: nn.Module, images: Tensor) -> None:
    try:
        with untouched(model), torch.no_grad():
            output = model(images)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        shape = "x".join(map(str, images.shape))
        raise DemoError(f"{spec} does not run on images of {shape} ({error}): try another --size or --batch") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < _CLASSES:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DemoError(f"{spec} returns {what}, not one score for each class: try --model {MODEL}")


def _train(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], advance: Callable[[int], None]
) -> tuple[tuple[float, float], ...]:
    """Losses of both copies of `model`, trained in float64 from its weights on the same batches."""
    plain = copy.deepcopy(model).double()
    pair = (plain, optimize(copy.deepcopy(plain)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in pair]
    losses = []
    for step, (images, labels) in enumerate(batches):
        both = []
        for network, optimizer in zip(pair, optimizers, strict=True):
            torch.manual_seed(step)  # the same dropout in both
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images.double()), labels)
            loss.backward()
            optimizer.step()
            both.append(loss.item())
            advance(1)
        losses.append((both[0], both[1]))
    return tuple(losses)


def _measure(
    name: str,
    plain: nn.Module,
    images: Tensor,
    labels: Tensor,
    losses: tuple[tuple[float, float], ...],
    advance: Callable[[int], None],
) -> Result:
    pair = dict(zip(_NAMES, (plain, optimize(plain)), strict=True))
    loss = partial(F.cross_entropy, target=labels)
    kept, timelines = [], []
    for network in pair.values():
        kept.append(measure.kept_bytes(network, images))
        advance(2)
        timelines.append(measure.memory_timeline(network, images, loss=loss))
        advance(2)
    times = measure.step_time(pair, images, rounds=_ROUNDS, loss=loss, warmup=1)
    ratio = measure.ratios(times, "plain")["optimized"]
    advance(2 * (_ROUNDS + 1))
    two_times = (times["plain"], times["optimized"])
    return Result(name, losses, (kept[0], kept[1]), (timelines[0], timelines[1]), two_times, ratio)


def _print(result: Result, console: Console) -> None:
    table = Table("step", "plain", "optimized", "difference", title="loss, float64, same initial weights")
    for step, (before, after) in enumerate(result.losses, start=1):
        table.add_row(str(step), f"{before:.10f}", f"{after:.10f}", f"{after - before:.1e}")
    console.print(table)
    verdict = "the losses agree" if result.agrees else "[red]the losses DIFFER: please report it[/red]"
    console.print(f"{verdict} (allowed: {_TOLERANCE:.0e} of the loss)\n")

    table = Table("", *_NAMES, "optimized / plain", title="one training step, float32")
    peaks = [timeline.peak for timeline in result.timelines]
    for what, (before, after) in (("kept for backward", result.kept), ("peak memory", peaks)):
        table.add_row(what, format_bytes(before), format_bytes(after), f"{after / before:.2f}")
    medians = [f"{time.median:.3f} s" for time in result.times]
    spread = f"{result.ratio.median:.2f} ({result.ratio.low:.2f} to {result.ratio.high:.2f})"
    table.add_row("time", *medians, spread)
    console.print(table)
