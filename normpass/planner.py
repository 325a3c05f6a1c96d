"""Sites + rewrites -> Plan: what is chosen at each site, what was refused and why.

Without a memory budget the plan takes, at every site, the first rewrite of the order that matches: the
order goes from the least kept. (A budget, costs and tuning come with the planner issue; the plan's form
stays.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normpass.rewrite import Match, Refusal, Rewrite, Semantics
from normpass.sites import Site


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


def make_plan(sites: Sequence[Site], rewrites: Sequence[Rewrite], allow_lossy: bool) -> Plan:
    """The first rewrite that matches, site by site; lossy ones only where they are allowed."""
    allowed = [r for r in rewrites if r.semantics is Semantics.EXACT or allow_lossy]
    return Plan(tuple(_choose(site, allowed) for site in sites))


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
