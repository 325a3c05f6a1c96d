"""The Kalman norm by itself: its formula, its estimate, its running averages, its gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import image as values

from normpass.errors import InvalidInputError
from normpass.nn import Estimate, KalmanNorm1d, KalmanNorm2d, KalmanNorm3d
from normpass.nn.estimate import activated, predicted, predicted_by_sample

LAYERS = [
    (KalmanNorm1d, nn.BatchNorm1d, (6, 4)),
    (KalmanNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (KalmanNorm2d, nn.BatchNorm2d, (6, 4, 3, 2)),
    (KalmanNorm2d, nn.BatchNorm2d, (6, 4, 1, 1)),
    (KalmanNorm3d, nn.BatchNorm3d, (6, 4, 2, 3, 2)),
]


def layer(kind=KalmanNorm2d, channels=4, **options):
    norm = kind(channels, **options).double()
    with torch.no_grad():
        norm.weight.copy_(values(channels, seed=1))
        norm.bias.copy_(values(channels, seed=2))
    return norm


def prediction(parts=1, channels=4, seed=3):
    return Estimate(values(parts, channels, seed=seed), values(parts, channels, seed=seed + 1).square() + 0.1)


def formula(x, norm, p, predicted_mean, predicted_var):
    """The update as it is written down, for one micro-batch."""
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0)
    new_mean = p * predicted_mean + (1 - p) * mean
    new_var = p * predicted_var + (1 - p) * var + p * (1 - p) * (mean - predicted_mean) ** 2
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - new_mean.view(shape)) / torch.sqrt(new_var.view(shape) + norm.eps)
    return y * norm.weight.view(shape) + norm.bias.view(shape), new_mean, new_var


@pytest.mark.parametrize("kind, plain, shape", LAYERS)
def test_formula(kind, plain, shape):
    norm, x, before = layer(kind, prediction_weight=0.7), values(*shape), prediction()
    y, estimate = norm(x, before, True)
    expected, mean, var = formula(x, norm, 0.7, before.mean[0], before.var[0])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate, Estimate(mean[None], var[None]), rtol=0, atol=1e-13)
    assert torch.equal(norm(x, before), y)


@pytest.mark.parametrize("kind, plain, shape", LAYERS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_weight_zero_is_batch_norm_exactly(kind, plain, shape, momentum):
    norm = layer(kind, prediction_weight=0.0, momentum=momentum)
    batch_norm = plain(4, momentum=momentum).double()
    batch_norm.load_state_dict(norm.state_dict())
    for step in range(2):
        x = values(*shape, seed=step)
        assert torch.equal(norm(x, prediction()), batch_norm(x))
        assert_same_buffers(norm, batch_norm, tolerance=0)
    x = values(*shape, seed=9)
    torch.testing.assert_close(norm(x, prediction(), True)[0], batch_norm(x), rtol=0, atol=1e-12)
    assert_same_buffers(norm, batch_norm, tolerance=1e-14)
    torch.testing.assert_close(norm.eval()(x, prediction()), batch_norm.eval()(x), rtol=0, atol=1e-12)


def assert_same_buffers(norm, batch_norm, tolerance):
    for (name, a), (_, b) in zip(norm.named_buffers(), batch_norm.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_without_a_prediction_it_is_batch_norm():
    norm, batch_norm, x = layer(), nn.BatchNorm2d(4).double(), values(6, 4, 3, 2)
    batch_norm.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), batch_norm(x))


@pytest.mark.parametrize("far", [1e4, float("nan"), float("inf")])
def test_a_prediction_far_off_is_not_used(far):
    norm, plain, x = layer(prediction_weight=0.9), layer(prediction_weight=0.0), values(6, 4, 3, 2)
    before = Estimate(prediction().mean, torch.full((1, 4), far, dtype=torch.float64))
    torch.testing.assert_close(norm(x, before, True), plain(x, before, True), rtol=0, atol=1e-14)


def test_every_prediction_is_used_where_the_ratio_may_be_infinite():
    norm, x = layer(prediction_weight=0.9, largest_ratio=float("inf")), values(6, 4, 3, 2)
    before = Estimate(prediction().mean, torch.full((1, 4), 1e4, dtype=torch.float64))
    expected, mean, var = formula(x, norm, 0.9, before.mean[0], before.var[0])
    torch.testing.assert_close(norm(x, before), expected, rtol=0, atol=1e-12)


def test_micro_batches_have_statistics_of_their_own():
    norm, x, before = layer(prediction_weight=0.6, micro_batches=3), values(6, 4, 3, 2), prediction(3)
    y, estimate = norm(x, before, True)
    parts = [formula(part, norm, 0.6, before.mean[i], before.var[i]) for i, part in enumerate(x.split(2))]
    torch.testing.assert_close(y, torch.cat([p[0] for p in parts]), rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate.mean, torch.stack([p[1] for p in parts]), rtol=0, atol=1e-13)
    torch.testing.assert_close(estimate.var, torch.stack([p[2] for p in parts]), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="a batch of 7 does not divide into `micro_batches=3`"):
        norm(values(7, 4, 3, 2), before)


@pytest.mark.parametrize("parts", [1, 3])
def test_running_averages_are_those_of_the_smoothed_statistics(parts):
    norm, x, before = layer(prediction_weight=0.6, micro_batches=parts), values(6, 4, 3, 2), prediction(parts)
    norm(x, before)
    means, variances = [], []
    for i, part in enumerate(x.chunk(parts)):
        _, mean, _ = formula(part, norm, 0.6, before.mean[i], before.var[i])
        var, observed = torch.var_mean(part, [0, 2, 3], correction=1)
        means.append(mean)
        variances.append(0.6 * before.var[i] + 0.4 * var + 0.24 * (observed - before.mean[i]) ** 2)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0), rtol=0, atol=1e-13)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_everything(parts):
    norm = layer(prediction_weight=0.6, learn_weight=True, micro_batches=parts)
    x, before = values(4, 4, 2, 2).requires_grad_(), prediction(parts)
    parameters = dict(norm.named_parameters())

    def run(x, mean, var, *tensors):
        named = dict(zip(parameters, tensors, strict=True))
        y, (new_mean, new_var) = torch.func.functional_call(norm, named, (x, Estimate(mean, var), True))
        return y, new_mean, new_var

    args = (x, before.mean.requires_grad_(), before.var.requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(run, args)


def test_a_learned_weight_starts_where_it_is_told_to():
    fixed, learned = layer(prediction_weight=0.3), layer(prediction_weight=0.3, learn_weight=True)
    x, before = values(6, 4, 3, 2), prediction()
    torch.testing.assert_close(learned(x, before), fixed(x, before), rtol=0, atol=1e-7)
    learned(x, before).square().mul(values(6, 4, 3, 2, seed=8)).sum().backward()
    assert learned.weight_logit.grad.abs() > 0
    assert "weight_logit" in learned.state_dict() and "weight_logit" not in fixed.state_dict()


def test_bfloat16_and_channels_last():
    norm, exact = KalmanNorm2d(4), KalmanNorm2d(4).double()
    x = values(6, 4, 8, 8).to(torch.bfloat16).to(memory_format=torch.channels_last)
    before = prediction()
    y, estimate = norm(x, Estimate(*(v.float() for v in before)), True)
    expected = exact(x.double(), before)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert estimate.mean.dtype == torch.float32
    assert (y - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_weight": 1.5}, r"`prediction_weight` must be in \[0, 1\], it is 1.5"),
        ({"prediction_weight": 0.0, "learn_weight": True}, r"inside \(0, 1\) to be learned"),
        ({"largest_ratio": 0.0}, "`largest_ratio` must be > 0, it is 0.0"),
        ({"micro_batches": 0}, "`micro_batches` must be a whole number from 1, it is 0"),
        ({"prediction_weight": "1"}, "`prediction_weight` must be a number, it is '1'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InvalidInputError, match=message):
        KalmanNorm2d(4, **options)


@pytest.mark.parametrize("track", [True, False])
def test_eval_mode_is_batch_norm_whatever_is_predicted(track):
    options = {"track_running_stats": track}
    norm = layer(micro_batches=2, **options)
    batch_norm, x = nn.BatchNorm2d(4, **options).double(), values(6, 4, 3, 2)
    norm(x, prediction(2))
    batch_norm.load_state_dict(norm.state_dict())
    y, estimate = norm.eval()(x, prediction(2), True)
    assert estimate is None and torch.equal(y, batch_norm.eval()(x))


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"KalmanNorm2d: expected 4-d input, got shape \(2, 4\)"):
        KalmanNorm2d(4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        KalmanNorm2d(4)(torch.zeros(1, 4, 1, 1), prediction())


def test_copies():
    norm, x = layer(prediction_weight=0.6), values(6, 4, 3, 2)
    assert torch.equal(copy.deepcopy(norm)(x, prediction()), norm(x, prediction()))


# --- transitions ------------------------------------------------------------------------------------


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, padding=1, bias=False),
    nn.Conv2d(4, 8, (3, 1), stride=2, dilation=2, groups=2),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv3d(4, 6, 2),
    nn.Linear(4, 6),
]


def arguments_of(module):
    return module.weight, module.bias, getattr(module, "groups", 1)


def by_sample(module, estimate, x, *activation):
    """`predicted_by_sample` with the options of `module`."""
    options = (getattr(module, name, 1) for name in ("stride", "dilation", "groups"))
    return predicted_by_sample(estimate, x, module.weight, module.bias, *options, *activation)


def input_of(module):
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.Linear: 0}[type(module)]
    return torch.zeros(2, 4, *[8] * dims, dtype=torch.float64)


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_closed_form_is_exact_for_independent_values(module):
    """One value of the result, without a border: its mean and variance are sums over the weights."""
    module, before = copy.deepcopy(module).double(), prediction()
    mean, var = predicted(before, *arguments_of(module))
    groups = getattr(module, "groups", 1)
    each = 4 // groups
    for channel in range(mean.shape[1]):
        weight = module.weight[channel].reshape(each, -1)
        start = channel // (mean.shape[1] // groups) * each
        bias = 0.0 if module.bias is None else module.bias[channel]
        expected_mean = (weight.sum(1) * before.mean[0, start : start + each]).sum() + bias
        expected_var = (weight.square().sum(1) * before.var[0, start : start + each]).sum()
        torch.testing.assert_close(mean[0, channel], expected_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(var[0, channel], expected_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [("relu", ()), ("hardtanh", (0.0, 6.0)), ("identity", ())], ids=str)
@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_sampled_agrees_with_the_closed_form_within_sampling_error(module, activation):
    """Means of many draws lie within five standard errors, which the draws tell themselves."""
    torch.manual_seed(0)
    module, before, draws = copy.deepcopy(module).double(), prediction(), 60
    many = Estimate(*(v.expand(draws, -1) for v in before))
    exact = predicted(activated(before, *activation), *arguments_of(module))
    with torch.no_grad():
        mean, var = by_sample(module, many, input_of(module), *activation)
    assert_means_agree(mean, exact.mean)
    # the variance of a finite draw misses what the draw's own mean took: at most 1 in 64 positions, correlated
    # over a kernel's reach
    expected_second = exact.var + exact.mean.square()
    assert_means_agree(var + mean.square(), expected_second)


@pytest.mark.parametrize("activation", [("relu", ()), ("silu", ())], ids=str)
def test_sampled_activation_agrees_with_the_closed_form(activation):
    torch.manual_seed(0)
    many = Estimate(*(v.expand(400, -1) for v in prediction()))
    mean, var = activated(many, *activation, sampled=True)
    exact = activated(prediction(), *activation)
    assert_means_agree(mean, exact.mean)
    assert_means_agree(var + mean.square(), exact.var + exact.mean.square())


def assert_means_agree(found, expected):
    error = (found.mean(0) - expected[0]).abs()
    standard = found.std(0) / len(found) ** 0.5
    assert (error <= 5 * standard + 1e-3 * expected[0].abs()).all()
    assert (standard < 0.1 * (1 + expected[0].abs())).all()


def test_a_draw_has_many_positions_however_small_the_map_is():
    torch.manual_seed(0)
    module, before = nn.Conv2d(4, 6, 3, padding=1).double(), prediction()
    small = by_sample(module, before, torch.zeros(1, 4, 1, 1))
    exact = predicted(before, *arguments_of(module))
    assert ((small.var - exact.var).abs() < 0.5 * exact.var).all()


def test_one_number_stands_for_every_dimension():
    before, x = prediction(), torch.zeros(1, 4, 8, 8)
    module = nn.Conv2d(4, 6, 3, stride=2, dilation=2).double()
    torch.manual_seed(0)
    expected = by_sample(module, before, x)
    for two in (2, (2,)):
        torch.manual_seed(0)
        found = predicted_by_sample(before, x, module.weight, module.bias, two, two)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_of_the_transition():
    module, before = nn.Conv2d(4, 6, 3, groups=2).double(), prediction()

    def run(mean, var, weight, bias):
        return tuple(predicted(activated(Estimate(mean, var), "relu", ()), weight, bias, module.groups))

    args = (before.mean.requires_grad_(), before.var.requires_grad_(), module.weight, module.bias)
    assert torch.autograd.gradcheck(run, args)


def test_autocast_leaves_the_transition_alone():
    module, before = nn.Conv2d(4, 6, 3), Estimate(*(v.float() for v in prediction()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = predicted(before, *arguments_of(module))
    assert all(torch.equal(a, b) for a, b in zip(inside, predicted(before, *arguments_of(module)), strict=True))
    assert F.relu(inside.mean).dtype == torch.float32
