"""`changes=("kalman",)`: which norms the estimates reach, and that the model computes the written-down recursion."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from captured import dynamo_graph, dynamo_graphs, targets, with_changes
from timm.layers.drop import drop_path
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

import normpass
from normpass.errors import InvalidInputError
from normpass.graph.nodes import path_of
from normpass.nn import KalmanNorm1d, KalmanNorm2d
from normpass.nn.kalman import KALMAN_NORMS, kalman_norm
from normpass.passes import Kalman, LeakyReLU

P = 0.7


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Chain(nn.Module):
    """Three convolutions in a row."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 6, bias=False), conv(6, 4, groups=2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(4)])

    def forward(self, x):
        for conv_, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv_(x)))
        return x


class Residual(nn.Module):
    """A block whose shortcut is the stem's result, pooled, and a norm behind the sum."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 5, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(5)])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.relu(self.norms[0](self.convs[0](x))))
        y = self.relu(self.norms[1](self.convs[1](x)))
        y = self.norms[2](self.convs[2](y))
        y += x
        return self.norms[3](self.convs[3](self.relu(y)))


class Concat(nn.Module):
    """Two branches of one stem, joined."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 3), conv(4, 2, 1), conv(9, 4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)))
        left = F.relu(self.norms[1](self.convs[1](x)))
        right = F.leaky_relu(self.norms[2](self.convs[2](x)), 0.1)
        return F.relu6(self.norms[3](self.convs[3](torch.cat((left, x, right), 1))))


# --- the recursion, written down once more ----------------------------------------------------------


def relu_moments(mean, var, slope=0.0):
    """Of relu(X) + slope·min(X, 0) by the textbook formulas."""
    sigma = var.sqrt()
    alpha = mean / sigma
    upper = 0.5 * (1 + torch.erf(alpha / math.sqrt(2)))
    density = torch.exp(-0.5 * alpha**2) / math.sqrt(2 * math.pi)
    first = mean * upper + sigma * density
    second = (mean**2 + var) * upper + mean * sigma * density
    low_first, low_second = mean - first, mean**2 + var - second
    first, second = first + slope * low_first, second + slope**2 * low_second
    return first, second - first**2


def conv_moments(layer, mean, var):
    groups = layer.groups
    weight = layer.weight.flatten(2)
    means, variances = [], []
    for index, part in enumerate(weight.chunk(groups)):
        channels = slice(index * part.shape[1], (index + 1) * part.shape[1])
        means.append(part.sum(2) @ mean[channels])
        variances.append(part.square().sum(2) @ var[channels])
    mean, var = torch.cat(means), torch.cat(variances)
    return (mean if layer.bias is None else mean + layer.bias), var


