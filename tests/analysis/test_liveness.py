"""Kept bytes, peak and rebuilding time of hand-made steps, and the choice among them."""

import pytest

from normpass.analysis.facts import Facts, Step
from normpass.analysis.liveness import Demand, Walker
from normpass.budget.search import Chosen, Search, Selectable

NONE: frozenset[int] = frozenset()


def step(key: str, makes: int, reads: int, size: int, saves: int) -> Step:
    return Step(None, key, makes=(makes,), reads=(reads,), read_sizes=(size,), saves=(saves,), differentiable=True)


def chain(length: int, size: int = 100) -> Facts:
    """Values 0 … length: each step reads the value before it, saves it, and makes the next one."""
    steps = [Step(None, "input", makes=(0,), differentiable=True)]
    for i in range(length):
        steps.append(step(f"s{i}", makes=i + 1, reads=i, size=size, saves=i))
    return Facts(steps, [size] * (length + 1), frozenset({length}))


def one_second(step: Step, facts: Facts) -> float:
    return 1.0


def test_everything_is_kept_that_nobody_rebuilds():
    walker = Walker(chain(4), one_second)
    use = walker.walk(NONE)
    assert use.kept == 400 and use.seconds == 0
    assert use.peak == 700  # four values, the output, its gradient and the first one of an input


def test_a_rebuilt_value_costs_its_step_and_keeps_what_it_is_made_from():
    walker = Walker(chain(4), one_second)
    use = walker.walk({1, 2})
    demand = Demand(walker, {1, 2})
    assert (demand.kept_values(), demand.used()) == ({0, 3}, {1, 2})
    assert use.kept == 200 and use.seconds == 2


def test_a_chain_comes_back_as_a_whole_and_a_kept_value_cuts_it():
    walker = Walker(chain(9), one_second)
    whole, cut = walker.walk(range(1, 9)), walker.walk({1, 2, 3, 5, 6, 7, 8})
    assert (whole.kept, cut.kept) == (100, 200)
    assert whole.peak > cut.peak
    assert whole.at_peak >= {5, 6, 7, 8}
    assert len(whole.timeline) == 2 * whole.forward_steps


def test_a_value_that_nobody_needs_costs_nothing():
    facts = chain(3)
    facts.steps.append(Step(None, "spare", makes=(4,), reads=(1,), read_sizes=(100,)))
    facts.sizes.append(100)
    assert Walker(facts, one_second).walk({4}).seconds == 0


def test_the_cheapest_bytes_go_first_and_the_dearest_come_back():
    facts = chain(3)
    facts.sizes = [10, 100, 100, 100]
    seconds = {"s0": 5.0, "s1": 1.0}
    search = Search(Walker(facts, lambda s, _: seconds.get(s.key, 9.0)), Selectable(frozenset({1, 2}), NONE, NONE))
    assert search.within(210) == Chosen(NONE, NONE)
    assert search.within(110) == Chosen(frozenset({2}), NONE)
    assert search.within(10) == Chosen(frozenset({1, 2}), NONE)
    assert search.within(9) is None
    assert search.smallest() == 10


def test_what_saves_nothing_alone_is_taken_with_what_it_is_made_from():
    """A sum behind a convolution, which nobody saves: instead of the sum its result would be kept."""
    facts = chain(3)
    facts.steps[2] = Step(None, "conv", makes=(2,), reads=(1,), read_sizes=(100,), saves=(1,), differentiable=True)
    facts.steps[3] = Step(None, "add", makes=(3,), reads=(2,), read_sizes=(100,), differentiable=True)
    facts.steps.append(step("norm", makes=4, reads=3, size=100, saves=3))
    facts.sizes.append(100)
    facts.outputs = frozenset({4})
    search = Search(Walker(facts, one_second), Selectable(NONE, frozenset({2, 3}), NONE))
    assert [search.kept(Chosen(frozenset(taken), NONE)) for taken in ((), (2,), (3,), (2, 3))] == [300, 300, 300, 200]
    assert search.within(200) == Chosen(frozenset({2, 3}), NONE)


def test_indices_may_be_looked_for_again():
    facts = chain(2)
    facts.steps[1].internals = 500
    search = Search(Walker(facts, one_second), Selectable(NONE, NONE, frozenset({1})))
    assert search.within(700) == Chosen(NONE, NONE)
    assert search.within(200) == Chosen(NONE, frozenset({1}))
    assert search.use(Chosen(NONE, frozenset({1}))).seconds == 1.0


def test_the_peak_is_brought_down_by_keeping_a_value_in_the_middle():
    """Side values, cheap to drop, pay for the one that is kept."""
    facts = chain(9)
    for i in range(1, 9):
        facts.steps.append(step(f"side{i}", makes=9 + i, reads=i, size=100, saves=9 + i))
        facts.sizes.append(100)
    possible = Selectable(frozenset(range(1, 9)), frozenset(range(10, 18)), NONE)
    search = Search(Walker(facts, lambda s, _: 5.0 if s.key.startswith("side") else 1.0), possible)
    high, low = search.within(900), search.within(900, peak=1500)
    assert search.kept(low) <= 900
    assert search.use(low).peak < search.use(high).peak
    assert search.use(low).seconds > search.use(high).seconds


def test_two_gradients_of_one_value_lie_side_by_side_where_nobody_adds_them():
    facts = chain(3)
    facts.steps.append(step("branch", makes=4, reads=1, size=100, saves=1))
    facts.sizes.append(100)
    facts.outputs = frozenset({3, 4})
    added = Walker(facts, one_second).walk(NONE)
    facts.steps[1].gradients_apart = True
    apart = Walker(facts, one_second).walk(NONE)
    assert apart.kept == added.kept
    assert max(b - a for a, b in zip(added.timeline, apart.timeline, strict=True)) == 100
    assert apart.timeline[-1] == added.timeline[-1]


@pytest.mark.parametrize("budget", [100, 300, 500, 900])
def test_a_choice_is_never_dearer_than_one_value_less(budget):
    search = Search(Walker(chain(9), one_second), Selectable(frozenset(range(1, 9)), NONE, NONE))
    chosen = search.within(budget)
    assert all(search.kept(Chosen(chosen.rebuilt - {v}, NONE)) > budget for v in chosen.rebuilt)
