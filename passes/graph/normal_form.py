"""one normal form of what a model spells in several ways; the same numbers

    a result that nobody reads               ⇒  nothing: what it would keep is freed at once
    dropout(x, 0), dropout in eval mode      ⇒  x
    dropout(x, p)                            ⇒  one node that notes its result: x and the mask make it again
    rrelu(x) in training                     ⇒  the same: x and the slopes make it again
    a += b, relu_(a), … that keep a copy     ⇒  a + b, relu(a), …: autograd keeps what they read, and no copy of it
    a batch norm with a cumulative average   ⇒  F.batch_norm with a momentum that is computed
    a SyncBatchNorm                          ⇒  the statistics of all processes, and F.batch_norm with these fixed
    checkpoint(f, x, …)                      ⇒  torch.utils.checkpoint itself: the region is the user's
    a custom autograd function               ⇒  one that keeps what it saves where others do, checked by version; its
                                                backward can be differentiated (Dynamo's operator does neither)

An operation in place that autograd can differentiate without a copy stays as it is: it is made again in place
(`normpass.recipe.recipes`), and nothing more is alive in forward than in the plain model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from normpass.analysis.facts import Facts, Step
from normpass.capture.cumulative_norm import cumulative_batch_norm, share_of_batch
from normpass.capture.sync_norm import sync_batch_norm
from normpass.copies.untouched import tensors_in
from normpass.graph.activations import activation_of
from normpass.graph.nodes import bound, called_on, function_of, inherit, is_in_place_call, key_of, name_of, replace_node
from normpass.ops.layout import lies_as_new
from normpass.ops.sync_statistics import synced_statistics
from normpass.recipe.notes import tag

_CHECKPOINT = "tag_activation_checkpoint"
_CUSTOM_FUNCTION = "autograd_function_apply"


@dataclass(frozen=True)
class SpellPlainly:
    """Dropout, RReLU, norms of several calls, checkpoints, custom functions: each as calls that facts can follow."""

    name: str = "spell_plainly"

    def apply(self, graph: fx.Graph, facts: Facts | None = None) -> set[str]:
        """Rewrite `graph` in place, of which nothing is known yet; the names of the nodes that were replaced."""
        names = set()
        for node in list(graph.nodes):
            if node.target is F.dropout:
                _simplify_dropout(graph, node)
            elif node.target is F.rrelu:
                _simplify_rrelu(graph, node)
            elif node.target is cumulative_batch_norm:
                _expand_cumulative(graph, node)
            elif node.target is sync_batch_norm:
                _expand_sync(graph, node)
            elif node.op == "call_function" and name_of(node.target) == _CHECKPOINT:
                _call_instead(graph, node, run_checkpoint)
            elif name_of(node.target) == _CUSTOM_FUNCTION and "saved_for_backward_idx" in node.kwargs:
                _take_out_grad_modes(node.args[1])
                _call_instead(graph, node, run_custom_function)
            else:
                continue
            names.add(node.name)
        return names


@dataclass(frozen=True)
class DropUnread:
    """Without what computes tensors that nobody reads, and does nothing else."""

    name: str = "drop_unread"

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the nodes that are gone."""
        found = [step.node for step in reversed(facts.steps) if _only_computes(step, facts)]
        return {node.name for node in found if not node.users and graph.erase_node(node) is None}


