import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from normpass import ops
from normpass.ops import Activation, moments

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(6, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 3, 4, 2)]
RELU = Activation("relu")


def assert_equals_plain(norm_act, site, plain_formula, error, tolerance=1e-12):
    got = site.value_and_gradients(norm_act(*site.norm_act_args))
    wide = site.in_double()
    expected = wide.value_and_gradients(plain_formula(wide))
    for name, a, b in zip(("z", "x", "residual/weight", "weight/bias", "bias"), got, expected, strict=False):
        assert error(a, b) < tolerance, name
    return got


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_every_activation(activation, residual, batch_statistics, make_site, plain_formula, error, norm_act):
    site = make_site(residual=residual, batch_statistics=batch_statistics, activation=activation)
    assert_equals_plain(norm_act, site, plain_formula, error, 5e-8)  # ATen: 1/6 in float32


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout(shape, layout, affine, batch_statistics, make_site, plain_formula, error, norm_act):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("no such layout")
    site = make_site(shape, layout=layout, grad_layout="transposed", affine=affine, batch_statistics=batch_statistics)
    z, dx, dresidual, *_ = assert_equals_plain(norm_act, site, plain_formula, error)
    expected = site.x if layout == "channels_last" else torch.empty(shape)
    assert z.stride() == dx.stride() == dresidual.stride() == expected.stride()


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_one_of_weight_and_bias(which, batch_statistics, make_site, plain_formula, error, norm_act):
    site = replace(make_site(batch_statistics=batch_statistics), **{which: None})
    assert_equals_plain(norm_act, site, plain_formula, error)


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation_name", ["identity", "relu"])
def test_residual_and_gradient_in_another_layout(
    norm_act, activation_name, grad_layout, batch_statistics, make_site, plain_formula, error
):
    layout = "channels_last" if grad_layout == "contiguous" else "contiguous"
    site = make_site(
        layout=layout,
        grad_layout=grad_layout,
        batch_statistics=batch_statistics,
        activation=Activation(activation_name),
    )
    z, dx, dresidual, *_ = assert_equals_plain(norm_act, site, plain_formula, error)
    assert z.stride() == dx.stride() == site.x.stride()
    is_grad = activation_name == "identity" and norm_act is not ops.norm_act  # no op returns what it was given
    assert dresidual.stride() == (site.grad if is_grad else site.x).stride()
    assert (dresidual.data_ptr() == site.grad.data_ptr()) == is_grad


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_narrow_dtypes(dtype, tolerance, layout, batch_statistics, make_site, plain_formula, error, norm_act):
    """Three roundings, of y, the sum and z, each at most half an ulp of the largest value on its way."""
    site = make_site(dtype=dtype, layout=layout, batch_statistics=batch_statistics, activation=Activation("silu"))
    got = assert_equals_plain(norm_act, site, plain_formula, error, tolerance)
    assert [t.dtype for t in got] == [dtype, dtype, dtype, torch.float32, torch.float32]


def test_parameters_in_16_bit(batch_statistics, make_site, plain_formula, error, norm_act):
    site = make_site(dtype=torch.bfloat16, batch_statistics=batch_statistics, activation=Activation("silu"))
    weight, bias = (t.detach().bfloat16().requires_grad_() for t in (site.weight, site.bias))
    got = assert_equals_plain(norm_act, replace(site, weight=weight, bias=bias), plain_formula, error, 2e-2)
    assert {t.dtype for t in got} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 1, 7, 5), (2, 3, 5, 3), (2, 24, 9, 7), (2, 100, 3, 3), (1, 17, 33, 31)], ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_channels_that_fill_no_vector(
    dtype, tolerance, shape, layout, batch_statistics, make_site, plain_formula, error, norm_act
):
    activation = Activation("silu")
    site = make_site(shape, dtype=dtype, layout=layout, batch_statistics=batch_statistics, activation=activation)
    assert_equals_plain(norm_act, site, plain_formula, error, tolerance)


