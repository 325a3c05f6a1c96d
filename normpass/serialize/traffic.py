"""Memory traffic of a training step that runs sub-batch by sub-batch: a model, and what it says of a network.

A group of units runs on s samples at a time, s = buffer // footprint of its largest unit, in it = ceil(N / s)
iterations, so that what lies between its layers stays in a buffer on the chip (mini-batch serialization, arXiv
1810.00307). What still moves, for N samples:

    weights·(4·it − 1)      read in forward and in the input's gradient; the weight gradient written in every
                            iteration, and read in all but the first
    2·saved·N               what backward needs, stored and loaded
    2·(input + output)·N    the group's ends: input loaded, its gradient stored; output stored, its gradient loaded
    branching·N             only where nothing is held for another branch (`reuse=False`), whose footprint is smaller

Compared with `streamed·N + 3·weights`: plain layers, each of which reads from memory and writes there.
`normpass.serialize.units` has the bytes of a unit, `normpass.serialize.grouping` the two ways to group.
"""

from __future__ import annotations

import copy
import inspect
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchRuntimeError, Unsupported

from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.errors import InvalidInputError, InvalidModelError
from normpass.graph.nodes import give_keys, key_of, module_of
from normpass.measure.words import counted
from normpass.nn.norm import BatchNormLike
from normpass.serialize.grouping import Groups, greedy, optimal
from normpass.serialize.per_sample import kind_of, name_of
from normpass.serialize.units import Unit, units_of


@dataclass(frozen=True)
class Group:
    """Neighbouring units that run sub-batch by sub-batch."""

    units: tuple[Unit, ...]
    sub_batch: int
    iterations: int
    traffic: float
    """bytes of a training step"""
    batch: int
    """samples in a training step"""

    @property
    def name(self) -> str:
        first, last = self.units[0].name, self.units[-1].last
        return first if first == last else f"{first} to {last}"

    @property
    def samples(self) -> str:
        """Of one sub-batch, in words: the last may have fewer."""
        words = counted(self.sub_batch, "sample")
        return words if self.batch % self.sub_batch == 0 else f"up to {words}"

    @property
    def norms(self) -> list[tuple[str, str]]:
        """Name of each norm in it, and the class of its layer or the function that it calls."""
        found = [node for unit in self.units for node in unit.nodes if kind_of(node) == "norm"]
        return [(key_of(node), _kind(node)) for node in found]


def _kind(node: fx.Node) -> str:
    _, layer = module_of(node)
    return layer.__name__ if layer is not None and layer.__module__.startswith("torch.nn") else name_of(node)


@dataclass(frozen=True)
class Serialization:
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
    return Group(tuple(units), sub_batch, iterations, traffic, batch)


def serialize(
    units: Sequence[Unit], batch: int, buffer_bytes: int, *, reuse: bool = True, method: str = "optimal"
) -> Serialization:
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

    def group(start: int, stop: int) -> Group:
        if (start, stop) not in made:
            made[start, stop] = make_group(units[start:stop], batch, buffer_bytes, reuse)
        return made[start, stop]

    groups: Groups = ways[method](len(units), lambda start, stop: group(start, stop).traffic)
    streamed = sum(batch * u.streamed + 3 * u.weights for u in units)
    return Serialization(tuple(group(*ends) for ends in groups), streamed)


def graph_of(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The whole forward of `model` as Dynamo captures it, and the tensors that its placeholders stand for.

    Nothing is computed and nothing remembered: torch.compile captures a later call as if this one had not been.

    Raises:
        InvalidModelError: it takes other arguments, or is no single graph.
    """
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        give_keys(graph_module.graph)
        found.append((graph_module, example_inputs))
        return _stop

    def forward(*tensors: Tensor) -> Any:
        return model(*tensors)

    code = forward.__code__.replace()  # what is compiled is remembered by the code object
    once = types.FunctionType(code, forward.__globals__, forward.__name__, closure=forward.__closure__)
    name = type(model).__name__
    try:
        torch.compile(once, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    except _Captured:
        return found[0]
    except Unsupported as error:
        raise InvalidModelError(f"{name} cannot be captured whole: {_first_line(error)}") from error
    raise InvalidModelError(f"{name} does nothing with tensors that can be captured")


class _Captured(Exception):
    """The graph is there; it is not to run."""


def _stop(*_: Any) -> Any:
    raise _Captured


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def units_of_model(model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Unit]:
    """The units of a network on one input of that shape, (N, C, *); every floating value counts as `dtype`.

    Nothing is computed and no memory is taken; the model stays as it is.

    Raises:
        InvalidModelError: the model cannot be captured whole, takes other than one tensor or returns several.
        InvalidInputError: it does not run on an input of that shape.
    """
    name, tensors = type(model).__name__, [*model.parameters(), *model.buffers()]
    count = _required_arguments(model)
    if count != 1:
        raise InvalidModelError(f"{name} takes {count} tensors; the traffic model needs one")
    other = copy.deepcopy(model, {id(t): _without_memory(t) for t in tensors})
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        graph_module, inputs = graph_of(other, torch.empty(tuple(shape), dtype=first.dtype, device="meta"))
    except TorchRuntimeError as error:
        raise InvalidInputError(f"{name} does not run on an input of shape {tuple(shape)}: {error}") from error
    chains = units_of(graph_module.graph, facts_of(graph_module, FakeInputs(inputs)), dtype.itemsize)
    if len(chains) > 1:
        raise InvalidModelError(f"{name} returns several tensors that lie on no one path; the traffic model needs one")
    return [unit for chain in chains for unit in chain]


def _without_memory(tensor: Tensor) -> Tensor:
    other = tensor.detach().to("meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(other, tensor.requires_grad) if is_parameter else other


def _required_arguments(model: nn.Module) -> int:
    """How many arguments forward must be given."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = inspect.signature(model.forward).parameters.values()
    return sum(a.kind in kinds and a.default is a.empty for a in arguments)


def _sees_whole_batch(model: nn.Module) -> bool:
    norms = (nn.modules.batchnorm._BatchNorm, BatchNormLike)
    return any(isinstance(m, norms) and (m.training or not m.track_running_stats) for m in model.modules())


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
    if _sees_whole_batch(model):
        lines.append(
            "what would be possible if every norm looked at one sample: batch norms in train mode look at the whole "
            "batch, and are not divided"
        )
    for reuse in (True, False):
        held = "branches held in the buffer" if reuse else "branches not held"
        for method in ("optimal", "greedy"):
            found = serialize(units, batch, buffer_bytes, reuse=reuse, method=method)
            lines.append(f"{method}, {held}: {found.traffic / 2**30:.2f} GiB ({100 * found.change:+.1f} %)")
            lines += [f"    {g.name}: {g.iterations} x {g.samples}, {g.traffic / 2**30:.2f} GiB" for g in found.groups]
    return "\n".join(lines)
