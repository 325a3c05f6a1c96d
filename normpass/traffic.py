"""Memory traffic of a training step that runs sub-batch by sub-batch: a model, and what it says of a network.

A group of units runs on s samples at a time, s = buffer // footprint of its largest unit, in it = ceil(N / s)
iterations, so that what lies between its layers stays in a buffer on the chip (mini-batch serialisation, arXiv
1810.00307). What still moves, for N samples:

    weights·(4·it − 1)      read in forward and in the input's gradient; the weight gradient written in every
                            iteration, and read in all but the first
    2·saved·N               what backward needs, stored and loaded
    2·(input + output)·N    the group's ends: input loaded, its gradient stored; output stored, its gradient loaded
    branching·N             only where nothing is held for another branch (`reuse=False`), whose footprint is smaller

Compared with `streamed·N + 3·weights`: plain layers, each of which reads from memory and writes there.
`normpass.units` has the bytes of a unit, `normpass.grouping` the two ways to group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from normpass.capture import CaptureError, capture, required_arguments
from normpass.cuts import shapes_of
from normpass.errors import InvalidInputError, InvalidModelError
from normpass.grouping import Groups, greedy, optimal
from normpass.units import Unit, units_of


@dataclass(frozen=True)
class Group:
    """Neighbouring units that run sub-batch by sub-batch."""

    units: tuple[Unit, ...]
    sub_batch: int
    iterations: int
    traffic: float
    """bytes of a training step"""

    @property
    def name(self) -> str:
        first, last = self.units[0].name, self.units[-1].last
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class Serialisation:
    """A network cut into groups."""

    groups: tuple[Group, ...]
    streamed: float
    """bytes of a training step of plain layers"""

    @property
    def traffic(self) -> float:
        """Bytes of a training step."""
        return sum(group.traffic for group in self.groups)

    @property
    def change(self) -> float:
        """Traffic relative to plain layers, −0.75 for three quarters less."""
        return self.traffic / self.streamed - 1


def make_group(units: Sequence[Unit], batch: int, buffer_bytes: int, reuse: bool = True) -> Group:
    """The group of `units`, with the largest sub-batch that fits into the buffer, at least one sample."""
    footprint = max(unit.footprint if reuse else unit.footprint_apart for unit in units)
    sub_batch = max(1, min(batch, buffer_bytes // max(1, footprint)))
    iterations = math.ceil(batch / sub_batch)
    traffic = sum(u.weights * (4 * iterations - 1) + batch * 2 * u.saved for u in units)
    traffic += batch * 2 * (units[0].input_bytes + units[-1].output_bytes)
    if not reuse:
        traffic += batch * sum(unit.branching for unit in units)
    return Group(tuple(units), sub_batch, iterations, traffic)


def serialise(
    units: Sequence[Unit], batch: int, buffer_bytes: int, *, reuse: bool = True, method: str = "optimal"
) -> Serialisation:
    """Cut the chain of `units` into groups with the least traffic.

    Args:
        batch: samples in a training step.
        buffer_bytes: what a group's values may take.
        reuse: hold what another branch reads in the buffer as well.
        method: `"optimal"` or `"greedy"`.

    Raises:
        InvalidInputError: no such method; `batch` or `buffer_bytes` < 1.
    """
    ways = {"optimal": optimal, "greedy": greedy}
    if method not in ways:
        raise InvalidInputError(f'`method` must be "optimal" or "greedy", it is "{method}"')
    if batch < 1 or buffer_bytes < 1:
        raise InvalidInputError(f"`batch` and `buffer_bytes` must be at least 1, they are {batch} and {buffer_bytes}")
    made: dict[tuple[int, int], Group] = {}

    def cost(start: int, stop: int) -> float:
        if (start, stop) not in made:
            made[start, stop] = make_group(units[start:stop], batch, buffer_bytes, reuse)
        return made[start, stop].traffic

    groups: Groups = ways[method](len(units), cost)
    streamed = sum(batch * u.streamed + 3 * u.weights for u in units)
    return Serialisation(tuple(made[group] for group in groups), streamed)


def units_of_model(model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Unit]:
    """The units of a network on one input of that shape, (N, C, *); every floating value counts as `dtype`.

    Nothing is computed and no memory is taken; the model stays as it is.

    Raises:
        InvalidModelError: the model cannot be traced whole, or takes other than one tensor.
        InvalidInputError: it does not run on an input of that shape.
    """
    try:
        captured = capture(model, required_arguments(model))
    except CaptureError as error:
        raise InvalidModelError(f"{type(model).__name__} cannot be traced whole: {error}") from error
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise InvalidModelError(f"{type(model).__name__} takes {len(inputs)} tensors; the traffic model needs one")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.empty(tuple(shape), dtype=first.dtype, device="meta")
    try:
        shapes = shapes_of(captured.graph, model, [x])
    except Exception as error:
        name = type(model).__name__
        raise InvalidInputError(f"{name} does not run on an input of shape {tuple(shape)}: {error}") from error
    return units_of(captured.graph, model, shapes, dtype.itemsize)


def traffic_report(
    model: nn.Module,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float16,
    buffer_bytes: int = 10 * 2**20,
) -> str:
    """What the traffic model says of a network, as text: optimal and greedy, with and without held branches.

    Args:
        shape: of the input, (N, C, *).
        dtype: of every value that moves.
        buffer_bytes: of the buffer on the chip; 10 MiB is the paper's.

    Raises:
        InvalidModelError, InvalidInputError: as `units_of_model`.
    """
    units, batch = units_of_model(model, shape, dtype), shape[0]
    plain = sum(batch * u.streamed + 3 * u.weights for u in units)
    dims = "x".join(map(str, shape))
    kind = str(dtype).removeprefix("torch.")
    lines = [
        f"Modelled memory traffic of a training step, {type(model).__name__}, {dims}, {kind}, "
        f"buffer {buffer_bytes / 2**20:g} MiB",
        f"plain layers, each from and to memory: {plain / 2**30:.2f} GiB",
    ]
    for reuse in (True, False):
        held = "branches held in the buffer" if reuse else "branches not held"
        for method in ("optimal", "greedy"):
            found = serialise(units, batch, buffer_bytes, reuse=reuse, method=method)
            lines.append(f"{method}, {held}: {found.traffic / 2**30:.2f} GiB ({100 * found.change:+.1f} %)")
            lines += [
                f"    {g.name}: {g.iterations} x {g.sub_batch} samples, {g.traffic / 2**30:.2f} GiB"
                for g in found.groups
            ]
    return "\n".join(lines)
