"""Networks, optimised and planned, under torch.compile: one graph, the same numbers, at most 1.12 of eager's bytes."""

import copy
import warnings

import pytest
import torch
import torchvision
from compiled import largest_difference, quietly
from compiled import train as train_fully
from memory import image
from networks import network
from torch._dynamo.utils import counters

import normpass
from normpass.measure import kept_bytes

pytestmark = pytest.mark.nets
NAMES = (
    "resnet50",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "seresnet50",
)


def train(model, forward, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for step in range(2):
        torch.manual_seed(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while it compiles
            y = forward(*(x.double() for x in inputs(step)))
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name, results):
    entry = network(name)
    plain = entry.build().double()
    optimised = normpass.optimize(copy.deepcopy(plain))
    torch.compiler.reset()
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    expected = train(plain, plain, entry.make_inputs)
    actual = train(optimised, compiled, entry.make_inputs)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))
    after, before = optimised.state_dict(), plain.state_dict()
    for key in before:
        scale = max(float(before[key].double().abs().max()), 1e-3)
        worst = max(worst, float((after[key].double() - before[key].double()).abs().max()) / scale)
    x = entry.make_inputs(0)[0].double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = {"eager": kept_bytes(optimised, x), "compiled": kept_bytes(compiled, x)}
    results.add("compile", {"network": name, "largest relative difference": worst, "kept": kept})
    print(f"{name:24} difference {worst:.1e}  kept {kept['compiled'] / kept['eager']:.3f} of eager's")
    assert worst < 1e-9
    assert kept["compiled"] <= 1.12 * kept["eager"]


# network -> budgets, an easy one and a tight one
PLANNED = {
    "resnet50": (0.5, 0.3),
    "densenet121": (0.5, 0.22),
    "mobilenet_v2": (0.5, 0.34),
    "efficientnet_b0": (0.5, 0.33),
}
CASES = [(name, budget) for name, budgets in PLANNED.items() for budget in budgets]
WITH_INDUCTOR = [(name, budgets[-1], "inductor") for name, budgets in PLANNED.items()]


@pytest.mark.parametrize("name, budget", CASES)
def test_a_planned_network_trains_the_same(name, budget, results):
    entry = network(name)
    plain = entry.build().double().train()
    x = entry.make_inputs(0)[0].double()
    optimised = normpass.optimize(copy.deepcopy(plain), x, memory_budget=budget)
    torch.compiler.reset()
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    before = counters["stats"]["unique_graphs"]

    def inputs(step):
        return tuple(t.double() for t in entry.make_inputs(step))

    found = train_fully(optimised, compiled, inputs, torch.float64)
    worst = largest_difference(found, train_fully(plain, plain, inputs, torch.float64))
    graphs = counters["stats"]["unique_graphs"] - before
    results.add("compile_planned", {"network": name, "budget": budget, "difference": worst, "graphs": graphs})
    print(f"{name:24} budget {budget}: difference {worst:.1e}")
    assert worst < 1e-9
    assert graphs == 1


@pytest.mark.parametrize("name, budget, inner", [*((*case, "aot_eager") for case in CASES), *WITH_INDUCTOR])
def test_a_planned_network_keeps_what_was_planned(name, budget, inner, results):
    """At 2×3×224², channels_last; the planned model and the backend with a budget."""
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(weights=None).train().to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last)
    optimised = normpass.optimize(plain, x, memory_budget=budget)
    kept = {"plain": kept_bytes(plain, x), "planned": kept_bytes(optimised, x)}
    torch.compiler.reset()
    kept["compiled"] = quietly(kept_bytes, torch.compile(optimised, backend=inner, fullgraph=True), x)
    torch.compiler.reset()
    options = {"inner": inner, "memory_budget": budget}
    compiled = torch.compile(copy.deepcopy(plain), backend="normpass", options=options, fullgraph=True)
    kept["backend"] = quietly(kept_bytes, compiled, x)
    results.add("compile_planned_kept", {"network": name, "budget": budget, "inner": inner, "kept": kept})
    shares = {key: round(value / kept["plain"], 3) for key, value in kept.items()}
    print(f"{name:24} {inner:9} budget {budget}: {shares}")
    assert kept["compiled"] <= 1.12 * kept["planned"]
    assert kept["backend"] <= 1.02 * budget * kept["plain"]
