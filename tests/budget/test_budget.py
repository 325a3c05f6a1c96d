"""A memory budget: what is predicted is what is measured, it is kept, and the model trains as before."""

import copy
import functools
import json
import pickle
from collections.abc import Callable

import pytest
import small
import torch
import torch.nn.functional as F
from exactness import compare
from networks import NETWORKS
from torch import nn
from training import captures_of

import normpass
from normpass.budget import tune
from normpass.budget.planning import plan_graphs
from normpass.budget.step_plan import parse_budget
from normpass.collect import captured_graphs
from normpass.measure import kept_bytes, peak_bytes
from normpass.optimized import state_of
from normpass.pipeline import Request


class Residual(nn.Module):
    """Two bottleneck blocks with a shortcut, behind a stem with a max pool; a dropout before the classifier."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))
        self.first = self._block(width, width)
        self.second = self._block(4 * width, width)
        self.third = self._block(4 * width, width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * width, 5)

    @staticmethod
    def _block(inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.first(x) + self.shortcut(x))
        x = torch.relu(self.second(x) + x)
        x = torch.relu(self.third(x) + x)
        return self.head(self.dropout(x).mean((2, 3)))


X = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double().train()


@functools.cache
def graphs() -> list:
    """Those of one forward; plans for any budget are made of them."""
    return captured_graphs(model(), ((X,), {}), Request()).graphs


@functools.cache
def planned(budget: float | str) -> normpass.StepPlan:
    return plan_graphs(graphs(), budget)


def train_with(build: Callable[[], nn.Module], plan: normpass.StepPlan, inputs: Callable[[int], tuple]) -> None:
    """What `plan` predicts to be kept is measured, and the model trains as the plain one."""

    def optimize(given: nn.Module) -> nn.Module:
        double = [t.double() for t in inputs(0)]
        optimized = normpass.optimize(given, plan=plan)
        assert plan.plain.kept == kept_bytes(given, *double)
        assert plan.planned.kept == kept_bytes(optimized, *double)
        if build is model:  # others are so small that what convolutions take for a moment is most of the peak
            for predicted, measured in ((plan.plain, given), (plan.planned, optimized)):
                assert predicted.peak == pytest.approx(peak_bytes(measured, *double), rel=0.1)
        return optimized

    result = compare(build, inputs, optimize)
    assert result.ok, result


@pytest.mark.parametrize("budget", (1.0, 0.6, 0.4, 0.25))
def test_what_is_predicted_is_measured_and_it_trains_as_before(budget):
    plan = planned(budget)
    assert plan.planned.kept <= budget * plan.plain.kept
    train_with(model, plan, lambda step: (X + step,))


def test_a_tighter_budget_takes_more_rebuilding():
    plans = [planned(budget) for budget in (1.0, 0.6, 0.4, 0.25)]
    assert [p.planned.kept for p in plans] == sorted((p.planned.kept for p in plans), reverse=True)
    assert [p.planned.seconds for p in plans] == sorted(p.planned.seconds for p in plans)


def test_indices_of_a_max_pool_are_not_kept_when_that_is_cheap():
    found = planned(0.25)
    assert found.decisions.replayed == {"stem.3"}
    assert any(row.key == "stem.3 (indices)" and row.choice == "replayed" for row in found.rows)


def test_an_infeasible_budget_names_the_smallest_one():
    with pytest.raises(normpass.InfeasibleBudgetError, match="no plan keeps fewer than .* ask for 0"):
        planned("100B")
    with pytest.raises(normpass.InfeasibleBudgetError) as caught:
        normpass.optimize(model(), X, memory_budget=0.0001)
    smallest = float(str(caught.value).rpartition("ask for ")[2].partition(" ")[0])
    assert planned(smallest).planned.kept <= smallest * planned(smallest).plain.kept


@pytest.mark.parametrize(
    "budget, expected",
    [(0.5, 500), (1, 1000), ("2KB", 2000), ("1.5 KiB", 1536), ("12GB", 12 * 10**9), ("3 mib", 3 * 2**20), ("7B", 7)],
)
def test_budgets(budget, expected):
    assert parse_budget(budget, 1000) == expected


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, True, "half", "12", "12 XB", "", None, [0.5]])
def test_what_is_no_budget(budget):
    with pytest.raises(normpass.InvalidInputError, match="memory_budget"):
        parse_budget(budget, 1000)


def test_a_budget_needs_inputs():
    with pytest.raises(normpass.InvalidInputError, match="needs `example_inputs`"):
        normpass.optimize(model(), memory_budget=0.5)


def test_a_plan_goes_through_a_file(tmp_path):
    found = planned(0.25)
    found.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert normpass.StepPlan.from_json(data).decisions == found.decisions
    for form in (found, data, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert state_of(normpass.optimize(model(), plan=form)).request.decisions == found.decisions
    text = str(found)
    assert "plan for a budget of 0.25" in text and "planned: kept" in text and "stem.3 (indices): replayed" in text


def test_a_plan_may_be_edited():
    data = planned(0.4).to_json()
    data["decisions"]["rewrites"]["stem.1"] = None
    optimized = normpass.optimize(model(), plan=data)
    found = captures_of(optimized)
    optimized(X)
    (stem,) = (choice for choice in found[0].choices if choice.site.path == "stem.1")
    assert stem.match is None
    assert all(choice.match is not None for choice in found[0].choices if choice is not stem)


@pytest.mark.parametrize(
    "plan, message",
    [
        ("missing.json", "cannot be read as JSON"),
        ({"version": 1, "decisions": {}}, "is not a plan of version 2"),
        ([1, 2], "`plan` must be an object"),
        ({"version": 2, "decisions": {"rebiult": []}}, "`rebiult` is not known"),
        ({"version": 2, "decisions": {"rebuilt": ["no.such.layer"]}}, "names what is not in this Residual: no.such"),
    ],
)
def test_what_is_no_plan(plan, message):
    with pytest.raises(normpass.InvalidInputError, match=message):
        normpass.optimize(model(), plan=plan)


def test_with_inputs_a_plan_is_compared_with_the_graph():
    plan = {"version": 2, "decisions": {"rebuilt": ["first.6", "second.iadd"]}}
    with pytest.raises(normpass.InvalidInputError, match="names what is not in this Residual: second.iadd"):
        normpass.optimize(model(), X, plan=plan)


def test_a_plan_and_a_budget_exclude_each_other():
    with pytest.raises(normpass.InvalidInputError, match="either `plan` or `memory_budget`"):
        normpass.optimize(model(), X, memory_budget=0.5, plan={"version": 2, "decisions": {}})


def test_copies_and_pickles_keep_their_plan():
    optimized = normpass.optimize(model(), X, memory_budget=0.4)
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert state_of(other).request.decisions == planned(0.4).decisions
    assert kept_bytes(other, X) == planned(0.4).planned.kept


def test_planning_leaves_the_model_and_the_generator_alone():
    plain = model()
    before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    identities = [id(t) for t in (*plain.parameters(), *plain.buffers())]
    assert normpass.plan(plain, X, 0.5).decisions == planned(0.5).decisions
    assert identities == [id(t) for t in (*plain.parameters(), *plain.buffers())]
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and plain.training


def test_a_cumulative_average_can_be_planned():
    plain = model()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    assert normpass.plan(plain, X, 0.5).planned.kept <= 0.5 * kept_bytes(plain, X)


def test_a_model_of_several_graphs_can_be_planned():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = model(), nn.Linear(5, 2).double()

        def forward(self, x):
            y = self.inner(x)
            if y.sum() > 1e9:  # here the graph breaks
                return y
            return self.head(y).sin()

    plain = Outer()
    found = normpass.plan(plain, X, 0.4)
    assert any(key.startswith("inner.") for key in found.decisions.keys)
    assert found.planned.kept <= 0.4 * kept_bytes(plain, X)
    optimized = normpass.optimize(plain, plan=found)
    assert kept_bytes(optimized, X) == found.planned.kept - 1  # the boolean that decides is not kept
    assert plain.inner.stem[1].num_batches_tracked == 0


class OtherNamesInEval(nn.Module):
    """Its first pooling in train mode is another one than its first in eval mode, and not one that is rebuilt."""

    def __init__(self):
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.main = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        side = self.side(F.avg_pool2d(x, 2)).mean() if self.training else 0
        return self.head(F.avg_pool2d(self.main(x), 3, 1, 1)).mean((2, 3)) + side


def test_a_plan_is_for_the_names_of_train_mode():
    x = X.float()
    plain = OtherNamesInEval().eval()
    found = normpass.plan(plain, x, "280KB")
    assert "avg_pool2d" in found.decisions.rebuilt
    assert kept_bytes(normpass.optimize(plain, plan=found).train(), x) == found.planned.kept


def test_tuning_measures_once_and_remembers(tmp_path, monkeypatch):
    calls = []
    shortest = tune._shortest
    monkeypatch.setattr(tune, "_shortest", lambda *given: calls.append(given) or shortest(*given))
    monkeypatch.setattr(tune, "cache_folder", lambda: tmp_path)
    plain, x = nn.Sequential(*(small.conv_norm(n, 4, act) for n, act in ((3, None), (4, nn.SiLU())))), X.float()
    plain.append(nn.Conv2d(4, 2, 1))
    first = normpass.plan(plain, x, 0.4, tune=True)
    measured = len(calls)
    second = normpass.plan(plain, x, 0.4, tune=True)
    assert measured == 4 and len(calls) == measured  # two convolutions, and two norms with their activations
    assert first.decisions == second.decisions and first.planned.kept <= 0.4 * first.plain.kept
    (file,) = tmp_path.iterdir()
    assert len(tune._read(file)) == 4 and all(seconds > 0 for seconds in tune._read(file).values())
    file.write_text("{")
    assert tune._read(file) == {}  # and all is measured anew


@pytest.mark.parametrize("make", [small.grouped, small.UNet, small.PreActivation, small.conv1d, small.conv3d])
def test_odd_networks(make):
    """Concatenations, groups, one and three dimensions: predicted, and exact at half of the bytes."""
    network = next(n for n in NETWORKS if n.make is make)
    (x,) = network.make_inputs(0)
    plan = normpass.plan(network.build().double().train(), x.double(), 0.5)
    assert plan.planned.kept <= 0.5 * plan.plain.kept
    train_with(network.build, plan, network.make_inputs)


def test_a_convolution_is_made_again_under_the_autocast_of_forward():
    """Of a small network every argument is a copy, and backward runs outside of autocast."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    plain = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x, gradients = torch.randn(2, 3, 16, 16), []
    for model in (plain, normpass.optimize(plain, x, memory_budget=0.4)):
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        gradients.append(torch.autograd.grad(z.float().square().sum(), list(model.parameters())))
    largest = max(float(g.abs().max()) for g in gradients[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0.02 * largest)
