"""layer → layer → … → layer  ⇒  the same, one sub-batch after another

    out = region(x)  ⇒  out[i : i + s] = region(x[i : i + s]) for i = 0, s, 2s, …

Mini-batch serialisation (arXiv 1810.00307): what lies between the layers of a region exists for s samples only, and
stays in a cache that holds it. A region is a chain of units (`normpass.units`) in which every sample is computed by
itself: norms are GroupNorm, LayerNorm, InstanceNorm, a frozen batch norm or one in eval mode. Of the chain x, the
input of each region, is kept; backward runs every sub-batch again. Where a chain is cut into regions, and their
sub-batches, come from the traffic model (`normpass.traffic`): the cuts with the least traffic.

Refuses a unit that holds: a batch norm in train mode, a dropout, a layer with hooks or a parametrisation, an
operation not known to work sample by sample, something that writes to its input. A norm that goes into train mode
later makes its region run whole, as plain layers do. Changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normpass.cuts import Shapes, shapes_of, variable_nodes
from normpass.environment import last_level_cache
from normpass.errors import InvalidInputError
from normpass.graph import Storage, called
from normpass.per_sample import WITH_TENSORS, reason_not_per_sample
from normpass.rewrite import Refusal, Semantics
from normpass.serialised import Region, call_layer, run_layer, run_region, tensor_names
from normpass.traffic import Group, make_group, serialise
from normpass.units import Unit, units_of


@dataclass(frozen=True)
class Regions:
    """What was serialised in one graph, and what was not and why."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class SerializeMinibatch:
    buffer_bytes: int | None = None
    """what a region's values may take; None: the largest cache of the device"""
    sub_batch: int | None = None
    """samples at a time in every region; None: as many as fit into the buffer"""
    name: str = "serialize_minibatch"
    semantics: Semantics = Semantics.EXACT

    def __post_init__(self) -> None:
        for option in ("buffer_bytes", "sub_batch"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InvalidInputError(f"`{option}` must be at least 1, it is {value}")

    def match(self, graph: fx.Graph, root: nn.Module, inputs: Sequence[Tensor]) -> Regions:
        """The regions that apply to `graph` for inputs of these shapes; changes nothing.

        Args:
            inputs: a tensor for each placeholder, on any device; `meta` takes no memory.
        """
        if not inputs or inputs[0].dim() == 0 or inputs[0].shape[0] == 0:
            return Regions((), (Refusal(self.name, "", "there is no batch to divide"),))
        try:
            shapes = shapes_of(graph, root, inputs)
        except Exception as error:  # whatever the model's own layers raise on such inputs
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            return Regions((), (Refusal(self.name, "", f"its shapes are not known: {reason[0]}"),))
        chains, refusals = _chains(graph, root, shapes, self.name)
        buffer_bytes = self.buffer_bytes or last_level_cache(_device_of(root, inputs))
        groups = [group for units in chains for group in self._groups(units, shapes, buffer_bytes)]
        return Regions(tuple(groups), tuple(refusals))

    def apply(self, graph: fx.Graph, root: nn.Module, inputs: Sequence[Tensor]) -> Regions:
        """Replace every region that `match` finds by one call."""
        found = self.match(graph, root, inputs)
        calls: dict[fx.Node, fx.Node] = {}
        for group in found.groups:
            start = group.units[0].input
            calls[group.units[-1].output] = _replace(graph, root, group, calls.get(start, start))
        return found

    def _groups(self, units: Sequence[Unit], shapes: Shapes, buffer_bytes: int) -> list[Group]:
        batch = shapes[units[0].input].shape[0]
        if self.sub_batch is None:
            groups = serialise(units, batch, buffer_bytes).groups
        else:
            footprint = max(unit.footprint for unit in units)
            groups = (make_group(units, batch, self.sub_batch * footprint),)
        return [group for group in groups if group.iterations > 1]


def _device_of(root: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    return next((t.device for t in (*root.parameters(), *inputs) if t.device.type != "meta"), torch.device("cpu"))


def _chains(graph: fx.Graph, root: nn.Module, shapes: Shapes, name: str) -> tuple[list[list[Unit]], list[Refusal]]:
    """The longest runs of units that may be divided, and why the others may not."""
    storage, variable = Storage(graph, root), set(variable_nodes(graph))
    chains: list[list[Unit]] = [[]]
    refusals: list[Refusal] = []
    for unit in units_of(graph, root, shapes):
        reason = _refusal(unit, root, shapes, storage, variable)
        if reason is None:
            chains[-1].append(unit)
        else:
            refusals.append(Refusal(name, unit.name, reason))
        if reason is not None or any(user not in variable and user.op != "output" for user in unit.output.users):
            chains.append([])
    return [chain for chain in chains if chain], refusals


def _refusal(unit: Unit, root: nn.Module, shapes: Shapes, storage: Storage, variable: set) -> str | None:
    inside = set(unit.nodes)
    for node in unit.nodes:
        reason = reason_not_per_sample(node, root, shapes, variable)
        if reason is not None:
            return f"`{called(node)}`: {reason}"
        if node is not unit.output and any(user not in inside for user in node.users):
            return f"`{called(node)}` is read outside"
    writer = storage.writer_after(unit.input, unit.input)
    return f"its input is changed in place, by `{called(writer)}`" if writer is not None else None


def _replace(graph: fx.Graph, root: nn.Module, group: Group, start: fx.Node) -> fx.Node:
    """Put one call, which reads `start`, where the nodes of the group stood."""
    nodes = [node for unit in group.units for node in unit.nodes]
    inside = set(nodes)
    paths = list(dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"))
    extras = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside and s is not start))
    held = tuple(
        (index, name)
        for index, layer in enumerate(map(root.get_submodule, paths))
        if type(layer) in WITH_TENSORS
        for name in tensor_names(layer)
    )
    whole, part = (_body(nodes, root, start, paths, extras, tensors) for tensors in ((), held))
    region = Region(whole, part, len(paths), held, group.sub_batch)
    with graph.inserting_before(nodes[-1]):
        layers = [graph.get_attr(path) for path in paths]
        call = graph.call_function(region_function(region), (start, *layers, *extras))
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call


def region_function(region: Region) -> Any:
    """`run_region` with its first argument fixed: fx prints calls of a function by its name."""

    def serialised(x: Tensor, *operands: Any) -> Tensor:
        return run_region(region, x, *operands)

    return serialised


def _body(
    nodes: Sequence[fx.Node],
    root: nn.Module,
    start: fx.Node,
    paths: Sequence[str],
    extras: Sequence[fx.Node],
    held: Sequence[tuple[int, str]],
) -> Any:
    """The nodes as a function of the input, the layers, the tensors in `held` and the extra ones."""
    body = fx.Graph()
    values = {start: body.placeholder("x")}
    layers = {path: body.placeholder(f"layer_{index}") for index, path in enumerate(paths)}
    tensors: dict[str, list[fx.Node]] = {path: [] for path in paths}
    for index, name in held:
        tensors[paths[index]].append(body.placeholder(f"layer_{index}_{name}"))
    for index, node in enumerate(extras):
        values[node] = body.placeholder(f"extra_{index}")
    for node in nodes:
        values[node] = body.node_copy(node, values.__getitem__)
        if node.op == "call_module":
            copied, path = values[node], str(node.target)
            copied.op, copied.target = "call_function", run_layer if tensors[path] else call_layer
            copied.args = (layers[path], *copied.args, *tensors[path])
    body.output(values[nodes[-1]])
    return type(fx.GraphModule(nn.Module(), body)).forward