@dataclass(frozen=True)
class WriteOutOfPlace:
    """What autograd would copy before it is overwritten is not overwritten."""

    name: str = "write_out_of_place"

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the nodes that were replaced."""
        saved = {v for step in facts.steps for v in step.saves}
        copying = (step for step in facts.steps if step.copies and not saved & facts.overwritten & set(step.reads))
        found = [step.node for step in copying if _nobody_sees_it(step, facts) and _lies_as_first(step.node, facts)]
        names = {node.name for node in found}
        for node in found:
            _write_elsewhere(graph, node)
        return names


def _call_instead(graph: fx.Graph, node: fx.Node, function: Callable) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, node.args, node.kwargs)
    replace_node(graph, node, new)


def _only_computes(step: Step, facts: Facts) -> bool:
    is_in_place = name_of(step.target).endswith("_")  # `detach_` writes no numbers, and changes who gets gradients
    effects = step.writes or step.is_random or step.is_foreign or is_in_place
    return not effects and bool(tensors_in(facts.results[step.node]))


def _expand_cumulative(graph: fx.Graph, node: fx.Node) -> None:
    *tensors, counter, eps = node.args
    with graph.inserting_before(node):
        share = graph.call_function(share_of_batch, (counter,))
        new = graph.call_function(F.batch_norm, (*tensors, True, share, eps))
    share.meta["key"] = f"{key_of(node)}.share"
    replace_node(graph, node, new)


def _expand_sync(graph: fx.Graph, node: fx.Node) -> None:
    eps = node.args[7]
    with graph.inserting_before(node):
        statistics = graph.call_function(synced_statistics, node.args)
        same, mean, var, weight, bias = (graph.call_function(operator.getitem, (statistics, i)) for i in range(5))
        new = graph.call_function(F.batch_norm, (same, mean, var, weight, bias, False, 0.0, eps))
    inherit(statistics, node)
    statistics.meta["key"] += ".statistics"
    replace_node(graph, node, new)


# --- dropout ----------------------------------------------------------------------------------------


def _simplify_dropout(graph: fx.Graph, node: fx.Node) -> None:
    arguments = bound(F.dropout, node)
    if arguments is None or not isinstance(arguments["p"], (int, float)):
        return
    x, p, training, inplace = (arguments[name] for name in ("input", "p", "training", "inplace"))
    if p == 0 or training is False:
        node.replace_all_uses_with(x)
        graph.erase_node(node)
    elif training is True and not inplace and 0 < p < 1:
        with graph.inserting_before(node):
            new = graph.call_function(dropout, (x, p))
        replace_node(graph, node, new)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout(x, p)` in training: the same draw and the same numbers; who saves the result keeps the mask."""
    if x.device.type != "cpu" or x.numel() == 0 or not x.is_floating_point():
        return _by_torch(x, p)
    noise = torch.empty_like(x).bernoulli_(1 - p)
    noise.div_(1 - p)
    result = x * noise
    tag(result, torch.mul, (x, noise))
    return result


def prepare_dropout(x: Tensor, p: float) -> tuple | Tensor:
    """What of `dropout` is to run once a step: the draw; for `finish_dropout`."""
    if x.numel() == 0 or not x.is_floating_point() or x.device.type not in ("cpu", "cuda"):
        return F.dropout(x, p)
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward.default, x, torch.native_dropout(x, p, True)[1], 1 / (1 - p)
    return torch.mul, x, torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def finish_dropout(prepared: tuple | Tensor) -> Tensor:
    """`dropout` from what `prepare_dropout` returned; it may run again."""
    if isinstance(prepared, Tensor):
        return prepared
    function, *arguments = prepared
    result: Tensor = function(*arguments)
    return result


def _by_torch(x: Tensor, p: float) -> Tensor:
    if not x.is_cuda or not x.requires_grad or x.numel() == 0:
        return F.dropout(x, p)
    result, mask = torch.native_dropout(x, p, True)
    tag(result, torch.ops.aten.native_dropout_backward.default, (x, mask, 1 / (1 - p)))
    return result


# --- RReLU ------------------------------------------------------------------------------------------


SMALLEST_RANGE = 1e-6
"""of the slopes, for ATen's backward to use them"""


def _simplify_rrelu(graph: fx.Graph, node: fx.Node) -> None:
    arguments = bound(F.rrelu, node)
    if arguments is None or arguments["training"] is not True or arguments["inplace"] is not False:
        return
    x, lower, upper = (arguments[name] for name in ("input", "lower", "upper"))
    if _has_range(lower, upper):
        with graph.inserting_before(node):
            new = graph.call_function(rrelu, (x, lower, upper))
        replace_node(graph, node, new)