def filtered(norm, x, prediction, p=P):
    """Normalize x with the smoothed statistics; and these."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if prediction is not None:
        before, before_var = prediction
        var = p * before_var + (1 - p) * var + p * (1 - p) * (mean - before) ** 2
        mean = p * before + (1 - p) * mean
    y = (x - mean[:, None, None]) / torch.sqrt(var + norm.eps)[:, None, None]
    return y * norm.weight[:, None, None] + norm.bias[:, None, None], (mean, var)


def chain_recursion(m, x):
    prediction = estimate = None
    for index, (conv_, norm) in enumerate(zip(m.convs, m.norms, strict=True)):
        x = conv_(x)
        if index:
            prediction = conv_moments(conv_, *relu_moments(*estimate))
        x, estimate = filtered(norm, x, prediction)
        x = F.relu(x)
    return x


def residual_recursion(m, x):
    x, stem = filtered(m.norms[0], m.convs[0](x), None)
    x, stem = F.max_pool2d(F.relu(x), 2), relu_moments(*stem)
    y, one = filtered(m.norms[1], m.convs[1](x), conv_moments(m.convs[1], *stem))
    y = F.relu(y)
    y, two = filtered(m.norms[2], m.convs[2](y), conv_moments(m.convs[2], *relu_moments(*one)))
    total = two[0] + stem[0], two[1] + stem[1]
    return filtered(m.norms[3], m.convs[3](F.relu(y + x)), conv_moments(m.convs[3], *relu_moments(*total)))[0]


def clipped_moments(mean, var, high=6.0):
    """Of min(max(X, 0), high), by a fine sum."""
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    weight = torch.exp(-0.5 * t**2)
    values = (mean[:, None] + var.sqrt()[:, None] * t).clamp(0, high)
    first = (values * weight).sum(1) / weight.sum()
    return first, ((values - first[:, None]) ** 2 * weight).sum(1) / weight.sum()


def concat_recursion(m, x):
    x, stem = filtered(m.norms[0], m.convs[0](x), None)
    x, stem = F.relu(x), relu_moments(*stem)
    left, a = filtered(m.norms[1], m.convs[1](x), conv_moments(m.convs[1], *stem))
    right, b = filtered(m.norms[2], m.convs[2](x), conv_moments(m.convs[2], *stem))
    left, a, right, b = F.relu(left), relu_moments(*a), F.leaky_relu(right, 0.1), relu_moments(*b, 0.1)
    joined = torch.cat((a[0], stem[0], b[0])), torch.cat((a[1], stem[1], b[1]))
    z, _ = filtered(m.norms[3], m.convs[3](torch.cat((left, x, right), 1)), conv_moments(m.convs[3], *joined))
    return F.relu6(z)


RECURSIONS = [(Chain, chain_recursion), (Residual, residual_recursion), (Concat, concat_recursion)]


def prepared(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model, torch.randn(4, 3, 8, 8, dtype=torch.float64)


def gradients(model, x, function):
    x = x.detach().requires_grad_()
    y = function(model, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return y, torch.autograd.grad(y, [x, *(p for p in model.parameters())], cotangent)


def assert_computes(model, x, recursion, change):
    """The changed graph by itself, and the optimized model: outputs and every gradient."""
    expected, expected_grads = gradients(model, x, recursion)
    changed, run = with_changes(model, change)
    optimized = normpass.optimize(model, changes=(change,))
    for other, function in ((changed, lambda m, x: run(x)), (optimized, lambda m, x: m(x))):
        found, grads = gradients(other, x, function)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for a, b in zip(optimized.buffers(), changed.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, recursion", RECURSIONS, ids=[k.__name__ for k, _ in RECURSIONS])
def test_computes_the_recursion(kind, recursion):
    model, x = prepared(kind)
    assert_computes(model, x, recursion, Kalman(prediction_weight=P))
    optimized = normpass.optimize(model, changes=(Kalman(prediction_weight=P),))
    assert all(type(norm) is KalmanNorm2d for norm in optimized.norms)


def test_running_averages_of_the_recursion():
    """Of the smoothed statistics, where the batch's part of the variance alone is corrected by m/(m − 1)."""
    model, x = prepared(Chain)
    changed, run = with_changes(model, Kalman(prediction_weight=P))
    run(x)
    before = None
    for index, (conv_, norm) in enumerate(zip(changed.convs, changed.norms, strict=True)):
        x = conv_(x)
        prediction = conv_moments(conv_, *relu_moments(*before)) if index else None
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1)
        if prediction is not None:
            var = P * prediction[1] + (1 - P) * var + P * (1 - P) * (mean - prediction[0]) ** 2
            mean = P * prediction[0] + (1 - P) * mean
        torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var, rtol=0, atol=1e-12)
        assert norm.num_batches_tracked == 1
        x, before = filtered(norm, x, prediction)
        x = F.relu(x)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [k for k, _ in RECURSIONS])
