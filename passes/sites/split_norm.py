"""group, instance, layer or RMS norm → (add) → activation  ⇒  keep x, rebuild z in backward

    forward    z = act(norm(x) + residual)        x kept, z not; the moments of each sample's groups or rows are kept
    backward   z again, bit for bit, by the same op from the same x and moments

What `split_bn` does for batch norms, where every sample has statistics of its own. Without this rewrite such a norm is
a cheap function that ATen runs again: as little is kept, in twice the time.

Where a compiler takes over the graph it is left out: those norms it decomposes and fuses itself.

Refuses: what the site refuses, as a device without kernels. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from normpass.rewrite.contract import Match, Refusal, Semantics, refused, replace_site
from normpass.rewrite.sites import Site
from normpass.runtime.sample_norms import split_sample_norm_act


@dataclass(frozen=True)
class SplitNorm:
    name: str = "split_norm"
    semantics: Semantics = Semantics.EXACT
    of_batch_norms: bool = False

    def match(self, site: Site) -> Match | Refusal:
        if site.refused is not None:
            return refused(self.name, site)
        return Match(self.name, site, kept="x")

    def apply(self, graph: fx.Graph, match: Match) -> None:
        replace_site(graph, match.site, split_sample_norm_act)
