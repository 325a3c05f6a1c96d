"""Groups of a chain: the optimum against every way to cut, the greedy way against it."""

import itertools
import random

import pytest

from normpass.serialize.grouping import greedy, optimal


def total(groups, cost):
    return sum(cost(start, stop) for start, stop in groups)


def every_way(count):
    """All sets of groups of `count` units."""
    for inner in itertools.product((False, True), repeat=count - 1):
        cuts = [0, *(i + 1 for i, cut in enumerate(inner) if cut), count]
        yield tuple(itertools.pairwise(cuts))


def table_of(count, seed):
    """A cost for every range, without any order in it."""
    values = random.Random(seed)
    costs = {(i, j): values.random() * (j - i) ** 0.5 for i in range(count) for j in range(i + 1, count + 1)}
    return lambda start, stop: costs[start, stop]


@pytest.mark.parametrize("seed", range(20))
def test_optimal_is_the_least_of_all_ways(seed):
    cost = table_of(7, seed)
    found = optimal(7, cost)
    assert total(found, cost) == min(total(groups, cost) for groups in every_way(7))
    assert total(found, cost) <= total(greedy(7, cost), cost)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("group", [optimal, greedy])
def test_groups_cover_the_chain_in_order(group, seed):
    groups = group(6, table_of(6, seed))
    assert groups[0][0] == 0 and groups[-1][1] == 6
    assert all(a[1] == b[0] for a, b in itertools.pairwise(groups))


def test_greedy_stops_where_no_single_merge_saves():
    """Three units that only pay together: greedy never sees it."""
    costs = {1: 1.0, 2: 2.5, 3: 0.5}

    def cost(start, stop):
        return costs[stop - start]

    assert greedy(3, cost) == ((0, 1), (1, 2), (2, 3))
    assert optimal(3, cost) == ((0, 3),)


def test_greedy_merges_the_best_pair_first():
    costs = {(0, 1): 3, (1, 2): 3, (2, 3): 3, (0, 2): 5, (1, 3): 1, (0, 3): 9}
    assert greedy(3, lambda *group: costs[group]) == ((0, 1), (1, 3))


@pytest.mark.parametrize("group", [optimal, greedy])
def test_nothing_and_one(group):
    assert group(0, lambda *_: 1.0) == ()
    assert group(1, lambda *_: 1.0) == ((0, 1),)
