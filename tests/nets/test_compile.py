"""Six optimised networks under torch.compile: one graph, the same numbers, at most 1.12 of eager's kept bytes."""

import copy
import warnings

import pytest
import torch
from networks import network

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