@pytest.mark.parametrize("gamma", [0.0, -1.3])
def test_zero_and_negative_gamma(gamma, batch_statistics, make_site, plain_formula, error, norm_act):
    site = make_site(batch_statistics=batch_statistics)
    site = replace(site, weight=torch.full_like(site.weight, gamma).requires_grad_())
    got = assert_equals_plain(norm_act, site, plain_formula, error)
    if gamma == 0:
        assert torch.count_nonzero(got[1]) == 0
        assert torch.count_nonzero(got[3]) == 3


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_expanded_gradient_of_a_sum(activation, residual, make_site, plain_formula, error, norm_act):
    site = make_site(activation=activation, layout="channels_last", residual=residual)
    got = torch.autograd.grad(norm_act(*site.norm_act_args).sum(), site.inputs)
    expected = torch.autograd.grad(plain_formula(site).sum(), site.inputs)
    scale = max(b.abs().max() for b in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 5e-8 * scale


def test_backward_twice_gives_the_same(make_site, norm_act):
    site = make_site()
    z = norm_act(*site.norm_act_args)
    first = torch.autograd.grad(z, site.inputs, site.grad, retain_graph=True)
    second = torch.autograd.grad(z, site.inputs, site.grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("which", ["x", "residual", "weight", "bias"])
@pytest.mark.parametrize("activation_name", ["identity", "relu"])
def test_one_gradient_alone(which, activation_name, batch_statistics, make_site, plain_formula, error, norm_act):
    site = make_site(activation=Activation(activation_name), batch_statistics=batch_statistics, requires_grad=False)
    wanted = getattr(site, which).requires_grad_()
    (got,) = torch.autograd.grad(norm_act(*site.norm_act_args), wanted, site.grad)
    (expected,) = torch.autograd.grad(plain_formula(site), wanted, site.grad)
    assert error(got, expected) < 1e-12


def test_one_value_per_channel(make_site, plain_formula, error, norm_act):
    for shape in ((1, 3), (1, 3, 1, 1)):
        site = make_site(shape, batch_statistics=False)
        assert_equals_plain(norm_act, site, plain_formula, error)


def test_an_empty_batch(make_site, norm_act):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (0, 3)):
        site = make_site(shape, batch_statistics=False)
        z, dx, dresidual, dweight, dbias = site.value_and_gradients(norm_act(*site.norm_act_args))
        assert z.shape == dx.shape == dresidual.shape == shape
        assert torch.equal(dweight, torch.zeros(3).double())
        assert torch.equal(dbias, torch.zeros(3).double())
        empty_batch = replace(site, batch_statistics=True)
        with pytest.raises(ValueError, match="norm_act: with batch_statistics=True `x` must hold"):
            norm_act(*empty_batch.norm_act_args)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_batch_norm_and_relu(training, layout, make_site, error, norm_act):
    site = make_site(layout=layout, residual=False)
    norm = nn.BatchNorm2d(3).double().train(training)
    with torch.no_grad():
        norm.weight.copy_(site.weight)
        norm.bias.copy_(site.bias)
        norm.running_mean.copy_(site.mean * 0.9)
        norm.running_var.copy_(site.var * 1.1)
    fused = copy.deepcopy(norm)
    parameters = [site.x, norm.weight, norm.bias]
    z = torch.relu(norm(site.x))
    expected = [z, *torch.autograd.grad(z, parameters, site.grad)]
    with torch.no_grad():
        mean, var = moments(site.x) if training else (fused.running_mean, fused.running_var)
    z = norm_act(site.x, None, fused.weight, fused.bias, mean, var, fused.eps, training, "relu")
    got = [z, *torch.autograd.grad(z, [site.x, fused.weight, fused.bias], site.grad)]
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_as_accurate_as_eager_far_from_zero(layout, make_site, plain_formula, error, norm_act):
    # Many channels: how far the mean of one is rounded to float32 is a matter of luck.
    site = make_site((9, 96, 12, 12), dtype=torch.float32, layout=layout, residual=False, offset=1500.0)
    z = nn.functional.batch_norm(site.x, None, None, site.weight, site.bias, True, 0.0, site.eps).relu()
    eager = site.value_and_gradients(z)
    with torch.no_grad():
        mean, var = moments(site.x)
    got = site.value_and_gradients(norm_act(*replace(site, mean=mean, var=var).norm_act_args))
    wide = site.in_double()
    expected = wide.value_and_gradients(plain_formula(wide))
    for a, e, b in zip(got, eager, expected, strict=True):
        assert (a.double() - b).norm() <= 1.1 * (e.double() - b).norm() + 1e-6 * b.norm()


def test_gradcheck(smooth_activation, batch_statistics, make_site, norm_act):
    site = make_site((3, 2, 2), activation=smooth_activation, batch_statistics=batch_statistics)

    def function(x, residual, weight, bias):
        mean, var = moments(x.detach()) if batch_statistics else (site.mean, site.var)
        return norm_act(x, residual, weight, bias, mean, var, *site.options)

    assert torch.autograd.gradcheck(function, site.inputs)
    assert torch.autograd.gradgradcheck(function, site.inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, dtype, batch_statistics, make_site, opcheck):
    site = make_site(dtype=dtype, layout=layout, grad_layout="transposed", batch_statistics=batch_statistics)
    opcheck(torch.ops.normpass.norm_act.default, site.norm_act_args)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 1, 1), (2, 3, 4, 1)], ids=str)
