"""Memory budgets on whole networks: exact in fp64, kept as asked for, predicted as measured."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import torchvision
from exactness import compare
from memory import image
from nested import map_tensors
from networks import NETWORKS, Network

import normpass
from normpass.budget.planning import plan_graphs
from normpass.collect import captured_graphs
from normpass.measure import kept_bytes, peak_bytes
from normpass.pipeline import Request

pytestmark = pytest.mark.nets

BUDGETS = (0.75, 0.6, 0.5, 0.4)
PREDICTED = (
    "resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_large efficientnet_b0 regnet_y_400mf "
    "mnasnet1_0 shufflenet_v2_x1_0"
).split()
# network -> budgets that must be reached at 2×3×224²
REACHED = {
    "resnet50": (0.5, 0.4),
    "densenet121": (0.22,),
    "efficientnet_b0": (0.33,),
    "mobilenet_v2": (0.34,),
}


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
def test_trains_the_same_within_every_budget(entry: Network, results) -> None:
    inputs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, entry.make_inputs(0))
    worst = 0.0
    graphs = [g for g in captured_graphs(entry.build().double(), (inputs, {}), Request()).graphs if g.keeps_gradients]
    for budget in BUDGETS:
        try:
            found = plan_graphs(graphs, budget)
        except normpass.InfeasibleBudgetError as error:
            results.add("budget_exactness", {"network": entry.name, "budget": budget, "infeasible": str(error)})
            continue
        comparison = compare(entry.build, entry.make_inputs, lambda m, found=found: normpass.optimize(m, plan=found))
        row = {"network": entry.name, "budget": budget, **comparison.row(), "failures": "; ".join(comparison.failures)}
        results.add("budget_exactness", row)
        worst = max(worst, comparison.worst.relative(comparison.worst.difference))
        assert comparison.ok, f"budget {budget}: {comparison}"
    print(f"{entry.name:28} worst {worst:8.1e} of scale")


@pytest.mark.parametrize("name", PREDICTED)
def test_predictions(name: str, results) -> None:
    torch.manual_seed(0)
    plain, x = getattr(torchvision.models, name)(weights=None).train(), image()
    measured = {"plain": (kept_bytes(plain, x), peak_bytes(plain, x))}
    for budget in REACHED.get(name, (0.5,)):
        start = time.perf_counter()
        found = normpass.plan(plain, x, budget)
        seconds = time.perf_counter() - start
        optimized = normpass.optimize(copy.deepcopy(plain), plan=found)
        measured["planned"] = kept_bytes(optimized, x), peak_bytes(optimized, x)
        kept, peak = (measured["planned"][i] / measured["plain"][i] for i in (0, 1))
        row = {"network": name, "budget": budget, "kept": kept, "peak": peak, "planning_seconds": seconds}
        row["predicted_kept"] = found.planned.kept / measured["planned"][0]
        row["predicted_peak"] = found.planned.peak / measured["planned"][1]
        row["predicted_plain_peak"] = found.plain.peak / measured["plain"][1]
        results.add("budget_predictions", row)
        print(name, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)})
        assert kept <= budget
        assert row["predicted_kept"] == pytest.approx(1, abs=0.05)
        assert row["predicted_peak"] == pytest.approx(1, abs=0.1)
        assert row["predicted_plain_peak"] == pytest.approx(1, abs=0.1)
