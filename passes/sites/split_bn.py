"""norm → (add) → activation → consumers  ⇒  keep x, rebuild z in backward

    forward    z = act(a·x + b + residual)        x kept, z not
    backward   z again, bit for bit, by the same op from the same x, mean and variance

This is the memory side of BN fission and fusion (arXiv 1807.01702): the statistics belong to the
producer's output, normalization and activation to the consumer's input. What a consumer would save of z
is replaced by a recipe (`normpass.recipe.recipes`); a residual is part of the recipe, and may be a recipe itself.

Whether z is made again or kept after all is what the plan says (`normpass.analysis.minimum_cut`, or a budget).

Refuses: what the site refuses. Changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from normpass.rewrite.contract import Match, Refusal, Semantics, refused, replace_site
from normpass.rewrite.sites import Site
from normpass.runtime.functional import split_norm_act


@dataclass(frozen=True)
class SplitBN:
    name: str = "split_bn"
    semantics: Semantics = Semantics.EXACT
    of_batch_norms: bool = True

    def match(self, site: Site) -> Match | Refusal:
        if site.refused is not None:
            return refused(self.name, site)
        return Match(self.name, site, kept="x")

    def apply(self, graph: fx.Graph, match: Match) -> None:
        replace_site(graph, match.site, split_norm_act)