def _has_range(lower: Any, upper: Any) -> bool:
    return all(isinstance(b, (int, float)) for b in (lower, upper)) and upper - lower > SMALLEST_RANGE


def rrelu(x: Tensor, lower: float, upper: float, inplace: bool = False) -> Tensor:
    """`F.rrelu(x, lower, upper, True)`: the same draw and the same numbers; who saves the result keeps the slopes.

    Backward reads these alone, and not x. Torch draws in the order of contiguous values, whatever the layout of x, and
    returns such a tensor; where it would have written to x, the result lies as x does.
    """
    if torch.compiler.is_compiling() or x.numel() == 0 or not x.is_floating_point():
        drawn = F.rrelu(x, lower, upper, True)
        return torch.empty_like(x).copy_(drawn) if inplace and drawn.stride() != x.stride() else drawn
    slopes = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.no_grad():
        torch.ops.aten.rrelu_with_noise(x.detach(), slopes, lower, upper, True)
    result = (x if inplace else x.contiguous()) * slopes
    tag(result, torch.mul, (x, slopes))
    return result


# --- in place ---------------------------------------------------------------------------------------


def _nobody_sees_it(step: Step, facts: Facts) -> bool:
    """Whether what a step overwrites is read afterwards through its result alone."""
    inside = set(step.writes) - set(step.reads_outside)
    if len(inside) != 1 or inside != set(step.writes):
        return False
    through = {step.node}
    seen = False
    for node in facts.results:
        if node is step.node:
            seen = True
        elif seen and _reads(node, inside, facts):
            there = [n for n in node.all_input_nodes if not inside.isdisjoint(facts.storages.get(n, ()))]
            if any(n not in through for n in there):
                return False
            through.add(node)
    return not any(n not in through for n in _returned(step.node.graph) if _lies_in(n, inside, facts))


def _reads(node: fx.Node, storages: set[int], facts: Facts) -> bool:
    return any(_lies_in(n, storages, facts) for n in node.all_input_nodes)


def _lies_in(node: fx.Node, storages: set[int], facts: Facts) -> bool:
    return not storages.isdisjoint(facts.storages.get(node, ()))


def _returned(graph: fx.Graph) -> Iterator[fx.Node]:
    return iter(next(n for n in graph.nodes if n.op == "output").all_input_nodes)


_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ipow": "pow"}


def _write_elsewhere(graph: fx.Graph, node: fx.Node) -> None:
    function, args, kwargs = _elsewhere(node)
    assert function is not None  # `_lies_as_first` has looked
    with graph.inserting_before(node):
        new = graph.call_function(function, args, kwargs)
    if name_of(function) == "rrelu" and args[3:] == (True,) and not kwargs and _has_range(*args[1:3]):
        new.target, new.args = rrelu, (*args[:3], True)
    elif activation_of(new) is None:  # which has the dtype of its argument, and rewrites look for it
        new.target = called_on(as_first, function)
    replace_node(graph, node, new)


def _elsewhere(node: fx.Node) -> tuple[Callable | None, tuple, dict[str, Any]]:
    """The call that makes a new tensor of what `node` writes; without a function where none is known."""
    args = node.args[:-1] if is_in_place_call(node) and "inplace" not in node.kwargs else node.args
    return _functional(node), args, {k: v for k, v in node.kwargs.items() if k != "inplace"}


