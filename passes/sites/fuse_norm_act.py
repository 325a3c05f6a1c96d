"""norm → (add) → activation  ⇒  one op that keeps x

    z = act(norm(x) + residual)

Backward owns the statistics' gradient: dx = A·dy + B·x + C with per-channel A, B, C (the closed form of
Ioffe & Szegedy 2015, arXiv 1502.03167), so x is the only activation-sized tensor the op keeps. The
consumer of z still keeps z. Used where z cannot carry a recipe.

Refuses: whatever the site itself refuses. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from normpass.rewrite.contract import Match, Refusal, Semantics, refused, replace_site
from normpass.rewrite.sites import Site
from normpass.runtime.functional import fused_norm_act


@dataclass(frozen=True)
class FuseNormAct:
    name: str = "fuse_norm_act"
    semantics: Semantics = Semantics.EXACT
    of_batch_norms: bool = True

    def match(self, site: Site) -> Match | Refusal:
        if site.refused is not None:
            return refused(self.name, site)
        return Match(self.name, site, kept="x and z")

    def apply(self, graph: fx.Graph, match: Match) -> None:
        replace_site(graph, match.site, fused_norm_act)
