"""Sites + rewrites -> Plan: what is chosen at each site, what was refused and why.

A plan takes, at every site, the first rewrite of the order that matches: the order goes from the least kept. Where
`Decisions` name another one, that is taken. They also say which results are kept although they could be rebuilt, and
which producers run again: what `normpass.budget` decides for a memory budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normpass.rewrite import Match, Refusal, Rewrite, Semantics
from normpass.sites import Site


@dataclass(frozen=True)
class Decisions:
    """What differs from the default, by key (`normpass.graph.key_of`), below the module they are for."""

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

    def below(self, path: str) -> Decisions:
        """Those for the part at the dotted `path`, by their keys there."""
        if not path:
            return self
        start = f"{path}."

        def own(keys: frozenset[str]) -> frozenset[str]:
            return frozenset(key.removeprefix(start) for key in keys if key.startswith(start))

        rewrites = {key.removeprefix(start): value for key, value in self.rewrites.items() if key.startswith(start)}
        return Decisions(rewrites, own(self.kept), own(self.rebuilt), own(self.replayed), self.leaves_all)

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


@dataclass(frozen=True)
class Plan:
    """The choices for every site of one captured graph, in the graph's order."""

    choices: tuple[Choice, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "path": c.site.path,
                "pattern": c.site.pattern,
                "rewrite": c.rewrite,
                "kept": c.match.kept if c.match is not None else None,
                "refusals": [{"rewrite": r.rewrite, "reason": r.reason} for r in c.refusals],
            }
            for c in self.choices
        ]


def make_plan(
    sites: Sequence[Site], rewrites: Sequence[Rewrite], allow_lossy: bool, decisions: Decisions = DEFAULT
) -> Plan:
    """The first rewrite that matches, or the one decided on, site by site; lossy ones only where they are allowed."""
    allowed = [r for r in rewrites if r.semantics is Semantics.EXACT or allow_lossy]
    return Plan(tuple(_choose(site, _wanted(site, allowed, decisions)) for site in sites))


def _wanted(site: Site, allowed: Sequence[Rewrite], decisions: Decisions) -> Sequence[Rewrite]:
    if decisions.leaves_all:
        return ()
    if site.path not in decisions.rewrites:
        return allowed
    return [r for r in allowed if r.name == decisions.rewrites[site.path]]


def _choose(site: Site, rewrites: Sequence[Rewrite]) -> Choice:
    if site.refused is not None:
        return Choice(site, None, (Refusal("any", site.path, site.refused),))
    refusals: list[Refusal] = []
    for rewrite in rewrites:
        result = rewrite.match(site)
        if isinstance(result, Match):
            return Choice(site, result, tuple(refusals))
        refusals.append(result)
    return Choice(site, None, tuple(refusals))