def test_opcheck_where_layouts_coincide(shape, make_site, opcheck):
    site = make_site(shape, layout="channels_last", batch_statistics=False)
    opcheck(torch.ops.normpass.norm_act.default, site.norm_act_args)


def test_autocast_leaves_every_dtype_alone(activation, make_site, norm_act):
    for dtype in (torch.bfloat16, torch.float32):
        site = make_site(dtype=dtype, activation=activation)
        expected = site.value_and_gradients(norm_act(*site.norm_act_args))
        with torch.autocast("cpu", torch.bfloat16):
            z = norm_act(*site.norm_act_args)
            mean, var = moments(site.x.detach())
        assert mean.dtype == var.dtype == torch.float32
        got = site.value_and_gradients(z)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert z.dtype == dtype


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_keeps_its_input_and_never_its_output(activation, residual, make_site, saved_sizes, norm_act):
    site = make_site((4, 3, 8, 8), activation=activation, residual=residual)
    z, kept = saved_sizes(lambda: norm_act(*site.norm_act_args))
    expected = {site.x.data_ptr()}
    if residual and activation.name != "identity":
        expected.add(site.residual.data_ptr())
    assert {pointer for pointer, numel in kept.items() if numel == site.x.numel()} == expected
    assert z.data_ptr() not in kept


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(residual=torch.zeros(4, 3, 5, 1).double()), r"`residual` must have the shape of `x`, .*5, 1\)"),
        (
            dict(residual=torch.zeros(4, 3, 5, 6)),
            r"`residual` must have the dtype of `x`, torch.float64, got",
        ),
        (dict(mean=torch.zeros(4).double()), r"`mean` must have shape \(3,\).*got \(4,\)"),
        (dict(var=torch.zeros(1, 3).double()), r"`var` must have shape \(3,\)"),
        (dict(weight=torch.zeros(1).double()), r"`weight` must have shape \(3,\)"),
        (dict(bias=torch.zeros(5).double()), r"`bias` must have shape \(3,\)"),
        (dict(x=torch.zeros(3).double()), r"`x` must have shape \(N, C, \*\)"),
        (dict(x=torch.zeros(4, 3, 5, 6, dtype=torch.int32)), "`x` must have a floating dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, make_site, norm_act):
    site = replace(make_site(), **change)
    with pytest.raises(ValueError, match="normpass::norm_act: " + message):
        norm_act(*site.norm_act_args)


def test_unknown_activations_are_refused(make_site, norm_act):
    args = make_site().norm_act_args[:-2]
    with pytest.raises(ValueError, match="normpass::norm_act: unknown activation `swish`; allowed are"):
        norm_act(*args, "swish", ())
    with pytest.raises(ValueError, match="`leaky_relu` takes 1 arguments"):
        norm_act(*args, "leaky_relu", ())


@pytest.mark.parametrize("which", ["mean", "var"])
def test_a_gradient_of_constant_statistics_is_not_lost_in_silence(which, make_site, norm_act):
    site = make_site(batch_statistics=False)
    getattr(site, which).requires_grad_()
    with pytest.raises(ValueError, match=f"norm_act: with batch_statistics=False `{which}` is a constant"):
        norm_act(*site.norm_act_args)
