"""A memory budget: what is predicted is what is measured, it is kept, and the model trains as before."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from exactness import compare
from nets import small
from networks import NETWORKS
from torch import nn

import normpass
from normpass.measure import kept_bytes, peak_bytes
from normpass.step_plan import parse_budget


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


X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
BUDGETS = (1.0, 0.75, 0.6, 0.5, 0.4, 0.25)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().train()


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_prediction_is_what_is_measured_and_within_the_budget(budget):
    plain = model()
    found = normpass.plan(plain, X, budget)
    optimised = normpass.optimize(plain, plan=found)
    assert found.plain.kept == kept_bytes(plain, X)
    assert found.planned.kept == kept_bytes(optimised, X) <= budget * kept_bytes(plain, X)
    for predicted, measured in ((found.plain, plain), (found.planned, optimised)):
        assert predicted.peak == pytest.approx(peak_bytes(measured, X), rel=0.1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_it_trains_as_before(budget):
    def optimise(given: nn.Module) -> nn.Module:
        return normpass.optimize(given, X.double(), memory_budget=budget)

    result = compare(model, lambda step: (X + step,), optimise)
    assert result.ok, result


def test_recomputed_regions_move_running_statistics_once_and_draw_no_number_again():
    plain, x = model(), X.clone()
    optimised = normpass.optimize(copy.deepcopy(plain), x, memory_budget=0.2)
    for m in (plain, optimised):
        torch.manual_seed(3)
        m(x).sum().backward()
    torch.testing.assert_close(dict(optimised.named_buffers()), dict(plain.named_buffers()))
    assert optimised.stem[1].num_batches_tracked == 1


def test_a_tighter_budget_takes_more_rebuilding():
    plans = [normpass.plan(model(), X, budget) for budget in (0.6, 0.4, 0.25)]
    assert [p.planned.kept for p in plans] == sorted((p.planned.kept for p in plans), reverse=True)
    assert [p.planned.seconds for p in plans] == sorted(p.planned.seconds for p in plans)


def test_indices_of_a_max_pool_are_not_kept_when_that_is_cheap():
    found = normpass.plan(model(), X, 0.4)
    assert found.decisions.replayed == {"stem.3"}
    assert any(row.key == "stem.3 (indices)" and row.choice == "replayed" for row in found.rows)


def test_an_infeasible_budget_names_the_smallest_one():
    with pytest.raises(normpass.InfeasibleBudgetError, match="no plan keeps fewer than .* ask for 0"):
        normpass.optimize(model(), X, memory_budget="100B")
    with pytest.raises(normpass.InfeasibleBudgetError) as caught:
        normpass.optimize(model(), X, memory_budget=0.0001)
    smallest = float(str(caught.value).rpartition("ask for ")[2].partition(" ")[0])
    normpass.optimize(model(), X, memory_budget=smallest)


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
    found = normpass.plan(model(), X, 0.4)
    found.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert normpass.StepPlan.from_json(data).decisions == found.decisions
    kept = {kept_bytes(normpass.optimize(model(), plan=p), X) for p in (found, data, tmp_path / "plan.json")}
    assert kept == {found.planned.kept}
    text = str(found)
    assert "plan for a budget of 0.4" in text and "planned: kept" in text and "stem.3 (indices): replayed" in text


def test_a_plan_may_be_edited():
    data = normpass.plan(model(), X, 0.4).to_json()
    data["decisions"]["rewrites"]["stem.1"] = None
    optimised = normpass.optimize(model(), plan=data)
    row = next(row for row in normpass.explain(optimised).rows if row.path == "stem.1")
    assert row.rewrite is not None  # explain shows what a fresh optimisation does
    assert kept_bytes(optimised, X) > kept_bytes(normpass.optimize(model(), X, memory_budget=0.4), X)


@pytest.mark.parametrize(
    "plan, message",
    [
        ("missing.json", "cannot be read as JSON"),
        ({"version": 0}, "is not a plan of version"),
        ([1, 2], "is not a plan of version"),
        ({"version": 1, "decisions": {"rebiult": []}}, "unknown decisions: rebiult"),
        ({"version": 1, "decisions": {"rebuilt": ["no.such.layer"]}}, "names what is not in this Residual: no.such"),
    ],
)
def test_what_is_no_plan(plan, message):
    with pytest.raises(normpass.InvalidInputError, match=message):
        normpass.optimize(model(), plan=plan)


def test_a_plan_and_a_budget_exclude_each_other():
    with pytest.raises(normpass.InvalidInputError, match="either `plan` or `memory_budget`"):
        normpass.optimize(model(), X, memory_budget=0.5, plan={"version": 1, "decisions": {}})


def test_copies_and_pickles_keep_their_plan():
    optimised = normpass.optimize(model(), X, memory_budget=0.4)
    assert kept_bytes(copy.deepcopy(optimised), X) == kept_bytes(optimised, X)


def test_planning_leaves_the_model_and_the_generator_alone():
    plain = model()
    before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    identities = [id(t) for t in (*plain.parameters(), *plain.buffers())]
    normpass.plan(plain, X, 0.5)
    assert identities == [id(t) for t in (*plain.parameters(), *plain.buffers())]
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and plain.training


def test_a_cumulative_average_can_be_planned():
    plain = model()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    assert normpass.plan(plain, X, 0.5).planned.kept <= 0.5 * kept_bytes(plain, X)


def test_a_model_that_is_traced_in_parts_can_be_planned():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = model(), nn.Linear(5, 2)

        def forward(self, x):
            if x.sum() > float("inf"):  # cannot be traced
                return x
            return self.head(self.inner(x))

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.times = model(), [1]

        def forward(self, x):
            for _ in self.times:
                self.times[0] += 0
                y = self.inner(x)
            return y

    plain = Loop()
    found = normpass.plan(plain, X, 0.4)
    optimised = normpass.optimize(plain, plan=found)
    assert any(key.startswith("inner.") for key in found.decisions.keys)
    assert kept_bytes(optimised, X) == found.planned.kept
    asks_for_values = Outer()  # so it is run for real
    found = normpass.plan(asks_for_values, X, 0.4)
    assert kept_bytes(normpass.optimize(asks_for_values, plan=found), X) == found.planned.kept
    assert asks_for_values.inner.stem[1].num_batches_tracked == 0


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


@pytest.mark.parametrize("training", [True, False])
def test_a_plan_is_for_the_names_of_train_mode(training):
    plain = OtherNamesInEval().train(training)
    found = normpass.plan(plain, X, "280KB")
    assert "avg_pool2d" in found.decisions.rebuilt
    assert kept_bytes(normpass.optimize(plain, plan=found).train(), X) == found.planned.kept


def test_tuning_measures_once_and_remembers(tmp_path, monkeypatch):
    from normpass import tune

    calls = []
    shortest = tune._shortest
    monkeypatch.setattr(tune, "_shortest", lambda *given: calls.append(given) or shortest(*given))
    monkeypatch.setattr(tune, "cache_folder", lambda: tmp_path)
    first = normpass.plan(model(), X, 0.4, tune=True)
    measured = len(calls)
    second = normpass.plan(model(), X, 0.4, tune=True)
    assert measured > 5 and len(calls) == measured
    assert first.decisions == second.decisions and first.planned.kept <= 0.4 * first.plain.kept
    (file,) = tmp_path.iterdir()
    assert all(seconds > 0 for seconds in json.loads(file.read_text()).values())
    file.write_text("{")
    normpass.plan(model(), X, 0.4, tune=True)
    assert len(calls) == 2 * measured


@pytest.mark.parametrize("make", [small.grouped, small.UNet, small.PreActivation, small.conv1d, small.conv3d])
def test_odd_networks(make):
    """Concatenations, groups, one and three dimensions: predicted, and exact at half of the bytes."""
    network = next(n for n in NETWORKS if n.make is make)
    plain, inputs = network.build().train(), network.make_inputs(0)
    found = normpass.plan(plain, inputs, 0.5)
    assert kept_bytes(normpass.optimize(plain, plan=found), *inputs) == found.planned.kept
    result = compare(network.build, network.make_inputs, lambda m: normpass.optimize(m, plan=found))
    assert result.ok, result
