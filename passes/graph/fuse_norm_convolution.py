"""norm → activation → depthwise convolution  ⇒  one kernel, without what stands between them

    y = conv(act(norm(x)))

The norm and the activation are applied to the rows that are convolved, as these are read (BN fission and fusion:
arXiv 1807.01702, with the convolution): z = act(norm(x)) is not written in forward and not rebuilt in backward. On the
CPU, in channels_last; decided when the graph runs, elsewhere both run one after the other and z is rebuilt, or kept if
a plan says so.

Refuses: a z with other readers; one that a residual is added to; a norm whose parameters or statistics something else
sees, which it would pass. Changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from normpass.analysis.facts import Facts
from normpass.graph.nodes import bound, called_on, replace_node
from normpass.rewrite.contract import is_alone
from normpass.runtime.convolution import convolution_function, is_depthwise, norm_act_convolution
from normpass.runtime.functional import fused_norm_act, split_norm_act

_NORMS = (split_norm_act, fused_norm_act)


@dataclass(frozen=True)
class FuseNormConvolution:
    name: str = "fuse_norm_convolution"

    def apply(self, graph: fx.Graph, facts: Facts) -> set[str]:
        """Rewrite `graph` in place; the names of the new nodes."""
        names = set()
        for node in list(graph.nodes):
            arguments = bound(convolution_function, node) if node.target is convolution_function else None
            norm = None if arguments is None else arguments["input"]
            if not isinstance(norm, fx.Node) or norm.target not in _NORMS or list(norm.users) != [node]:
                continue
            if facts.modes.get(norm) != facts.modes.get(node):
                continue
            call, x, residual, *activation = cast("tuple[Any, ...]", norm.args[:5])
            if residual is not None or not _is_depthwise(arguments, facts.results):
                continue
            if not is_alone(call, facts.storages):
                continue
            assert arguments is not None
            options = [arguments[name] for name in ("weight", "bias", "stride", "padding", "dilation", "groups")]
            with graph.inserting_before(node):
                function = called_on(norm_act_convolution, norm.target)
                new = graph.call_function(function, (call, x, *activation, *options))
            names.add(replace_node(graph, node, new).name)
            graph.erase_node(norm)
        return names


def _is_depthwise(arguments: Any, results: Mapping[fx.Node, Any]) -> bool:
    weight = results.get(arguments["weight"])
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return False
    return is_depthwise(weight.shape[2:], arguments["stride"], arguments["groups"], weight.shape[0])