def test_gradcheck_through_the_statistics(kind, micro_batches):
    model, x = prepared(kind)
    changes = (Kalman(prediction_weight=P, learn_weight=True, micro_batches=micro_batches),)
    optimized = normpass.optimize(model, changes=changes)
    x = x[:, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(optimized, x, eps=1e-6, atol=1e-5, fast_mode=True)
    names = ("norms.1.weight_logit", "norms.1.weight", "norms.0.weight", "convs.1.weight")
    parameters = dict(optimized.named_parameters())
    for name in names:
        check_directional_derivative(optimized, x.detach(), parameters[name])


def check_directional_derivative(model, x, parameter, h=1e-6):
    """Against central differences along the gradient itself."""
    cotangent = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss():
        return (model(x) * cotangent).sum()

    (grad,) = torch.autograd.grad(loss(), parameter)
    direction = grad / grad.norm()
    with torch.no_grad():
        start = parameter.clone()
        values = []
        for sign in (1, -1):
            parameter.copy_(start + sign * h * direction)
            values.append(loss())
        parameter.copy_(start)
    slope = (values[0] - values[1]) / (2 * h)
    assert slope == pytest.approx(float(grad.norm()), rel=1e-5)


def test_weight_zero_is_the_ordinary_optimized_batch_norm():
    model, x = prepared(Residual)
    optimized = normpass.optimize(model, changes=(Kalman(prediction_weight=0.0),))
    ordinary = normpass.optimize(copy.deepcopy(model))
    assert not any(isinstance(m, KALMAN_NORMS) for m in optimized.modules())
    for step in range(2):
        assert torch.equal(optimized(x + step), ordinary(x + step))
    for a, b in zip(optimized.buffers(), ordinary.buffers(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_of_weight_zero_are_batch_norms_of_the_parts():
    model, x = prepared(Chain)
    optimized = normpass.optimize(model, changes=(Kalman(prediction_weight=0.0, micro_batches=2),))
    expected = torch.cat([copy.deepcopy(model)(part) for part in x.chunk(2)])
    torch.testing.assert_close(optimized(x), expected, rtol=0, atol=1e-12)


def test_eval_is_batch_norm_with_the_running_averages():
    model, x = prepared(Residual)
    optimized = normpass.optimize(model, changes=("kalman",))
    for step in range(3):
        optimized(x + step)
    plain = normpass.restore(optimized).eval()
    assert [type(m) for m in plain.norms] == [nn.BatchNorm2d] * 4
    assert list(plain.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(optimized.eval()(x), plain(x), rtol=0, atol=1e-13)
    assert plain.norms[1].weight is optimized.norms[1].weight


def test_the_state_behind_the_norm():
    """With `state="output"` the estimate of the first norm arrives as N(bias, weight²·var/(var + eps))."""
    model, x = prepared(Chain)

    def recursion(m, x):
        prediction = estimate = None
        for index, (conv_, norm) in enumerate(zip(m.convs, m.norms, strict=True)):
            x = conv_(x)
            if index:
                before = m.norms[index - 1]
                var = estimate[1] / (estimate[1] + before.eps) * before.weight**2
                prediction = conv_moments(conv_, *relu_moments(before.bias, var))
            x, estimate = filtered(norm, x, prediction)
            x = F.relu(x)
        return x

    assert_computes(model, x, recursion, Kalman(prediction_weight=P, state="output"))


def test_sampled_approaches_the_closed_form():
    """One step of training by draws: outputs lie around those of the closed form, and are reproducible."""
    model, x = prepared(Chain)
    exact = with_changes(model, Kalman(prediction_weight=0.3))[1](x)
    _, sampled = with_changes(model, Kalman(prediction_weight=0.3, transition="sampled"))
    draws = []
    for seed in range(40):
        torch.manual_seed(seed)
        draws.append(sampled(x).detach())
    torch.manual_seed(0)
    assert torch.equal(sampled(x), draws[0]) and not torch.equal(draws[0], draws[1])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact).abs().mean()
    assert error < 3 * draws.std(0).mean() / 40**0.5 + 0.01
    assert draws.std(0).mean() < 0.1


# --- where estimates go -----------------------------------------------------------------------------


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


# --- living with it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k, _ in RECURSIONS])
def test_it_keeps_about_as_little_as_the_optimized_batch_norm(kind):
    model, x = prepared(kind)
    x = torch.randn(4, 3, 32, 32)
    plain, ordinary = (normpass.measure.kept_bytes(m, x) for m in (model.float(), normpass.optimize(model)))
    kalman = normpass.measure.kept_bytes(normpass.optimize(model, changes=("kalman",)), x)
    assert kalman < 1.1 * ordinary < 0.8 * plain


def test_the_given_model_is_untouched_and_state_goes_round():
    model, x = prepared(Residual)
    before = copy.deepcopy(model.state_dict())
    optimized = normpass.optimize(model, changes=(Kalman(learn_weight=True),))
    assert type(model.norms[1]) is nn.BatchNorm2d and list(model.state_dict()) == list(before)
    for key, value in model.state_dict(keep_vars=True).items():
        assert optimized.state_dict(keep_vars=True)[key] is value
    other = normpass.optimize(prepared(Residual, seed=5)[0], changes=(Kalman(learn_weight=True),))
    with torch.no_grad():
        optimized.norms[2].weight_logit.fill_(0.3)
    other.load_state_dict(optimized.state_dict())
    assert torch.equal(other(x), optimized(x))


def test_copies_and_pickles_train_on_alike(tmp_path):
    model, x = prepared(Residual)
    optimized = normpass.optimize(model, changes=(Kalman(learn_weight=True),))
    with torch.no_grad():
        optimized.norms[1].weight_logit.fill_(0.3)
    torch.save(optimized, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    copied = copy.deepcopy(optimized)
    expected = optimized(x)
    for other in (loaded, copied):
        assert torch.equal(other(x), expected)
        assert type(normpass.restore(other).norms[1]) is nn.BatchNorm2d


def test_under_checkpoint():
    model, x = prepared(Residual)
    x.requires_grad_()
    a = normpass.optimize(model, changes=("kalman",))
    b = normpass.optimize(copy.deepcopy(model), changes=("kalman",))
    plain = torch.autograd.grad(a(x).square().sum(), [x, *a.parameters()])
    again = torch.autograd.grad(checkpoint(b, x, use_reentrant=False).square().sum(), [x, *b.parameters()])
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_its_graphs_compile(compiler):
    model, x = prepared(Residual)
    change = Kalman(prediction_weight=P, learn_weight=True)
    plain, run_plainly = with_changes(model, change)
    expected = [step(plain, lambda n=n: run_plainly(x + n)) for n in range(2)]
    compiled, run = with_changes(model, change, compiler=compiler)
    found = [step(compiled, lambda n=n: run(x + n)) for n in range(2)]
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    torch.compiler.reset()


def step(model, run):
    """The output, every gradient that there is and the buffers."""
    model.zero_grad()
    y = run()
    y.square().sum().backward()
    numbers = [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
    return [t.clone() for t in numbers]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_weight": -0.1}, "`prediction_weight` must be in"),
        ({"transition": "exact"}, '`transition` must be "closed_form" or "sampled", it is "exact"'),
        ({"state": "both"}, '`state` must be "input" or "output", it is "both"'),
        ({"prediction_weight": "1"}, "`prediction_weight` must be a number, it is '1'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Kalman(**options)
