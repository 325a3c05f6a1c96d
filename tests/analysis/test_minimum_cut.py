"""The fewest bytes that can be kept: against every choice there is, and what may be made again at all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import captured
from torch import fx, nn
from training import ConvNet, collected, image

import normpass
from normpass.analysis.facts import Facts, Step
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.analysis.minimum_cut import Possible, joined, minimum_cut, needed_values, possible
from normpass.graph.nodes import name_of
from normpass.measure import kept_bytes
from normpass.pipeline import NOTES_ITSELF

NODE = fx.Graph().placeholder("x")


def problem(
    values: list[tuple[int, bool, tuple[int, ...]]],
    saved: set[int],
    outputs: set[int] = frozenset(),  # type: ignore[assignment]
    fixed: set[int] = frozenset(),  # type: ignore[assignment]
) -> Possible:
    """Values as (bytes, whether a cheap function makes it, from what), and which of them are needed."""
    steps = [Step(NODE, str(i), makes=(i,), reads=reads) for i, (_, _, reads) in enumerate(values)]
    steps.append(Step(NODE, "needs", saves=tuple(saved)))
    facts = Facts(steps, [size for size, _, _ in values], frozenset(outputs))
    cheap = frozenset(i for i, (_, is_cheap, _) in enumerate(values) if is_cheap)
    return Possible(facts, tuple(facts.maker()), cheap, frozenset(), frozenset(fixed))


def kept(found: Possible, again: frozenset[int]) -> float:
    """Bytes that are kept where exactly these values are made again; infinite where that cannot be done."""
    facts, total = found.facts, 0.0
    saved = {v for step in facts.steps for v in step.saves}
    waiting, seen = list(saved), set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in again:
            waiting += facts.steps[found.maker[value]].reads
        elif value in found.fixed and value not in saved:
            return float("inf")
        elif value not in facts.outputs:
            total += facts.sizes[value]
    return total


def random_problem(seed: int) -> Possible:
    draw = random.Random(seed)
    values: list[tuple[int, bool, tuple[int, ...]]] = []
    fixed: set[int] = set()
    for index in range(draw.randint(1, 9)):
        reads = tuple(draw.sample(range(index), min(index, draw.randint(0, 3))))
        reachable = all(r not in fixed or values[r][1] for r in reads)
        values.append((draw.choice([1, 2, 2, 3, 5, 8]), reachable and draw.random() < 0.7, reads))
        if draw.random() < 0.15:
            fixed.add(index)
    count = len(values)
    saved = set(draw.sample(range(count), draw.randint(0, count)))
    outputs = {v for v in range(count) if draw.random() < 0.2}
    return problem(values, saved, outputs, fixed - saved)


def test_no_choice_keeps_fewer_bytes() -> None:
    was_better = 0
    for seed in range(400):
        found = random_problem(seed)
        subsets = itertools.chain.from_iterable(
            itertools.combinations(found.cheap, n) for n in range(len(found.cheap) + 1)
        )
        least = min(kept(found, frozenset(subset)) for subset in subsets)
        again = minimum_cut(found)
        assert again <= found.cheap
        assert kept(found, again) == least < float("inf"), seed
        was_better += least < kept(found, frozenset())
    assert was_better > 100


def test_of_equal_cuts_the_one_that_makes_the_least_again() -> None:
    chain = problem([(4, False, ()), (4, True, (0,)), (4, True, (1,))], saved={2})
    assert minimum_cut(chain) == frozenset()
    wide = problem([(4, False, ()), (8, True, (0,)), (4, True, (1,))], saved={1, 2})
    assert minimum_cut(wide) == {1, 2} and needed_values(wide) == {0, 1, 2}
    narrow = problem([(4, False, ()), (8, True, (0,)), (2, True, (1,)), (6, True, (2,))], saved={3})
    assert minimum_cut(narrow) == {3} and needed_values(narrow) == {2, 3}


def test_what_is_there_anyway_costs_nothing() -> None:
    found = problem([(4, True, ()), (4, True, (0,))], saved={1})
    assert minimum_cut(found) == {0, 1}  # from inputs of the graph alone
    returned = problem([(4, False, ()), (2, True, (0,)), (4, True, (1,))], saved={2}, outputs={0})
    assert minimum_cut(returned) == {1, 2} and kept(returned, frozenset({1, 2})) == 0


def test_what_can_neither_be_kept_nor_made() -> None:
    found = problem([(4, False, ()), (1, True, (0,)), (4, True, (1,))], saved={2}, fixed={1})
    assert minimum_cut(found) == frozenset()  # as it is: z; or x
    larger = problem([(4, False, ()), (1, True, (0,)), (5, True, (1,))], saved={2}, fixed={1})
    assert minimum_cut(larger) == {1, 2}


def test_graphs_that_run_one_after_the_other() -> None:
    first, second = random_problem(11), random_problem(12)
    both = joined([first, second])
    start = len(first.facts.sizes)
    assert minimum_cut(both) == minimum_cut(first) | {v + start for v in minimum_cut(second)}
    assert both.facts.sizes == first.facts.sizes + second.facts.sizes and len(both.maker) == len(both.facts.sizes)


# --- what may be made again -----------------------------------------------------------------------


def kinds(function: Callable, *inputs: Any, notes_itself: Any = NOTES_ITSELF) -> dict[str, str]:
    """Name of what each step calls -> cheap, dear or kept: what it makes."""
    graph_module, real = captured(function, *inputs)
    found = possible(facts_of(graph_module, FakeInputs(real)), notes_itself)
    kind = {v: "cheap" if v in found.cheap else "dear" if v in found.dear else "kept" for v in range(len(found.maker))}
    return {name_of(s.target): kind[s.makes[0]] for s in found.facts.steps if s.makes}


X = torch.randn(2, 4, 6, 6, requires_grad=True)
WEIGHT = torch.randn(4, 4, 1, 1, requires_grad=True)
CALLS: dict[str, tuple[Callable, str]] = {
    "relu": (lambda x: F.relu(x * 1), "cheap"),
    "sigmoid": (lambda x: torch.sigmoid(x * 1), "cheap"),
    "cat": (lambda x: torch.cat([x * 1, x * 2], 1), "cheap"),
    "interpolate": (lambda x: F.interpolate(x * 1, scale_factor=2), "cheap"),
    "pad": (lambda x: F.pad(x * 1, (1, 1)), "cheap"),
    "group_norm": (lambda x: F.group_norm(x * 1, 2), "cheap"),
    "layer_norm": (lambda x: F.layer_norm(x * 1, (6,)), "cheap"),
    "add_": (lambda x: (x * 1).add_(1), "cheap"),
    "max_pool2d": (lambda x: F.max_pool2d(x * 1, 2), "dear"),
    "avg_pool2d": (lambda x: F.avg_pool2d(x * 1, 3, 1), "cheap"),
    "mean": (lambda x: (x * 1).mean(1), "dear"),
    "conv2d": (lambda x: F.conv2d(x * 1, WEIGHT), "dear"),
    "matmul": (lambda x: (x * 1) @ x, "dear"),
    "dropout": (lambda x: F.dropout(x * 1, 0.5), "kept"),
    "rand_like": (lambda x: torch.rand_like(x) * x, "kept"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_cheap_and_what_is_dear(name: str) -> None:
    function, expected = CALLS[name]
    found = kinds(lambda x: function(x).sin().sin(), X)  # what is returned cannot be kept unnoticed
    assert found[name] == expected


def test_what_somebody_else_may_change_is_no_source() -> None:
    """What a graph returns and autograd does not keep; and what is written to later."""
    assert kinds(lambda x: ((y := x.mean(1)), F.relu(y + 1).sin()), X)["add"] == "kept"
    assert kinds(lambda x: ((y := x.mean(1)), F.relu(y + 1).sin(), y.cos()), X)["add"] == "cheap"
    assert kinds(lambda x: ((y := x * 2), F.relu(y + 1).sin()), X)["add"] == "cheap"

    def write_later(x):
        y = x * 2
        z = y + 1
        y.mul_(3)
        return z.sin() + y

    found = kinds(write_later, X.detach().requires_grad_())
    assert found["mul"] == "cheap" and found["add"] == "cheap"  # from x, which nobody writes to


def test_inputs_are_sources_where_they_are_kept_or_small() -> None:
    large, small = torch.randn(2, 4, 96, 96), torch.randn(4, 1, 1)
    assert kinds(lambda x, y: (x * 1 + y).sin(), X, small)["add"] == "cheap"
    x = torch.randn(2, 4, 96, 96, requires_grad=True)
    assert kinds(lambda x, y: (x.exp() + y).sin(), x, large)["add"] == "kept"
    assert kinds(lambda x, y: (x * y + y).sin(), x, large)["add"] == "cheap"  # the product keeps y


def test_statistics_are_not_moved_again_and_a_counter_is_not_counted_again() -> None:
    found = kinds(
        lambda x, mean, var: F.batch_norm(x * 1, mean, var, training=True).sin(), X, torch.zeros(4), torch.ones(4)
    )
    assert found["batch_norm"] == "cheap"

    def counts(x, counter):
        return (x + counter.add_(1)).sin()

    assert kinds(counts, X, torch.zeros(1))["add"] == "kept"


class Dropped(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.p = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), p

    def forward(self, x):
        return self.last(F.dropout(F.relu(self.norm(self.conv(x))), self.p))


def test_what_is_predicted_is_kept() -> None:
    """The cut's bytes, and what autograd keeps beside values, are what a step really keeps."""
    x = image(2, 3, 24, 24)
    for model in (ConvNet(), Dropped(0.0), Dropped(0.5)):
        model.double()
        (graph,) = collected(model, x).graphs
        assert graph.found is not None and graph.plain is not None
        predicted = kept(graph.found, graph.again) + sum(step.internals for step in graph.found.facts.steps)
        assert predicted == kept_bytes(normpass.optimize(model), x)
        assert kept_bytes(model, x) == graph.plain.plain_kept > predicted


def test_returned_values_are_kept_rather_than_made_again() -> None:
    found = problem([(4, True, ()), (4, True, (0,))], saved={1}, outputs={1})
    assert minimum_cut(found) == frozenset()
