"""layer → layer → … → layer  ⇒  the same, one sub-batch after another

    out = region(x)  ⇒  out[i : i + s] = region(x[i : i + s]) for i = 0, s, 2s, …

Mini-batch serialization (arXiv 1810.00307): what lies between the layers of a region exists for s samples only, and
stays in a cache that holds it. A region is a chain of units (`normpass.serialize.units`) in which every sample is
computed by itself: norms are GroupNorm, LayerNorm, InstanceNorm, a frozen batch norm or one in eval mode. Of the
chain x, the input of each region, is kept; backward runs every sub-batch again. Where a chain is cut into regions,
and their sub-batches, come from the traffic model (`normpass.serialize.traffic`): the cuts with the least traffic.

Refuses a unit that holds: a batch norm in train mode, a dropout in train mode, an operation not known to work sample
by sample, something that writes to its input or to a constant, a switch of grad mode or autocast, a value that is
read elsewhere too; one whose input autograd does not keep and somebody outside may change. Changes nothing but
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx

from normpass.analysis.cuts import inputs_of, variable_nodes
from normpass.analysis.facts import Facts
from normpass.environment import last_level_cache
from normpass.errors import InvalidInputError
from normpass.graph.nodes import called, inherit
from normpass.rewrite.contract import Refusal, Semantics
from normpass.runtime.sub_batches import Region, run_region
from normpass.serialize.per_sample import reason_not_per_sample
from normpass.serialize.traffic import Group, make_group, serialize
from normpass.serialize.units import Unit, units_of


@dataclass(frozen=True)
class Regions:
    """What was serialized in one graph, and what was not and why."""

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
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise InvalidInputError(f"`{option}` must be a whole number of at least 1, it is {value!r}")

    def match(self, graph: fx.Graph, facts: Facts) -> Regions:
        """The regions that apply to `graph` for inputs of the shapes it was captured with; changes nothing."""
        batches = {facts.results[node].shape[:1] for node in inputs_of(graph, facts.results)}
        if not any(batch and batch[0] > 0 for batch in batches):
            return Regions((), (Refusal(self.name, "", "there is no batch to divide"),))
        chains, refusals = _chains(graph, facts, self.name)
        buffer_bytes = self.buffer_bytes or last_level_cache(torch.device(facts.device))
        groups = [group for units in chains for group in self._groups(units, facts, buffer_bytes)]
        return Regions(tuple(groups), tuple(refusals))

    def apply(self, graph: fx.Graph, facts: Facts) -> Regions:
        """Replace every region that `match` finds by one call."""
        found = self.match(graph, facts)
        calls: dict[fx.Node, fx.Node] = {}
        for group in found.groups:
            start = group.units[0].input
            calls[group.units[-1].output] = _replace(graph, group, calls.get(start, start), facts)
        return found

    def _groups(self, units: Sequence[Unit], facts: Facts, buffer_bytes: int) -> list[Group]:
        batch = facts.results[units[0].input].shape[0]
        if self.sub_batch is None:
            groups = serialize(units, batch, buffer_bytes).groups
        else:
            footprint = max(unit.footprint for unit in units)
            groups = (make_group(units, batch, self.sub_batch * footprint),)
        return [group for group in groups if group.iterations > 1 and not _is_view(group, facts)]


def _is_small(node: fx.Node, facts: Facts) -> bool:
    """Whether a copy of the value of `node`, which is an input of the graph, costs next to nothing."""
    storages = facts.storages.get(node, frozenset())
    return facts.value_of(node) is None and storages <= facts.small_outside.keys()


def _is_view(group: Group, facts: Facts) -> bool:
    """Whether the result lies in the memory of the input, where the caller may expect it."""
    ends = (facts.storages[group.units[0].input], facts.storages[group.units[-1].output])
    return not ends[0].isdisjoint(ends[1])


def _chains(graph: fx.Graph, facts: Facts, name: str) -> tuple[list[list[Unit]], list[Refusal]]:
    """The longest runs of units that may be divided, and why the others may not."""
    judge = _Judge(graph, facts)
    chains: list[list[Unit]] = []
    refusals: list[Refusal] = []
    for units in units_of(graph, facts):
        reasons = [judge.reason_against(unit) for unit in units]
        refusals += [Refusal(name, u.name, reason) for u, reason in zip(units, reasons, strict=True) if reason]
        chains.append([])
        for index, unit in enumerate(units):
            if index == 0 or reasons[index - 1] or not judge.may_join(units[index - 1], unit):
                chains.append([])
            chains[-1] += [] if reasons[index] else [unit]
    return [chain for chain in chains if chain], refusals


class _Judge:
    """Says of the units of one graph which may be divided, and which run together."""

    def __init__(self, graph: fx.Graph, facts: Facts):
        self.facts, self.steps = facts, facts.step_of()
        self.variable = set(variable_nodes(graph, facts.results))
        self.position = {node: index for index, node in enumerate(graph.nodes)}

    def reason_against(self, unit: Unit) -> str | None:
        """Why the unit may not run on a part of the batch; None where it may."""
        inside = set(unit.nodes)
        for node in unit.nodes:
            reason = self._reason_against_node(node, inside)
            if reason is not None:
                return f"`{called(node)}`: {reason}"
            if node is not unit.output and any(user not in inside for user in node.users):
                return f"`{called(node)}` is read outside"
        writer = self._writer_after(unit.input, unit.input)
        if writer is not None:
            return f"its input is changed in place, by `{called(writer)}`"
        is_kept = any(self.steps[node].differentiable for node in unit.nodes)
        if is_kept and not self.facts.is_watched(unit.input):
            return "its input may be changed by others before backward"
        stays = self.facts.are_in_one_mode(unit.nodes[0], unit.output)
        return None if stays else "grad mode or autocast is switched in it"

    def may_join(self, unit: Unit, following: Unit) -> bool:
        """Whether what `unit` returns is read by `following` alone, as things stand when it is made."""
        is_read_elsewhere = any(user not in following.nodes for user in unit.output.users)
        return not is_read_elsewhere and self.facts.are_in_one_mode(unit.output, following.output)

    def _reason_against_node(self, node: fx.Node, inside: set[fx.Node]) -> str | None:
        facts = self.facts
        reason = reason_not_per_sample(self.steps[node], facts.results, facts.storages, self.variable)
        if reason is not None:
            return reason
        constants = [source for source in node.all_input_nodes if source not in self.variable]
        writer = next((w for c in constants if (w := self._writer_after(c, node)) is not None), None)
        if writer is not None:
            return f"`{called(writer)}` changes what it reads"
        unwatched = next((c for c in constants if not facts.is_watched(c) and not _is_small(c, facts)), None)
        is_changeable = self.steps[node].differentiable and unwatched is not None
        return "what it reads may be changed by others before backward" if is_changeable else None

    def _writer_after(self, node: fx.Node, after: fx.Node) -> fx.Node | None:
        """The first node behind `after` that writes where the value of `node` lies."""
        mine, begin = self.facts.storages.get(node, frozenset()), self.position[after]
        writers = (s.node for s in self.facts.steps if not mine.isdisjoint(s.writes))
        return next((writer for writer in writers if self.position[writer] > begin), None)


def _replace(graph: fx.Graph, group: Group, start: fx.Node, facts: Facts) -> fx.Node:
    """Put one call, which reads `start`, where the last of the group's nodes stood."""
    nodes = [node for unit in group.units for node in unit.nodes]
    inside = {start, *nodes}
    extras = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
    copied = tuple(i for i, node in enumerate(extras) if not facts.is_watched(node) and _is_small(node, facts))
    region = Region(_body(nodes, start, extras), group.sub_batch, copied)
    with graph.inserting_before(nodes[-1]):
        call = graph.call_function(region_function(region), (start, *extras))
    inherit(call, nodes[-1])
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call


def region_function(region: Region) -> Any:
    """`run_region` with its first argument fixed: fx prints calls of a function by its name."""

    def serialized(x: Tensor, *extras: Any) -> Tensor:
        return run_region(region, x, *extras)

    return serialized


def _body(nodes: Sequence[fx.Node], start: fx.Node, extras: Sequence[fx.Node]) -> Any:
    """The nodes as a function of what they read."""
    body = fx.Graph()
    values = {start: body.placeholder("x")}
    for index, node in enumerate(extras):
        values[node] = body.placeholder(f"extra_{index}")
    for node in nodes:
        values[node] = body.node_copy(node, values.__getitem__)
    body.output(values[nodes[-1]])
    return partial(type(fx.GraphModule({}, body)).forward, None)
