"""cat(x₁, …, xₙ) → norm → activation  ⇒  moments once for each xᵢ, z from the pieces

    behind xᵢ   meanᵢ, varᵢ                                once, however many norms read xᵢ
    forward     z = act(a·(cat(x₁, …, xₙ) − mean) + bias)  read from the pieces; mean and var are those of the pieces
    backward    z again, bit for bit; each xᵢ's gradient is summed over its norms before it goes through the moments

A channel's moments do not depend on what it is concatenated with: only gamma, beta and the running statistics are
each norm's own. This is ICF, the fusion across the concatenations of DenseNet, of BN restructuring (arXiv 1807.01702).
DenseNet-121 has 62 such norms, which read 62 tensors: plain BatchNorm computes the moments of a channel up to 24
times. The concatenation is neither kept nor stored; what is kept are the pieces, which it would keep as well.

Refuses: what the site refuses; an input that is no concatenation along the channels, or one that anything but such
norms reads; a residual; a piece that is changed in place later; a tensor that is twice in the concatenation.
Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from normpass.graph.concatenation import pieces_of
from normpass.graph.nodes import bound, inherit
from normpass.rewrite.contract import Match, Refusal, Semantics, norm_node, refused
from normpass.rewrite.sites import Site, input_of
from normpass.runtime.sharing import producer_statistics, shared_norm_act


@dataclass(frozen=True)
class ShareStatistics:
    name: str = "share_statistics"
    semantics: Semantics = Semantics.EXACT
    of_batch_norms: bool = True

    def match(self, site: Site) -> Match | Refusal:
        if site.refused is not None:
            return refused(self.name, site)
        if site.not_shared is not None:
            return Refusal(self.name, site.path, site.not_shared)
        if site.residual is not None:
            return Refusal(self.name, site.path, "a residual is added before the activation")
        return Match(self.name, site, kept="x")

    def apply(self, graph: fx.Graph, match: Match) -> None:
        site = match.site
        whole = input_of(site.norm)
        assert whole is not None  # the site has one
        norm = site.norm
        producers = [_producer(graph, piece, norm) for piece in pieces_of(whole, site.cats)]
        with graph.inserting_before(norm):
            module = norm_node(graph, site)
            args: Any = (module, site.activation.name, site.activation.args, *producers)
            shared = graph.call_function(shared_norm_act, args)
        inherit(shared, norm)
        site.out.replace_all_uses_with(shared)
        for node in dict.fromkeys((site.out, *reversed(site.within), norm)):
            graph.erase_node(node)
        for cat in site.cats:
            if not cat.users:
                graph.erase_node(cat)


def _producer(graph: fx.Graph, piece: fx.Node, norm: fx.Node) -> fx.Node:
    """The node with the moments of `piece`, behind it: for all norms that read it."""
    found = next((user for user in piece.users if user.target is producer_statistics), None)
    if found is None:
        with graph.inserting_after(_last_placeholder(piece)):
            found = graph.call_function(producer_statistics, (piece, False))
        inherit(found, piece)
        found.meta["key"] += ".statistics"
    found.args = (piece, found.args[1] or _uses_batch(norm))
    return found


def _last_placeholder(piece: fx.Node) -> fx.Node:
    """Behind which node that of `piece` is put: behind all inputs of the graph, where it is one."""
    node = piece
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _uses_batch(norm: fx.Node) -> bool:
    """Whether a norm normalizes with the batch's statistics."""
    arguments = bound(F.batch_norm, norm)
    assert arguments is not None  # a site has been made of it
    return bool(arguments["training"]) or arguments["running_mean"] is None
