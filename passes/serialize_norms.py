"""norm → activation → conv → norm  ⇒  the same, one block after another  (between two barriers)

    for every block b:  z_b = act(norm(x_b));  c_b = conv(z_b);  moments of c_b        then merged, for the next norm

The exact form of mini-batch serialisation where norms are in train mode: each needs the moments of the whole batch
before it can begin, so no region can span one. What is saved is memory traffic, not memory: x is read and c written
once (`normpass.serial_norm` has the algebra; arXiv 1807.01702 and 1810.00307). It runs on a graph in which `split_bn`
has put `split_norm_act` at both norms; x is what is kept, as there.

Never made by default. It is made where `paths` names the convolution, which is what `tuned` is for: it times the
whole and the blocked form at the real shapes and says which block wins, or none. No prediction says that it wins: on
a CPU with a last-level cache of 32 MiB the blocked form took 0.9 to 1.4 times as long at ResNet-50's shapes, batch
16, float32 (`tests/bench/results/bench_serialised_cpu_torch-2.15.0.json`); on a GPU it has not been measured yet.

Refuses: a norm with a residual, a result that something else reads too, a convolution of another class, with padding
other than zeros or with hooks, and a convolution that no train-mode batch norm follows. Changes nothing but rounding.
"""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.convolution import convolution_layer
from normpass.functional import split_norm_act
from normpass.graph import module_of
from normpass.kernels import kernels_for
from normpass.ops.moments import moments_with_update
from normpass.per_sample import CONVOLUTIONS
from normpass.recipe import recording
from normpass.rewrite import Refusal, Semantics
from normpass.serial_norm import norm_act_with_moments, serial_norm_act_conv
from normpass.timing import wait_for

BLOCKS = tuple(2**20 * mib for mib in (1, 2, 4, 8, 16, 32, 64))
"""What `tuned` tries, in bytes."""


@dataclass(frozen=True)
class SerializeNorms:
    block_bytes: int = 8 * 2**20
    """what a block of the norm's input, of its result and of the convolution's result may take together"""
    paths: Collection[str] = ()
    """the convolutions that are run block by block: those at which that was measured to win"""
    name: str = "serialize_norms"
    semantics: Semantics = Semantics.EXACT

    def match(self, graph: fx.Graph, root: nn.Module) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
        """Paths of the convolutions between two norms that may be run so, and why others behind a norm may not."""
        found: list[str] = []
        refusals: list[Refusal] = []
        for node in graph.nodes:
            conv = _convolution_behind(node, root)
            if conv is None:
                continue
            reason = _reason_against(node, conv, root)
            if reason is None:
                found.append(_path(conv))
            else:
                refusals.append(Refusal(self.name, _path(conv), reason))
        return tuple(found), tuple(refusals)

    def apply(self, graph: fx.Graph, root: nn.Module) -> tuple[str, ...]:
        """Rewrite those of the matches that `paths` names; returns their paths."""
        matches = set(self.match(graph, root)[0]) & set(self.paths)
        done = []
        for node in list(graph.nodes):
            path = _path(node)
            if path in matches:
                _replace(graph, node, self.block_bytes)
                done.append(path)
        return tuple(done)


