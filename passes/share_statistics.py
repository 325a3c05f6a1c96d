"""cat(x₁, …, xₙ) → norm → activation  ⇒  moments once for each xᵢ, z from the pieces

    behind xᵢ   meanᵢ, varᵢ                                once, however many norms read xᵢ
    forward     z = act(a·(cat(x₁, …, xₙ) − mean) + bias)  read from the pieces; mean and var are those of the pieces
    backward    z again, bit for bit; each xᵢ's gradient is summed over its norms before it goes through the moments

A channel's moments do not depend on what it is concatenated with: only gamma, beta and the running statistics are
each norm's own. This is ICF, the fusion across the concatenations of DenseNet, of BN restructuring (arXiv 1807.01702).
DenseNet-121 has 62 such norms, which read 62 tensors: plain BatchNorm computes the moments of a channel up to 24
times. The concatenation is neither kept nor stored; what is kept are the pieces, which it would keep as well.

Refuses: what the site refuses; an input that is no concatenation along the channels, or one that anything but such
norms reads; a residual; a z, or a piece, that is changed in place later; a tensor that is twice in the concatenation.
Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from normpass.concatenation import pieces_of
from normpass.graph import bound
from normpass.rewrite import Match, Refusal, Semantics, norm_node
from normpass.sharing import producer_statistics, shared_norm_act
from normpass.sites import Site, input_of


@dataclass(frozen=True)
class ShareStatistics:
    name: str = "share_statistics"
    semantics: Semantics = Semantics.EXACT

    def match(self, site: Site) -> Match | Refusal:
        reason = site.refused or site.not_shared
        if reason is not None:
            return Refusal(self.name, site.path, reason)
        if site.residual is not None:
            return Refusal(self.name, site.path, "a residual is added before the activation")
        if site.written is not None:
            return Refusal(self.name, site.path, f"its result is changed in place later, by `{site.written}`")
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
        shared.meta["site"] = site.path
        site.out.replace_all_uses_with(shared)
        for node in dict.fromkeys((site.out, norm)):
            graph.erase_node(node)
        for cat in site.cats:
            if not cat.users:
                graph.erase_node(cat)


def _producer(graph: fx.Graph, piece: fx.Node, norm: fx.Node) -> fx.Node:
    """The node with the moments of `piece`, behind it, which is told the first and the last of the norms."""
    found = next((user for user in piece.users if user.target is producer_statistics), None)
    if found is None:
        with graph.inserting_after(_last_placeholder(piece)):
            found = graph.call_function(producer_statistics, (piece,))
    first, last = found.args[1:2], found.args[2:]
    with graph.inserting_before(found):
        found.args = (piece, *first, _norm_or_training(graph, norm))
    for before in last:
        if isinstance(before, fx.Node):
            graph.erase_node(before)
    return found


def _last_placeholder(piece: fx.Node) -> fx.Node:
    """Behind which node that of `piece` is put: behind all inputs of the graph, where it is one."""
    node = piece
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _norm_or_training(graph: fx.Graph, norm: fx.Node) -> fx.Node | bool:
    """The norm's module; of an `F.batch_norm` call, whether it normalises with the batch's statistics."""
    if norm.op == "call_module":
        return graph.get_attr(str(norm.target))
    arguments = bound(F.batch_norm, norm)
    assert arguments is not None  # a site has been made of it
    return bool(arguments["training"]) or arguments["running_mean"] is None
