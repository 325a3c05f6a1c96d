"""The values that every path to a result passes."""

import torch
import torch.nn.functional as F
from torch import nn

from normpass.analysis.cuts import inputs_of, segments_of, variable_nodes
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.graph.nodes import key_of, path_of
from normpass.serialize.traffic import graph_of


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


class Two(nn.Module):
    """Two inputs that meet, something that no result needs, and a result that is no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aside = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.constant = torch.ones(3)

    def forward(self, x, y):
        self.aside(x)
        return torch.relu(self.a(x) + self.b(y)) * self.constant, {"scale": 2}


class Results(nn.Module):
    """One result on the way to another, and one aside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        h = self.b(self.a(x))
        return self.c(h), h, self.d(h)


def captured(model, *inputs):
    program, values = graph_of(model, *inputs)
    return program.graph, facts_of(program, FakeInputs(values)).results


def named(node):
    return path_of(node) or key_of(node)


def cuts(graph, results):
    return [[named(segment.nodes[-1]) for segment in chain] for chain in segments_of(graph, results)]


def test_cuts_are_the_values_that_everything_passes():
    graph, results = captured(Net(), torch.randn(2, 3, 8, 8))
    chains = segments_of(graph, results)
    assert cuts(graph, results) == [["stem", "pool", "add", "relu", "mean", "head"]]
    assert [key_of(n) for n in chains[0][2].nodes] == ["block_conv1", "block_bn1", "block_conv2", "add"]
    assert chains[0][0].start.op == "placeholder" and chains[0][2].start is chains[0][1].nodes[-1]


def test_several_inputs_meet_in_the_first_cut():
    graph, results = captured(Two(), torch.randn(2, 3), torch.randn(2, 3))
    assert cuts(graph, results) == [["relu", "mul"]] and key_of(segments_of(graph, results)[0][0].start) == "add"
    assert "aside" not in [key_of(node) for node in variable_nodes(graph, results)]


def test_what_modules_hold_is_no_input():
    """Not even what a module reads first, and no attribute that is neither parameter nor buffer."""
    graph, results = captured(Two(), torch.randn(2, 3), torch.randn(2, 3))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(inputs_of(graph, results)) == 2 and len(placeholders) >= 7


def test_each_result_has_a_chain_of_its_own():
    assert cuts(*captured(Results(), torch.randn(2, 3))) == [["a", "b", "c"], ["d"]]


def test_a_graph_without_a_path_has_no_cuts():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.bias * 2

    assert cuts(*captured(Constant(), torch.randn(2, 3))) == []
