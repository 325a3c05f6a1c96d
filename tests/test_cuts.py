"""Shapes without memory, and the values that every path passes."""

import torch
import torch.nn.functional as F
from torch import nn

from normpass.capture import capture, required_arguments
from normpass.cuts import cuts_of, shapes_of, variable_nodes


class Net(nn.Module):
    """A stem, a residual block with a norm, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
        self.block_conv1, self.block_bn1 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.block_conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.pool(self.stem(x))
        h = F.relu(h + self.block_conv2(self.block_bn1(self.block_conv1(h))))
        return self.head(h.mean((2, 3)))


def test_cuts_are_the_values_that_everything_passes():
    model = Net()
    graph = capture(model, required_arguments(model)).graph
    names = [node.name for node in cuts_of(graph)]
    assert names[0] == "x" and names[-1] == "head"
    assert "pool" in names and "block_bn1" not in names and "block_conv2" not in names


def test_shapes_take_no_memory_and_change_nothing():
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    captured = capture(model, required_arguments(model))
    shapes = shapes_of(captured.graph, model, [torch.empty(100000, 3, 512, 512, device="meta")])
    values = {node.name: value for node, value in shapes.items()}
    assert values["block_conv2"].shape == (100000, 8, 256, 256)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_several_inputs_meet_in_the_first_cut():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aside = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, y):
            self.aside(x)
            return torch.relu(self.a(x) + self.b(y)), {"scale": 2}

    model = Two()
    graph = capture(model, required_arguments(model)).graph
    assert [node.name for node in cuts_of(graph)] == ["add", "relu"]
    assert "aside" not in [node.name for node in variable_nodes(graph)]


def test_a_graph_without_a_path_has_no_cuts():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.bias

    model = Constant()
    assert cuts_of(capture(model, required_arguments(model)).graph) == []