def _lies_as_first(node: fx.Node, facts: Facts) -> bool:
    """Whether the new tensor has the shape and the strides of the one that is written to.

    (A slice that is written to keeps its gaps, and who computes with it later draws and lays out accordingly.)
    """
    function, *given = _elsewhere(node)
    if function is None or not isinstance(node.args[0], fx.Node):
        return False
    args, kwargs = cast("Any", fx.map_arg(cast("Any", given), lambda source: facts.results[source]))
    with torch.no_grad():
        result = function(*args, **kwargs)
    first = args[0]
    if not isinstance(result, Tensor) or first.numel() == 0 or not torch.can_cast(result.dtype, first.dtype):
        return False
    return result.shape == first.shape and result.stride() == first.stride() and lies_as_new(first)


def _functional(node: fx.Node) -> Callable | None:
    """The function out of place that computes what `node` writes in place; None if there is none known."""
    name = name_of(node.target)
    if is_in_place_call(node):
        return function_of(node)
    if name in _OPERATORS:
        found: Callable = getattr(operator, _OPERATORS[name])
        return found
    if not name.endswith("_") or name.endswith("__"):
        return None
    home = {"torch": torch, "torch.nn.functional": F}.get(getattr(node.target, "__module__", ""), torch)
    return getattr(Tensor if node.op == "call_method" else home, name[:-1], None)


def as_first(function: Callable, first: Tensor, *others: Any, **kwargs: Any) -> Tensor:
    """`function(first, …)` with the dtype of `first`, as in place."""
    result: Tensor = function(first, *others, **kwargs)
    return result if result.dtype == first.dtype else result.to(first.dtype)


# --- checkpoint -------------------------------------------------------------------------------------


def run_checkpoint(body: Any, *args: Any, **options: Any) -> Any:
    """The region of a `torch.utils.checkpoint` inside the graph, as eager mode runs it.

    What comes from inside the graph are its arguments; parameters, buffers and inputs are in its closure, as they
    are in a module: a counter among them may move.
    """
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad and not a.is_leaf]

    def region(*tensors: Tensor) -> Any:
        given = list(args)
        for position, tensor in zip(positions, tensors, strict=True):
            given[position] = tensor
        return body(*given)

    known = ("preserve_rng_state", "determinism_check", "debug", "context_fn")
    chosen = {name: options[name] for name in known if name in options}
    return checkpoint(region, *(args[i] for i in positions), use_reentrant=False, **chosen)


# --- custom autograd functions ----------------------------------------------------------------------


def _take_out_grad_modes(body: Any) -> None:
    """Dynamo runs all of a backward without gradients; autograd runs it with them where it is to be differentiated."""
    module: Any = body.graph.owning_module.get_submodule(body.target)
    calls = [node for node in module.graph.nodes if node.op in ("call_function", "call_method")]
    if len(calls) < 2 or any(node.target is not torch._C._set_grad_enabled for node in (calls[0], calls[-1])):
        return
    for node in (calls[0], calls[-1]):
        module.graph.erase_node(node)
    module.recompile()


def run_custom_function(forward: Any, backward: Any, *args: Any, **options: Any) -> Any:
    """An autograd function of the user's: `forward` gives its results and what it saves, `backward` takes that."""
    return _Custom.apply((forward, backward), options, *args)


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bodies: tuple[Any, Any], options: dict[str, Any], *args: Any) -> Any:
        forward, ctx.body = bodies
        outputs, saved = forward(*args)
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        ctx.positions = options["saved_for_backward_idx"]
        ctx.others = [None if i in ctx.positions else value for i, value in enumerate(saved)]
        ctx.save_for_backward(*(saved[i] for i in ctx.positions))
        if options.get("dirty_idx"):
            ctx.mark_dirty(*(results[i] for i in options["dirty_idx"]))
        if options.get("non_differentiable_idx"):
            ctx.mark_non_differentiable(*(results[i] for i in options["non_differentiable_idx"]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = list(ctx.others)
        for position, tensor in zip(ctx.positions, ctx.saved_tensors, strict=True):
            saved[position] = tensor
        found = ctx.body(*grads, *saved)
        return (None, None, *(found if isinstance(found, (tuple, list)) else (found,)))
