"""`changes=("leaky_relu",)` on captured graphs: every spelling of a ReLU, and what stays one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captured import dynamo_graph, targets, with_changes
from torch import nn

import normpass
from normpass.passes import LeakyReLU

SLOPE = 0.2
SPELLINGS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu in place": lambda x: F.relu(x, True),
    "F.relu in place by name": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu_": lambda x: torch.relu_(x),
    "the method": lambda x: x.relu(),
    "the method in place": lambda x: x.relu_(),
    "by name": lambda x: F.relu(input=x),
}


class Net(nn.Module):
    """The ReLU's input is read afterwards as well, so that it matters whether it was in place."""

    def __init__(self, relu):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), relu

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + 2 * y


def values():
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_function_is_replaced(spelling):
    torch.manual_seed(0)
    model, x = Net(SPELLINGS[spelling]).double(), values()
    changed, run = with_changes(model, LeakyReLU(SLOPE))
    in_place = "in place" in spelling or spelling.endswith("_")
    y = model.conv(x)
    z = F.leaky_relu(y, SLOPE)
    expected = z + 2 * (z if in_place else y)
    for other, found in ((changed, run(x)), (model, None)):
        if found is None:
            other = normpass.optimize(model, changes=(LeakyReLU(SLOPE),))
            found = other(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        (grad,) = torch.autograd.grad(found.square().sum(), [other.conv.weight])
        (plain,) = torch.autograd.grad(expected.square().sum(), [model.conv.weight], retain_graph=True)
        torch.testing.assert_close(grad, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("in_place", [True, False])
def test_layers_are_replaced(in_place):
    model, x = Net(nn.ReLU(in_place)).double(), values()
    changed, run = with_changes(model, LeakyReLU(SLOPE))
    assert type(changed.relu) is nn.LeakyReLU and changed.relu.inplace == in_place
    assert type(model.relu) is nn.ReLU
    assert torch.equal(run(x), changed(x)) and not torch.equal(run(x), model(x))


def test_a_layer_with_a_hook_keeps_it():
    model, x, seen = Net(nn.ReLU()).double(), values(), []
    model.relu.register_forward_hook(lambda module, args, result: seen.append(1))
    changed, run = with_changes(model, LeakyReLU(SLOPE))
    assert type(changed.relu) is nn.ReLU
    y = model.conv(x)
    torch.testing.assert_close(run(x), F.leaky_relu(y, SLOPE) + 2 * y, rtol=0, atol=1e-13)
    assert len(seen) == 1


def test_other_activations_stay():
    model = Net(lambda x: F.relu6(x) + F.elu(x) + F.leaky_relu(x, 0.3))
    graph = dynamo_graph(model.double(), values())
    before = copy.copy(targets(graph))
    LeakyReLU().change_graph(graph)
    assert targets(graph) == before
