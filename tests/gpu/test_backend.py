"""torch.compile(backend="normpass") on a GPU: the numbers, and CUDA graphs."""

import copy

import pytest
import torch
from torch import nn

from normpass.backend import compile_graph

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def network():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, 2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
    ]
    return nn.Sequential(*layers, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).cuda()


def train(model, forward, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for step in range(steps):
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step)).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        y = forward(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach().clone())
    return torch.stack(outputs), dict(model.state_dict())


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_trains_the_same(mode):
    def backend(graph_module, example_inputs):  # by its name only where the package is installed
        return compile_graph(graph_module, example_inputs, mode=mode)

    plain = network()
    own = copy.deepcopy(plain)
    torch.compiler.reset()
    found = train(own, torch.compile(own, backend=backend, fullgraph=True))
    torch.testing.assert_close(found, train(plain, plain), rtol=1e-3, atol=1e-4)
