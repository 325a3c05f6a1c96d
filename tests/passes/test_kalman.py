"""`changes=("kalman",)` computes the written-down recursion, with its gradients, and lives with what a script does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captured import with_changes
from kalman_recursion import RECURSIONS, Chain, P, Residual, conv_moments, filtered, gradients, prepared, relu_moments
from torch import nn
from torch.utils.checkpoint import checkpoint

import normpass
from normpass.errors import InvalidInputError
from normpass.nn import KalmanNorm2d
from normpass.nn.kalman import KALMAN_NORMS
from normpass.passes import Kalman


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
