"""Which norms the estimates of `changes=("kalman",)` reach, and where they stop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from captured import dynamo_graph, dynamo_graphs, targets, with_changes
from kalman_recursion import Chain, P, Residual, chain_recursion, conv, conv_moments, filtered, prepared, relu_moments
from timm.layers.drop import drop_path
from torch import nn
from torchvision.ops import stochastic_depth

import normpass
from normpass.graph.nodes import path_of
from normpass.nn import KalmanNorm1d, KalmanNorm2d
from normpass.nn.kalman import kalman_norm
from normpass.passes import Kalman, LeakyReLU

LEARNED = Kalman(learn_weight=True)


def wired(model, x, change=LEARNED):
    """The graph of `model` in train mode with the estimates, and the paths of the norms that read a prediction."""
    changed = copy.deepcopy(model)
    change.change_modules(changed)
    graph = dynamo_graph(changed, x)
    change.change_graph(graph)
    graph.lint()
    return graph, sorted(path_of(n) for n in graph.nodes if n.target is kalman_norm and n.args[1] is not None)


def test_resnet_every_norm_but_the_first():
    from torchvision.models import resnet18

    model = resnet18(num_classes=4)
    norms = sorted(path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    graph, found = wired(model, torch.randn(2, 3, 64, 64))
    assert found == [path for path in norms if path != "bn1"]
    assert targets(graph).count(kalman_norm) == 20


class Loose(nn.Module):
    """conv → norm → `between` → conv → norm."""

    def __init__(self, between, channels=4, last=None):
        super().__init__()
        self.first, self.norm = conv(3, 4), nn.BatchNorm2d(4)
        self.between = between
        self.gate = nn.Conv2d(4, 4, 1)
        self.last = last if last is not None else conv(channels, 4)
        self.bn = nn.BatchNorm1d(4) if isinstance(last, nn.Linear) else nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.last(self.between(self, F.relu(self.norm(self.first(x))))))


def activated_in_place(z):
    F.silu(z, inplace=True)
    return z


def with_zeros(z):
    z[:, 0] = 0
    return z


def broken(z):
    torch._dynamo.graph_break()
    return z


PASSING = {
    "dropout": lambda m, z: F.dropout(z, 0.1, m.training),
    "pooling": lambda m, z: F.avg_pool2d(z, 2),
    "upsampling": lambda m, z: F.interpolate(z, scale_factor=2),
    "every other position": lambda m, z: z[:, :, ::2, ::2],
    "a border": lambda m, z: F.pad(z, (1, 1, 1, 1)),
    "two activations": lambda m, z: F.silu(z),
    "a sum": lambda m, z: z + m.gate(z),
    "a concatenation": lambda m, z: torch.cat((z, m.gate(z)), 1),
    "channels of zeros": lambda m, z: F.pad(z, (0, 0, 0, 0, 2, 2)),
    "an activation in place": lambda m, z: F.relu_(F.avg_pool2d(z, 1)),
    "in place, by its old name": lambda m, z: activated_in_place(F.avg_pool2d(z, 1)),
    "stochastic depth": lambda m, z: stochastic_depth(z, 0.2, "row"),
    "drop path": lambda m, z: drop_path(z, 0.2, True),
    "a function for a layer": lambda m, z: F.conv2d(z, m.gate.weight),
}
STOPPING = {
    "a gate": lambda m, z: z * m.gate(z).sigmoid(),
    "a sum with something unknown": lambda m, z: z + z.exp(),
    "some of the channels": lambda m, z: z[:, :2],
    "twice itself": lambda m, z: z + z,
    "an unknown function": lambda m, z: z.exp(),
    "an unknown function in place": lambda m, z: (z.exp_(), z)[1],
    "some values set": lambda m, z: with_zeros(z),
    "channels of ones": lambda m, z: F.pad(z, (0, 0, 0, 0, 2, 2), value=1.0),
    "a drop that is not scaled": lambda m, z: z * torch.empty(z.shape[0], 1, 1, 1).bernoulli_(0.8),
    "a break of the graph": lambda m, z: broken(z),
}
CHANNELS = {"a concatenation": 8, "channels of zeros": 8, "channels of ones": 8, "some of the channels": 2}


@pytest.mark.parametrize("what", PASSING)
def test_estimates_pass(what):
    model, x = Loose(PASSING[what], CHANNELS.get(what, 4)), torch.randn(4, 3, 8, 8)
    assert wired(model, x)[1] == ["bn"]
    changed, run = with_changes(model, Kalman())
    run(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in changed.named_parameters() if "gate" not in n)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo, where the graph breaks
@pytest.mark.parametrize("what", STOPPING)
def test_estimates_stop(what):
    model, x = Loose(STOPPING[what], CHANNELS.get(what, 4)).double(), torch.randn(4, 3, 8, 8).double()
    changed, run = with_changes(model, Kalman(learn_weight=True))
    torch.manual_seed(0)
    found = run(x)
    torch.manual_seed(0)
    assert torch.equal(found, model(x))
    for graph in dynamo_graphs(with_changes(model, Kalman())[0], x):
        Kalman().change_graph(graph)
        assert kalman_norm not in targets(graph)


def test_two_dimensions_where_a_channel_is_padded_elsewhere():
    """Four widths pad positions of an image, but channels of a signal."""

    class Signal(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.bn = nn.BatchNorm1d(4), nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(self.conv(F.pad(self.norm(x), (0, 0, 1, 1))))

    model, x = Signal().double(), torch.randn(4, 4, 8, dtype=torch.float64)
    assert wired(model, x)[1] == ["bn"]
    found = with_changes(model, Kalman(prediction_weight=P, largest_ratio=math.inf))[1](x)
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    padded = F.pad(mean, (1, 1)), F.pad(var, (1, 1))
    before, before_var = conv_moments(model.conv, *padded)
    y = model.conv(F.pad(model.norm(x), (0, 0, 1, 1)))
    var, mean = torch.var_mean(y, (0, 2), correction=0)
    var = P * before_var + (1 - P) * var + P * (1 - P) * (mean - before) ** 2
    mean = P * before + (1 - P) * mean
    expected = (y - mean[:, None]) / torch.sqrt(var + 1e-5)[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_through_global_pooling_to_a_linear_layer():
    for between in (lambda m, z: z.mean((2, 3)), lambda m, z: torch.flatten(F.adaptive_avg_pool2d(z, 1), 1)):
        model, x = Loose(between, last=nn.Linear(4, 4)), torch.randn(4, 3, 8, 8)
        assert wired(model, x)[1] == ["bn"]
        changed, run = with_changes(model, Kalman())
        assert type(changed.bn) is KalmanNorm1d
        assert run(x).isfinite().all()


def test_norms_with_hooks_are_left_alone():
    model, x = prepared(Chain)
    model.norms[1].register_forward_hook(lambda *_: None)
    changed, run = with_changes(model, Kalman())
    assert [type(norm) for norm in changed.norms] == [KalmanNorm2d, nn.BatchNorm2d, KalmanNorm2d]
    assert wired(model, x)[1] == []  # nothing reaches the third norm, whose predecessor is unknown
    assert torch.equal(run(x), model(x))


def test_a_norm_that_is_called_twice_is_a_batch_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))

    model, x = Twice(), torch.randn(4, 3, 8, 8)
    graph, found = wired(model, x)
    assert found == [] and targets(graph).count(kalman_norm) == 0 and targets(graph).count(F.batch_norm) == 2
    changed, run = with_changes(model, Kalman())
    assert torch.equal(run(x), model(x))
    for a, b in zip(changed.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("track", [True, False])
def test_a_norm_that_nothing_reaches_is_a_batch_norm(momentum, track):
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, momentum=momentum, track_running_stats=track)).double()
    x = prepared(Chain)[1]
    graph, _ = wired(model, x)
    assert (F.batch_norm in targets(graph)) == (momentum is not None)
    changed, run = with_changes(model, Kalman(learn_weight=True))
    for step in range(2):
        y = run(x + step)
        assert torch.equal(y, model(x + step))
        y.square().sum().backward()
    for a, b in zip(changed.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert changed[1].weight_logit.grad is None and changed[1].weight.grad is not None


def test_eval_graphs_have_batch_norms():
    model, x = prepared(Residual)
    model(x)
    changed, run = with_changes(model.eval(), Kalman())
    graph = dynamo_graph(changed, x)
    before = str(graph)
    Kalman().change_graph(graph)
    assert str(graph) == before and targets(graph).count(F.batch_norm) == 4
    assert torch.equal(run(x), model(x))


def test_norms_placed_by_hand_are_wired_with_their_own_options():
    model, x = prepared(Chain)
    by_hand = copy.deepcopy(model)
    Kalman(prediction_weight=P).change_modules(by_hand)
    _, run = with_changes(by_hand, Kalman(prediction_weight=0.1))
    torch.testing.assert_close(run(x), chain_recursion(model, x), rtol=0, atol=1e-11)


def test_after_another_change():
    model, x = prepared(Chain)
    _, run = with_changes(model, LeakyReLU(0.1), Kalman(prediction_weight=P))

    def recursion(m, x):
        prediction = estimate = None
        for index, (conv_, norm) in enumerate(zip(m.convs, m.norms, strict=True)):
            x = conv_(x)
            if index:
                prediction = conv_moments(conv_, *relu_moments(*estimate, 0.1))
            x, estimate = filtered(norm, x, prediction)
            x = F.leaky_relu(x, 0.1)
        return x

    torch.testing.assert_close(run(x), recursion(model, x), rtol=0, atol=1e-11)


def test_every_norm_is_reported():
    report = normpass.explain(prepared(Chain)[0], prepared(Chain)[1], changes=("kalman",))
    assert [row.path for row in report.rows] == ["norms.0", "norms.1", "norms.2"]
    for row in report.rows:
        assert "come from the norm before it too, or are passed on to Kalman norms" in row.reason
