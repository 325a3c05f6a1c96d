"""Graph -> Sites: the only file that recognizes a norm and what stands around it.

A *site* is one normalization with its producer, an optional residual input, its activation and the
consumers of the result:

    x = producer(…);  y = norm(x);  s = y + residual;  z = activation(s);  consumers(z)

A norm that cannot be rewritten at all is a site too, with the reason in `refused`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from normpass.analysis.facts import Facts
from normpass.graph.activations import activation_of
from normpass.graph.concatenation import NO_CONCATENATION, dissolved, pieces_of
from normpass.graph.nodes import bound, called, module_of, name_of
from normpass.graph.operators import (
    BATCH_NORM,
    NORMS,
    is_add,
    other_operand,
    producer_name,
    sums_in_place,
)
from normpass.graph.written_out import Form, forms_behind, is_of_one_kind, rounds_alike
from normpass.ops.activation import Activation
from normpass.ops.layout import activated_format, memory_format_of
from normpass.ops.sample_norm import sample_norms_of
from normpass.ops.sync_statistics import synced_statistics
from normpass.rewrite.sample_norms import ALWAYS_CONTIGUOUS, ROW_NORMS, SAMPLE_NORMS, sample_norm_call
from normpass.runtime.functional import FunctionalBatchNorm
from normpass.runtime.prelu import is_fusible as is_fusible_with_prelu
from normpass.runtime.sample_norms import is_fusible

IDENTITY = Activation("identity")
_SITES = BATCH_NORM | SAMPLE_NORMS


@dataclass(frozen=True)
class Site:
    """One normalization with what stands around it."""

    path: str
    """dotted name of the norm's module, or that of the call"""
    kind: str
    """class of the norm's module, or the function that is called"""
    norm: fx.Node
    x: fx.Node | None
    producer: str
    """what makes x: `conv2d`, `cat`, `add`, …"""
    activation: Activation
    out: fx.Node
    """the last node of norm, add, activation: its value is z"""
    residual: fx.Node | None = None
    add: fx.Node | None = None
    left_alone: str = ""
    """why what stands behind it is no part of it, where that is an activation all the same"""
    slope: fx.Node | None = None
    """that of a PReLU, which stands where the activation would"""
    within: tuple[fx.Node, ...] = ()
    """the nodes before `out` of an activation that is written out, in order"""
    written: fx.Node | None = None
    """the later node that changes z in place, if any"""
    gamma: Tensor | None = None
    """the norm's weight, (C,), if it has one"""
    refused: str | None = None
    """why no rewrite may touch this norm"""
    refused_at: tuple[str, ...] = ()
    """the nodes that are the reason"""
    cats: tuple[fx.Node, ...] = ()
    """x and the concatenations in it that only norms read (see `normpass.graph.concatenation`); none if `not_shared`"""
    not_shared: str | None = None
    """why this norm cannot do with the pieces of a concatenation"""
    is_batch_norm: bool = True
    """whether the statistics are over samples: else each sample has its own"""
    is_synced: bool = False
    """whether the statistics are those of all processes: what takes them keeps x for backward"""

    @property
    def pattern(self) -> str:
        parts = [self.producer, self.kind]
        parts += ["add"] if self.residual is not None else []
        parts += [] if self.activation.name == "identity" else [self.activation.name]
        parts += [] if self.slope is None else ["prelu"]
        return " → ".join(parts)


def find_sites(
    graph: fx.Graph,
    facts: Facts,
    values: Mapping[fx.Node, Any],
    layers: Mapping[Any, str],
    there_anyway: Collection[int],
    takes_slopes: bool = True,
) -> tuple[Site, ...]:
    """Every norm of the captured graph, in order.

    Args:
        there_anyway: the values that are kept or made again in backward without any rewrite: a norm takes only such
            a residual, which it keeps.
        takes_slopes: whether a PReLU may be part of a site.
        values: the real inputs of the graph, by placeholder.
        layers: functions that are norms of this library's own, with the reason why each is no site.
    """
    finder = _Finder(facts, values, layers, there_anyway, takes_slopes)
    sites = [finder.site(node) for node in graph.nodes if node.target in NORMS or node.target in layers]
    norms = frozenset(site.norm for site in sites if _reads_pieces(site))
    return tuple(finder.with_concatenations(site, norms) for site in sites)


