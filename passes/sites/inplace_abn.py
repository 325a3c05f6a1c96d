"""norm → activation  ⇒  keep z alone, reconstruct x̂ from it  (lossy)

    backward   y = act⁻¹(z),  x̂ = (y − beta)/gamma

In-place activated batch norm (arXiv 1712.02616), with gamma's own sign. No value is rebuilt for the
consumer, so it takes the fewest passes; but x̂ comes from a rounded z, with an error of about
ulp(z)·|beta/gamma|. Hence LOSSY, chosen only with `allow_lossy=True`.

Refuses: what the site refuses; an activation without an inverse; a residual (z alone does not hold both
terms); a norm without weights to divide by is fine, one whose gamma is zero or tiny now is not; a z that
is changed in place later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from normpass.rewrite.contract import Match, Refusal, Semantics, refused, replace_site, written_later
from normpass.rewrite.sites import Site
from normpass.runtime.functional import inplace_abn


@dataclass(frozen=True)
class InplaceABN:
    smallest_gamma: float = 1e-3
    """refuse a norm that has a channel with |gamma| below this when the plan is made"""
    name: str = "inplace_abn"
    semantics: Semantics = Semantics.LOSSY
    of_batch_norms: bool = True

    def match(self, site: Site) -> Match | Refusal:
        if site.refused is not None:
            return refused(self.name, site)
        reason = self._reason(site)
        if reason is not None:
            return Refusal(self.name, site.path, reason)
        return written_later(self.name, site) or Match(self.name, site, kept="z")

    def _reason(self, site: Site) -> str | None:
        if site.slope is not None:
            return "a PReLU has a slope of its own"
        if site.residual is not None:
            return "a residual is added before the activation"
        if site.is_synced:
            return "its statistics are those of all processes, and their gradient needs its input"
        if not site.activation.invertible:
            return f"{site.activation.name} has no inverse"
        gamma = site.gamma
        if gamma is None:
            return None
        smallest = float(torch.min(gamma.detach().abs())) if gamma.numel() else 1.0
        if smallest < self.smallest_gamma:
            return f"its smallest |gamma| is {smallest:.2g}, below {self.smallest_gamma:g}"
        return None

    def apply(self, graph: fx.Graph, match: Match) -> None:
        replace_site(graph, match.site, inplace_abn, with_residual=False)
