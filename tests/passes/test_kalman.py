"""`changes=("kalman",)`: which norms the estimates reach, and that the model computes the written-down recursion."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normpass
from normpass.nn import KalmanNorm1d, KalmanNorm2d
from normpass.nn.kalman import KALMAN_NORMS
from normpass.passes import Kalman

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
    """Normalise x with the smoothed statistics; and these."""
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


@pytest.mark.parametrize("kind, recursion", RECURSIONS, ids=[k.__name__ for k, _ in RECURSIONS])
def test_computes_the_recursion(kind, recursion):
    model, x = prepared(kind)
    optimised = normpass.optimize(model, changes=(Kalman(prediction_weight=P),))
    expected, expected_grads = gradients(model, x, recursion)
    found, grads = gradients(optimised, x, lambda m, x: m(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert type(optimised.norms[0]) is nn.BatchNorm2d  # the first of the chain
    assert all(type(norm) is KalmanNorm2d for norm in optimised.norms[1:])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", [k for k, _ in RECURSIONS])
def test_gradcheck_through_the_statistics(kind, micro_batches):
    model, x = prepared(kind)
    changes = (Kalman(prediction_weight=P, learn_weight=True, micro_batches=micro_batches),)
    optimised = normpass.optimize(model, changes=changes)
    x = x[:, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(optimised, x, eps=1e-6, atol=1e-5, fast_mode=True)
    names = ("norms.1.weight_logit", "norms.1.weight", "norms.0.weight", "convs.1.weight")
    parameters = dict(optimised.named_parameters())
    for name in names:
        check_directional_derivative(optimised, x.detach(), parameters[name])


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


def test_weight_zero_is_the_ordinary_optimised_batch_norm():
    model, x = prepared(Residual)
    optimised = normpass.optimize(model, changes=(Kalman(prediction_weight=0.0),))
    ordinary = normpass.optimize(copy.deepcopy(model))
    assert not any(isinstance(m, KALMAN_NORMS) for m in optimised.modules())
    for step in range(2):
        assert torch.equal(optimised(x + step), ordinary(x + step))
    for a, b in zip(optimised.buffers(), ordinary.buffers(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_of_weight_zero_are_batch_norms_of_the_parts():
    model, x = prepared(Chain)
    optimised = normpass.optimize(model, changes=(Kalman(prediction_weight=0.0, micro_batches=2),))
    expected = torch.cat([copy.deepcopy(model)(part) for part in x.chunk(2)])
    torch.testing.assert_close(optimised(x), expected, rtol=0, atol=1e-12)


def test_eval_is_batch_norm_with_the_running_averages():
    model, x = prepared(Residual)
    optimised = normpass.optimize(model, changes=("kalman",))
    for step in range(3):
        optimised(x + step)
    plain = normpass.restore(optimised).eval()
    assert [type(m) for m in plain.norms] == [nn.BatchNorm2d] * 4
    assert list(plain.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(optimised.eval()(x), plain(x), rtol=0, atol=1e-13)
    assert plain.norms[1].weight is optimised.norms[1].weight


def test_the_state_behind_the_norm():
    """With `state="output"` the estimate of the first norm arrives as N(bias, weight²·var/(var + eps))."""
    model, x = prepared(Chain)
    optimised = normpass.optimize(model, changes=(Kalman(prediction_weight=P, state="output"),))

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

    expected, expected_grads = gradients(model, x, recursion)
    found, grads = gradients(optimised, x, lambda m, x: m(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_sampled_approaches_the_closed_form():
    """One step of training by draws: outputs lie around those of the closed form, and are reproducible."""
    model, x = prepared(Chain)
    exact = normpass.optimize(copy.deepcopy(model), changes=(Kalman(prediction_weight=0.3),))(x)
    sampled = normpass.optimize(model, changes=(Kalman(prediction_weight=0.3, transition="sampled"),))
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


def kalman_paths(model):
    optimised = normpass.optimize(model, changes=("kalman",))
    return sorted(path for path, m in optimised.named_modules() if isinstance(m, KALMAN_NORMS))


def test_resnet_every_norm_but_the_first():
    from torchvision.models import resnet18

    model = resnet18(num_classes=4)
    norms = sorted(path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert kalman_paths(model) == [path for path in norms if path != "bn1"]


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
}
STOPPING = {
    "a gate": lambda m, z: z * m.gate(z).sigmoid(),
    "a sum with something unknown": lambda m, z: z + z.exp(),
    "some of the channels": lambda m, z: z[:, :2],
    "twice itself": lambda m, z: z + z,
    "an unknown function": lambda m, z: z.exp(),
}
CHANNELS = {"a concatenation": 8, "channels of zeros": 8, "some of the channels": 2}


@pytest.mark.parametrize("what", PASSING)
def test_estimates_pass(what):
    model = Loose(PASSING[what], CHANNELS.get(what, 4))
    assert kalman_paths(model) == ["bn"]
    optimised = normpass.optimize(model, changes=("kalman",))
    optimised(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in optimised.named_parameters() if "gate" not in n
    )


@pytest.mark.parametrize("what", STOPPING)
def test_estimates_stop(what):
    assert kalman_paths(Loose(STOPPING[what], CHANNELS.get(what, 4))) == []


def test_through_global_pooling_to_a_linear_layer():
    for between in (lambda m, z: z.mean((2, 3)), lambda m, z: torch.flatten(F.adaptive_avg_pool2d(z, 1), 1)):
        model = Loose(between, last=nn.Linear(4, 4))
        optimised = normpass.optimize(model, changes=("kalman",))
        assert type(optimised.bn) is KalmanNorm1d
        assert optimised(torch.randn(4, 3, 8, 8)).isfinite().all()


def test_norms_with_hooks_or_called_twice_are_left_alone():
    model = prepared(Chain)[0]
    model.norms[1].register_forward_hook(lambda *_: None)
    assert kalman_paths(model) == []  # nothing reaches the third norm, whose predecessor is unknown

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))

    assert kalman_paths(Twice()) == []


def test_every_norm_is_reported():
    report = normpass.explain(prepared(Chain)[0], changes=("kalman",))
    assert [row.path for row in report.rows] == ["norms.0", "norms.1", "norms.2"]
    assert "passed on to Kalman norms" in report.rows[0].reason
    assert "come from the norm before it too" in report.rows[1].reason


# --- living with it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k, _ in RECURSIONS])
def test_it_keeps_about_as_little_as_the_optimised_batch_norm(kind):
    model, x = prepared(kind)
    x = torch.randn(4, 3, 32, 32)
    plain, ordinary = (normpass.measure.kept_bytes(m, x) for m in (model.float(), normpass.optimize(model)))
    kalman = normpass.measure.kept_bytes(normpass.optimize(model, changes=("kalman",)), x)
    assert kalman < 1.1 * ordinary < 0.8 * plain


def test_the_given_model_is_untouched_and_state_goes_round():
    model, x = prepared(Residual)
    before = copy.deepcopy(model.state_dict())
    optimised = normpass.optimize(model, changes=(Kalman(learn_weight=True),))
    assert type(model.norms[1]) is nn.BatchNorm2d and list(model.state_dict()) == list(before)
    for key, value in model.state_dict(keep_vars=True).items():
        assert optimised.state_dict(keep_vars=True)[key] is value
    other = normpass.optimize(prepared(Residual, seed=5)[0], changes=(Kalman(learn_weight=True),))
    with torch.no_grad():
        optimised.norms[2].weight_logit.fill_(0.3)
    other.load_state_dict(optimised.state_dict())
    assert torch.equal(other(x), optimised(x))


def test_copies_and_pickles_train_on_alike(tmp_path):
    model, x = prepared(Residual)
    optimised = normpass.optimize(model, changes=(Kalman(learn_weight=True),))
    with torch.no_grad():
        optimised.norms[1].weight_logit.fill_(0.3)
    torch.save(optimised, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    copied = copy.deepcopy(optimised)
    expected = optimised(x)
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
def test_compiles_whole():
    model, x = prepared(Residual)
    optimised = normpass.optimize(model, changes=(Kalman(learn_weight=True),))
    eager = copy.deepcopy(optimised)
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    for step in range(2):
        for m in (eager, optimised):
            m.zero_grad()
        expected, found = eager(x + step), compiled(x + step)
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        for a, b in zip(eager.parameters(), optimised.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-9)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_weight": -0.1}, "`prediction_weight` must be in"),
        ({"transition": "exact"}, '`transition` must be "closed_form" or "sampled", it is "exact"'),
        ({"state": "both"}, '`state` must be "input" or "output", it is "both"'),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Kalman(**options)