def _reads_pieces(site: Site) -> bool:
    return site.refused is None and site.residual is None and site.written is None


class _Finder:
    def __init__(
        self,
        facts: Facts,
        values: Mapping[fx.Node, Any],
        layers: Mapping[Any, str],
        there_anyway: Collection[int],
        takes_slopes: bool,
    ):
        self.facts, self.values, self.layers, self.there_anyway = facts, values, layers, there_anyway
        self.takes_slopes = takes_slopes
        saved = frozenset(v for step in facts.steps for v in step.saves)
        self.doomed = saved & facts.overwritten  # backward is to raise, as it does without us

    def site(self, norm: fx.Node) -> Site:
        path, kind = module_of(norm)
        known = kind is not None and kind.__module__ != "torch.nn.modules.container"
        label = kind.__name__ if known and kind is not None else name_of(norm.target)
        x = _input_of(norm)
        is_synced = _is_synced(x)
        producer = "?" if x is None else producer_name(x.all_input_nodes[0].all_input_nodes[0] if is_synced else x)
        start = Site(
            path=called(norm) or path, kind=label, norm=norm, x=x, producer=producer, activation=IDENTITY, out=norm
        )
        start = replace(start, is_batch_norm=norm.target not in SAMPLE_NORMS, is_synced=is_synced)
        reason, at = self._refusal(norm, x)
        if reason is not None:
            return replace(start, refused=reason, refused_at=at)
        add, residual = self._residual(norm, x)
        last = norm if add is None else add
        activation, nodes = self._activation(last, x)
        out = nodes[-1] if nodes else last
        if residual is not None and self._would_move(norm, x, out):
            add, residual = None, None
            activation, nodes = self._activation(norm, x)
            out = nodes[-1] if nodes else norm
        slope = self._slope(norm, x) if out is norm and self.takes_slopes else None
        out = out if slope is None else next(iter(norm.users))
        written = self.facts.writer_after(out, out)
        arguments = bound(F.batch_norm, norm) if start.is_batch_norm else None
        weight = (arguments or {}).get("weight")
        gamma = self.values.get(weight) if isinstance(weight, fx.Node) else None
        around = replace(start, residual=residual, add=add, activation=activation, out=out, within=nodes[:-1])
        return replace(around, written=written, gamma=gamma, slope=slope, left_alone=_left_alone(out))

    def with_concatenations(self, site: Site, norms: frozenset[fx.Node]) -> Site:
        """The site with the concatenations that it can do without, `norms` being all that might."""
        if site.x is None or site.refused is not None:
            return site
        if not site.is_batch_norm:
            return replace(site, not_shared=NO_CONCATENATION)
        cats = dissolved(site.x, norms | {site.norm})
        if isinstance(cats, str):
            return replace(site, not_shared=cats)
        if not self.facts.are_in_one_mode(site.norm, *cats, *pieces_of(site.x, cats)):
            return replace(site, not_shared="grad mode or autocast is switched behind its concatenation")
        for piece in pieces_of(site.x, cats):
            writer = self.facts.writer_after(piece, piece)
            if writer is not None:
                reason = f"a tensor of its concatenation is changed in place later, by `{called(writer)}`"
                return replace(site, not_shared=reason)
            if not self.facts.is_watched(piece):
                reason = f"a tensor of its concatenation, `{called(piece)}`, may be changed by others before backward"
                return replace(site, not_shared=reason)
        if site.slope is not None:  # without it the concatenation need not be stored
            site = replace(site, slope=None, out=site.norm, written=self.facts.writer_after(site.norm, site.norm))
        return replace(site, cats=cats)

    # --- the norm itself ---

    def _refusal(self, norm: fx.Node, x: fx.Node | None) -> tuple[str | None, tuple[str, ...]]:
        if norm.target in self.layers:
            return self.layers[norm.target], ()
        if norm.target not in _SITES:
            return f"{NORMS[norm.target]} is not rewritten", ()
        if x is None:
            return "it is not called with one tensor", ()
        reason = self._refusal_of_sample_norm(norm, x) if norm.target in SAMPLE_NORMS else self._refusal_of_batch(norm)
        if reason is not None:
            return reason, ()
        writer = self.facts.writer_after(x, norm)
        if writer is not None:
            return f"its input is changed in place later, by `{called(writer)}`", (called(writer),)
        return None, ()

    def _refusal_of_batch(self, norm: fx.Node) -> str | None:
        arguments = bound(F.batch_norm, norm)
        if norm.target is not F.batch_norm or arguments is None:
            return "it is not called as F.batch_norm is"
        if not isinstance(arguments["training"], bool):
            return "its `training` argument is computed"
        if not all(self._is_number(arguments[name]) for name in ("eps", "momentum")):
            return "its `eps` or `momentum` is computed"
        return None

    def _refusal_of_sample_norm(self, norm: fx.Node, x: fx.Node) -> str | None:
        call = sample_norm_call(norm)
        if isinstance(call, str):
            return call
        _, arguments = call
        given = self.facts.results.get(x)
        if not isinstance(given, Tensor):
            return "it is not called with one tensor"
        if sample_norms_of(given.device.type) is None:
            return f"there is no kernel for it on `{given.device.type}`"
        for name in ("groups", "normalized_shape"):
            if _is_computed(arguments.get(name)):
                return f"its `{name}` is computed"
        if not all(self._is_number(arguments.get(name) or 0.0) for name in ("eps", "momentum")):
            return "its `eps` or `momentum` is computed"
        if not is_fusible(self._call(norm), given, None, "identity"):
            return "the kernels do not take these shapes, dtypes or layouts"
        return None

    def _is_number(self, argument: Any) -> bool:
        """Whether it is a number, or one that has changed between two calls, which the graph reads at each."""
        return isinstance(self.facts.results.get(argument, argument), (int, float))

    # --- what follows ---

    def _residual(self, norm: fx.Node, x: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that alone uses the norm's result, and its other operand; or (None, None)."""
        if len(norm.users) != 1 or norm.target in ROW_NORMS:
            return None, None
        add = next(iter(norm.users))
        if not is_add(add):
            return None, None
        residual = other_operand(add, norm)
        if residual is norm or self._is_norm_of_another_site(residual, norm):
            return None, None
        if not self.facts.are_in_one_mode(norm, add):
            return None, None
        if not isinstance(self.facts.results.get(residual), Tensor):
            return None, None
        into_residual = sums_in_place(add) and add.args[0] is not norm
        if into_residual and not (residual.target in _SITES and len(residual.users) == 1):
            return None, None  # it is the other operand that is written, and somebody else may see it
        own = self._activation(add, x)[1] if into_residual else ()
        last = own[-1] if own else add  # what the site itself writes there is no more
        if self.facts.writer_after(residual, last) is not None:
            return None, None  # kept as the residual, it must not change later
        value = self.facts.value_of(residual)
        if value is not None and value not in self.there_anyway:
            return None, None  # the sum is what is kept
        if value is None and not self.facts.is_watched(residual):
            return None, None  # somebody else may change it
        return add, residual

    def _is_norm_of_another_site(self, node: fx.Node, norm: fx.Node) -> bool:
        """Of two norms added to each other the later one takes the other as its residual."""
        return node.target in _SITES and len(node.users) == 1 and norm < node

    def _activation(self, last: fx.Node, x: fx.Node | None) -> tuple[Activation, tuple[fx.Node, ...]]:
        """The activation of `last` that alone is read, with its nodes; the identity and none if there is none."""
        user = next(iter(last.users)) if len(last.users) == 1 else None
        activation = None if user is None else activation_of(user)
        found = [] if user is None or activation is None else [Form(activation, (user,))]
        found += [form for form in forms_behind(last) if len(form.nodes) > 1]
        fitting = [form for form in found if self._takes_in(form, last, x)]
        return (fitting[-1].activation, fitting[-1].nodes) if fitting else (IDENTITY, ())

    def _slope(self, norm: fx.Node, x: fx.Node | None) -> fx.Node | None:
        """The slope of a PReLU that alone uses the norm's result, where one op may stand for both."""
        prelu = next(iter(norm.users)) if len(norm.users) == 1 else None
        if prelu is None or name_of(prelu.target) != "prelu" or prelu.kwargs or prelu.args[:1] != (norm,):
            return None
        slope, given = prelu.args[1], self.facts.results.get(x) if x is not None else None
        if not isinstance(slope, fx.Node) or slope.op != "placeholder" or slope is x:
            return None
        if self.facts.value_of(prelu) in self.doomed or not self.facts.are_in_one_mode(norm, prelu):
            return None
        if self.facts.toucher_between([slope], norm, prelu) is not None:
            return None
        call = self._call(norm)
        fits = call is not None and is_fusible_with_prelu(call, given, self.facts.results[slope])
        return slope if fits else None

    def _call(self, norm: fx.Node) -> Any:
        """What holds the arguments of a norm, with tensors without memory."""
        if norm.target in SAMPLE_NORMS:
            call = sample_norm_call(norm)
            kind, arguments = (None, {}) if isinstance(call, str) else call
        else:
            kind, arguments = FunctionalBatchNorm, bound(F.batch_norm, norm) or {}
            arguments.pop("input", None)
        values = {name: self.facts.results.get(a, a) if isinstance(a, fx.Node) else a for name, a in arguments.items()}
        return None if kind is None else kind(**values)

    def _takes_in(self, form: Form, last: fx.Node, x: fx.Node | None) -> bool:
        """Whether one op may stand for an activation and the norm, or the sum, before it."""
        if any(self.facts.value_of(node) in self.doomed for node in form.nodes):
            return False
        if not self.facts.are_in_one_mode(last, *form.nodes):
            return False
        given = None if x is None else self.facts.results.get(x)
        lies_alike = last.target in ALWAYS_CONTIGUOUS or _is_activated_alike(given)
        if len(form.nodes) > 1:
            results = [self.facts.results.get(node) for node in (last, *form.nodes)]
            return lies_alike and is_of_one_kind(results) and rounds_alike(form, results[0])
        return lies_alike or self.facts.writer_after(last, last) is not form.nodes[0]

    def _would_move(self, norm: fx.Node, x: fx.Node | None, out: fx.Node) -> bool:
        """Whether a norm that runs where its residual is added would pass somebody who sees what it reads or moves."""
        if x is not None and self.facts.writer_after(x, norm, until=out) is not None:
            return True
        state = [node for node in norm.all_input_nodes if node is not x]
        return self.facts.toucher_between(state, norm, out) is not None


def _left_alone(out: fx.Node) -> str:
    """Why an activation behind a site is not part of it; empty where there is none."""
    user = next(iter(out.users)) if len(out.users) == 1 else None
    name = "" if user is None else name_of(user.target).removeprefix("as_first_")
    if name in ("run_custom_function", "autograd_function_apply"):
        return "an autograd function of the model's own is behind it, which stays what it is"
    return "the activation behind it draws random slopes, which are kept" if name.startswith("rrelu") else ""


def _is_activated_alike(x: Any) -> bool:
    """Whether an activation behind a norm of `x` lies alike in place and out of place."""
    return not isinstance(x, Tensor) or (x.numel() > 0 and activated_format(x, "relu") is memory_format_of(x))


def _is_synced(x: fx.Node | None) -> bool:
    """Whether a norm's input comes with the statistics of all processes."""
    return x is not None and x.target is operator.getitem and x.all_input_nodes[0].target is synced_statistics


def _is_computed(argument: Any) -> bool:
    """Whether a number or some are nodes of the graph."""
    return any(isinstance(a, fx.Node) for a in (argument if isinstance(argument, (tuple, list)) else (argument,)))


def _input_of(norm: fx.Node) -> fx.Node | None:
    """The node that a norm normalizes; None where it is not called with one."""
    x = norm.args[0] if norm.args else norm.kwargs.get("input")
    return x if isinstance(x, fx.Node) else None


input_of = _input_of


__all__ = ["IDENTITY", "Site", "find_sites", "input_of"]
