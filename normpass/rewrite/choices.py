"""Sites + rewrites -> Choices: what is done at each site, what was refused and why.

At every site the first rewrite of the order that matches is taken: the order goes from the least kept. Where
`Decisions` name another one, that is taken. They also say which results are kept although they could be rebuilt, and
which producers run again: what `normpass.budget.planning` decides for a memory budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from normpass.rewrite.contract import Match, Refusal, Semantics, SiteRewrite
from normpass.rewrite.sites import Site


@dataclass(frozen=True)
class Decisions:
    """What differs from the default, by key (`normpass.graph.nodes.key_of`)."""

    rewrites: Mapping[str, str | None] = field(default_factory=dict)
    """site -> the rewrite to take there; None leaves the norm alone"""
    kept: frozenset[str] = frozenset()
    """results that are kept although they could be rebuilt"""
    rebuilt: frozenset[str] = frozenset()
    """convolutions, linear layers and poolings that run again in backward"""
    replayed: frozenset[str] = frozenset()
    """max poolings that look for their maxima again in backward"""
    leaves_all: bool = False
    """nothing is rewritten at all: to see what the plain model keeps"""

    @property
    def keys(self) -> frozenset[str]:
        """Whatever is named."""
        return frozenset(self.rewrites) | self.kept | self.rebuilt | self.replayed


DEFAULT = Decisions()


@dataclass(frozen=True)
class Choice:
    """What is done with one norm: a match, or none, and every refusal on the way."""

    site: Site
    match: Match | None
    refusals: tuple[Refusal, ...]

    @property
    def rewrite(self) -> str | None:
        return self.match.rewrite if self.match is not None else None


def choose_rewrites(
    sites: Sequence[Site], rewrites: Sequence[SiteRewrite], allow_lossy: bool, decisions: Decisions = DEFAULT
) -> tuple[Choice, ...]:
    """The first rewrite that matches, or the one decided on, site by site; lossy ones only where they are allowed."""
    allowed = [r for r in rewrites if r.semantics is Semantics.EXACT or allow_lossy]
    return tuple(_choose(site, _wanted(site, allowed, decisions)) for site in sites)


def _wanted(site: Site, allowed: Sequence[SiteRewrite], decisions: Decisions) -> Sequence[SiteRewrite]:
    if decisions.leaves_all:
        return ()
    allowed = [r for r in allowed if r.of_batch_norms == site.is_batch_norm]
    if site.path not in decisions.rewrites:
        return allowed
    return [r for r in allowed if r.name == decisions.rewrites[site.path]]


def _choose(site: Site, rewrites: Sequence[SiteRewrite]) -> Choice:
    if site.refused is not None:
        return Choice(site, None, (Refusal("any", site.path, site.refused, site.refused_at),))
    refusals: list[Refusal] = []
    for rewrite in rewrites:
        result = rewrite.match(site)
        if isinstance(result, Match):
            return Choice(site, result, tuple(refusals))
        refusals.append(result)
    return Choice(site, None, tuple(refusals))