def _convolution_behind(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The convolution that reads what the rewritten norm `node` returns, if there is one."""
    if node.target is not split_norm_act:
        return None
    return next((user for user in node.users if isinstance(_layer_of(user, root), CONVOLUTIONS)), None)


def _layer_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that `node` runs, itself or through one of our kernels."""
    if node.target is convolution_layer:
        return root.get_submodule(_path(node))
    return module_of(node, root)


def _path(node: fx.Node) -> str:
    """Of the module that `node` runs; "" where it runs none."""
    if node.target is convolution_layer:
        return str(node.args[0].target)
    return str(node.target) if node.op == "call_module" else ""


def _reason_against(norm: fx.Node, conv: fx.Node, root: nn.Module) -> str | None:
    if norm.args[2] is not None:
        return "a residual is added behind the norm"
    if len(norm.users) != 1:
        return "the norm's result has other readers"
    layer: Any = _layer_of(conv, root)
    whole = reason_to_keep_whole(layer)
    if whole is not None:
        return whole
    if type(layer) not in CONVOLUTIONS or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"{type(layer).__name__} with padding {layer.padding!r}, {layer.padding_mode}, is not one that is known"
    readers = list(conv.users)
    if len(readers) != 1 or readers[0].target is not split_norm_act or readers[0].args[1] is not conv:
        return "no batch norm alone reads its result"
    return None


def _replace(graph: fx.Graph, conv: fx.Node, block_bytes: int) -> None:
    """Put the blocked form where the norm, the convolution and the next norm's moments stood."""
    norm = conv.args[-1]
    assert isinstance(norm, fx.Node)
    (behind,) = conv.users
    if norm.target is norm_act_with_moments:  # the convolution before it is run block by block as well
        layer, x, moments, _, activation, activation_args, _ = norm.args
    else:
        layer, x, _, activation, activation_args, _ = norm.args
        moments = None
    with graph.inserting_before(conv):
        module = graph.get_attr(_path(conv))
        args = layer, module, x, moments, activation, activation_args, block_bytes
        call = graph.call_function(serial_norm_act_conv, args)
        c = graph.call_function(operator.getitem, (call, 0))
        of_c = graph.call_function(operator.getitem, (call, 1))
    next_norm, _, residual, *others = behind.args
    with graph.inserting_before(behind):
        end = graph.call_function(norm_act_with_moments, (next_norm, c, of_c, residual, *others))
    end.meta = dict(behind.meta)
    behind.replace_all_uses_with(end)
    for node in (behind, conv, norm):
        graph.erase_node(node)


# --- tuning ---------------------------------------------------------------------------------------


def tuned(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    activation: str = "relu",
    activation_args: Sequence[float] = (),
    blocks: Sequence[int] = BLOCKS,
    rounds: int = 5,
) -> tuple[int | None, dict[int, float]]:
    """The block with which norm, activation, convolution and moments are fastest, forward and backward.

    Copies of the layers run on a detached `x`, whole and with every block of `blocks` (bytes), in turns.

    Returns:
        The block, None where the whole form is fastest; and the time of each block relative to the whole form, the
        median of `rounds`.
    """
    norm, conv = copy.deepcopy(norm), copy.deepcopy(conv)
    x = x.detach().requires_grad_()
    runs: dict[int, Callable[[], float]] = {
        block: partial(_seconds, norm, conv, x, activation, list(activation_args), block) for block in (0, *blocks)
    }
    times: dict[int, list[float]] = {block: [] for block in runs}
    order = list(runs)
    for turn in range(-1, rounds):
        for block in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds = runs[block]()
            if turn >= 0:
                times[block].append(seconds)
    whole = times.pop(0)
    ratios = {b: statistics.median(t / w for t, w in zip(found, whole, strict=True)) for b, found in times.items()}
    best = min(ratios, key=ratios.__getitem__, default=None)
    return (best if best is not None and ratios[best] < 1 else None), ratios


def _seconds(norm: Any, conv: Any, x: Tensor, activation: str, args: list[float], block: int) -> float:
    """One forward and backward; `block` 0: whole."""
    wait_for(x.device)
    start = time.perf_counter()
    with recording():
        if block:
            c, moments = serial_norm_act_conv(norm, conv, x, None, activation, args, block)
        else:
            c, moments = conv(split_norm_act(norm, x, None, activation, args)), None
        if moments is None:
            moments_with_update(kernels_for(c.device.type), c, None)
    torch.autograd.grad(c, [x, *conv.parameters(), *norm.parameters()], torch.ones_like(c))
    wait_for(x.device)
    return time.perf_counter() - start
