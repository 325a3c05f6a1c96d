"""norm → activation → conv → norm  ⇒  the same, one block after another  (between two barriers)

    for every block b:  z_b = act(norm(x_b));  c_b = conv(z_b);  moments of c_b        then merged, for the next norm

The exact form of mini-batch serialization where norms are in train mode: each needs the moments of the whole batch
before it can begin, so no region can span one. What is saved is memory traffic, not memory: x is read and c written
once (`normpass.runtime.norm_blocks` has the algebra; arXiv 1807.01702 and 1810.00307). It runs on a graph in which
`split_bn` has put `split_norm_act` at both norms; x is what is kept, as there.

Never made by default: `optimize(model, serialize=SerializeNorms(paths=…))`. It is made where `paths` names the
convolution, which is what `tuned` is for: it times the whole and the blocked form at the real shapes and says which
block wins, or none. No prediction says that it wins: on a CPU with a last-level cache of 32 MiB the blocked form took
0.9 to 1.4 times as long at ResNet-50's shapes, batch 16, float32
(`tests/bench/results/bench_serialized_cpu_torch-2.15.0.json`); on a GPU it has not been measured yet.

Refuses: a norm with a residual, one whose parameters or statistics something else sees, a result that something else
reads too, a convolution with another padding than numbers, and one that no batch norm follows. Changes nothing but
rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normpass.analysis.facts import Facts
from normpass.errors import InvalidInputError
from normpass.graph.nodes import bound, inherit, key_of
from normpass.ops.sync_statistics import synced_statistics
from normpass.rewrite.contract import Refusal, Semantics, is_alone
from normpass.runtime.convolution import convolution_function
from normpass.runtime.functional import split_norm_act
from normpass.runtime.norm_blocks import norm_act_with_moments, serial_norm_act_conv

_CONVOLUTIONS = frozenset(
    {convolution_function, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
)


@dataclass(frozen=True)
class Blocked:
    """The convolutions behind the norms of one graph."""

    done: tuple[str, ...]
    """those that run block by block"""
    possible: tuple[str, ...]
    """those that may be named, and are not"""
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class SerializeNorms:
    block_bytes: int = 8 * 2**20
    """what a block of the norm's input, of its result and of the convolution's result may take together"""
    paths: Collection[str] = ()
    """the convolutions that are run block by block: those at which that was measured to win"""
    name: str = "serialize_norms"
    semantics: Semantics = Semantics.EXACT

    def __post_init__(self) -> None:
        if isinstance(self.block_bytes, bool) or not isinstance(self.block_bytes, Integral) or self.block_bytes < 1:
            raise InvalidInputError(f"`block_bytes` must be a whole number of at least 1, it is {self.block_bytes!r}")
        if isinstance(self.paths, str):
            raise InvalidInputError(f'`paths` is a collection of names: paths=("{self.paths}",)')

    def match(self, graph: fx.Graph, facts: Facts) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
        """Names of the convolutions between two norms that may be run so, and why others behind a norm may not."""
        found: list[str] = []
        refusals: list[Refusal] = []
        for node in graph.nodes:
            conv = _convolution_behind(node)
            if conv is None:
                continue
            reason = _reason_against(node, conv, facts)
            if reason is None:
                found.append(key_of(conv))
            else:
                refusals.append(Refusal(self.name, key_of(conv), reason, (conv.name,)))
        return tuple(found), tuple(refusals)

    def apply(self, graph: fx.Graph, facts: Facts) -> Blocked:
        """Rewrite those of the matches that `paths` names."""
        found, refusals = self.match(graph, facts)
        wanted = set(found) & set(self.paths)
        chosen = [node for node in graph.nodes if node.target in _CONVOLUTIONS and key_of(node) in wanted]
        for node in chosen:
            _replace(graph, node, self.block_bytes)
        done = tuple(key_of(node) for node in chosen)
        return Blocked(done, tuple(path for path in found if path not in done), refusals)


def _convolution_behind(node: fx.Node) -> fx.Node | None:
    """The convolution that reads what the rewritten norm `node` returns, if there is one."""
    if node.target is not split_norm_act:
        return None
    return next((user for user in node.users if user.target in _CONVOLUTIONS), None)


def _reason_against(norm: fx.Node, conv: fx.Node, facts: Facts) -> str | None:
    if norm.args[2] is not None:
        return "a residual is added behind the norm"
    if len(norm.users) != 1:
        return "the norm's result has other readers"
    arguments = bound(convolution_function, conv)
    if arguments is None or arguments["input"] is not norm:
        return "it reads the norm's result as something other than its input"
    if not all(_are_numbers(arguments[name]) for name in ("stride", "padding", "dilation", "groups")):
        return f"its padding {arguments['padding']!r} is no number, or its stride or dilation is computed"
    readers = list(conv.users)
    if any(reader.target is synced_statistics for reader in readers):
        return "the norm that reads its result has the statistics of all processes"
    if len(readers) != 1 or readers[0].target is not split_norm_act or readers[0].args[1] is not conv:
        return "no batch norm alone reads its result"
    if len({facts.modes.get(node) for node in (norm, conv, readers[0])}) > 1:
        return "grad mode or autocast is switched between the two norms"
    call = norm.args[0]
    if not isinstance(call, fx.Node) or not is_alone(call, facts.storages):
        return "something else sees the parameters or statistics of the norm, which would run later"
    return None


def _are_numbers(value: Any) -> bool:
    return all(isinstance(v, int) for v in (value if isinstance(value, (tuple, list)) else (value,)))


def _replace(graph: fx.Graph, conv: fx.Node, block_bytes: int) -> None:
    """Put the blocked form where the norm, the convolution and the next norm's moments stood."""
    convolution = bound(convolution_function, conv)
    assert convolution is not None  # `_reason_against` has looked
    norm = convolution.pop("input")
    (behind,) = conv.users
    if norm.target is norm_act_with_moments:  # the convolution before it is run block by block as well
        arguments, x, moments, _, activation, activation_args, _ = norm.args
    else:
        arguments, x, _, activation, activation_args, _ = norm.args
        moments = None
    with graph.inserting_before(conv):
        args = arguments, x, moments, activation, activation_args, block_bytes, *convolution.values()
        call = graph.call_function(serial_norm_act_conv, args)
        c = graph.call_function(operator.getitem, (call, 0))
        of_c = graph.call_function(operator.getitem, (call, 1))
    next_norm, _, residual, *others = behind.args
    with graph.inserting_before(behind):
        end = graph.call_function(norm_act_with_moments, (next_norm, c, of_c, residual, *others))
    inherit(call, conv)
    inherit(end, behind)
    behind.replace_all_uses_with(end)
    for node in (behind, conv, norm):
        graph.erase_node(node)
