"""How teams of threads share out runs, values of one mean and variance; `cuda/team.cuh` is the other half."""

from __future__ import annotations

import functools
from typing import NamedTuple

TEAMS = (32, 128, 512)
"""Threads that have one run: a warp or a block."""
SMALLEST_BLOCK = 128
BLOCKS_A_MULTIPROCESSOR = 4
"""as many as there should be, where a run may be shared out among several"""


class Runs(NamedTuple):
    """Runs that lie one behind the other."""

    runs: int
    groups: int
    """of a sample: run r is group r modulo groups"""
    channels: int
    """of a group"""
    spatial: int
    """values of one channel of a run"""


class Teams(NamedTuple):
    """How a grid takes runs; `cuda/team.cuh` says what the numbers mean."""

    vector: int
    team: int
    threads: int
    blocks: int
    parts: int
    parameters: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def teams(runs: Runs, itemsize: int, alignment: int, multiprocessors: int, is_shared: bool) -> Teams:
    """The widest accesses that divide what lies together, and the smallest team that holds a run in registers.

    is_shared: whether several blocks may have parts of one run.
    """
    count, groups, channels, spatial = runs
    vector = max(alignment // itemsize, 1)
    while (channels if spatial == 1 else spatial) % vector:
        vector //= 2
    vectors, plane, held = channels * spatial // vector, max(spatial // vector, 1), _held(vector * itemsize)
    team = next((team for team in TEAMS if team * held >= vectors), TEAMS[-1])
    threads = max(team, SMALLEST_BLOCK)
    blocks, parts = -(-count // (threads // team)), 1
    if is_shared:
        parts = min(max(BLOCKS_A_MULTIPROCESSOR * multiprocessors // blocks, 1), -(-vectors // (team * held)))
    return Teams(vector, team, threads, blocks, parts, (count, groups, channels, vectors, plane, parts))


def teams_of_planes(runs: Runs, itemsize: int, alignment: int, multiprocessors: int, is_shared: bool) -> Teams:
    """A team for each channel of each run, whole."""
    count, groups, channels, spatial = runs
    shape = teams(Runs(count * channels, groups, 1, spatial), itemsize, alignment, multiprocessors, False)
    planes, _, _, *others = shape.parameters
    return shape._replace(parameters=(planes, groups, channels, *others))


def _held(bytes_of_vector: int) -> int:
    """Vectors that a thread holds of one tensor."""
    return 8 if bytes_of_vector <= 4 else 4
