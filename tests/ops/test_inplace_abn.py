from dataclasses import replace

import pytest
import torch

from normpass.ops import Activation, inplace_abn_backward, moments, norm_act

pytestmark = pytest.mark.usefixtures("kernels")

LEAKY = Activation("leaky_relu", (0.1,))


def assert_equals_plain(inplace_abn, site, plain_formula, error, tolerance=1e-10):
    got = site.value_and_gradients(inplace_abn(*site.inplace_abn_args))
    wide = site.in_double()
    expected = wide.value_and_gradients(plain_formula(wide))
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < tolerance
    return got


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_every_activation(
    invertible_activation, affine, batch_statistics, make_site, plain_formula, error, inplace_abn
):
    site = make_site(residual=False, affine=affine, batch_statistics=batch_statistics, activation=invertible_activation)
    assert_equals_plain(inplace_abn, site, plain_formula, error)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other", "transposed"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 3, 4, 2)], ids=str)
def test_every_layout(shape, layout, batch_statistics, make_site, plain_formula, error, inplace_abn):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("no such layout")
    site = make_site(
        shape,
        layout=layout,
        grad_layout="transposed",
        residual=False,
        batch_statistics=batch_statistics,
        activation=LEAKY,
    )
    z, dx, *_ = assert_equals_plain(inplace_abn, site, plain_formula, error)
    expected = site.x if layout == "channels_last" else torch.empty(shape)
    assert z.stride() == dx.stride() == expected.stride()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=str
)
def test_narrow_dtypes(dtype, tolerance, batch_statistics, make_site, plain_formula, error, inplace_abn):
    """x̂ comes from a rounded z: off by ulp(z)·|bias/weight|; weights here are > 1/2, biases < 2."""
    site = make_site(dtype=dtype, residual=False, batch_statistics=batch_statistics, activation=LEAKY)
    got = assert_equals_plain(inplace_abn, site, plain_formula, error, tolerance)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]


def test_value_is_norm_acts_to_the_bit(invertible_activation, make_site, inplace_abn):
    site = make_site(residual=False, activation=invertible_activation, dtype=torch.float32)
    assert torch.equal(inplace_abn(*site.inplace_abn_args), norm_act(*site.norm_act_args))


def test_negative_gamma_keeps_its_sign(
    invertible_activation, batch_statistics, make_site, plain_formula, error, inplace_abn
):
    site = make_site(residual=False, batch_statistics=batch_statistics, activation=invertible_activation)
    site = replace(site, weight=torch.full_like(site.weight, -0.8).requires_grad_())
    assert_equals_plain(inplace_abn, site, plain_formula, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma", [0.0, -0.0, 1e-30, -1e-30])
def test_vanishing_gamma_is_finite(
    gamma, dtype, invertible_activation, batch_statistics, make_site, error, inplace_abn
):
    site = make_site(dtype=dtype, residual=False, batch_statistics=batch_statistics, activation=invertible_activation)
    site = replace(site, weight=torch.full_like(site.weight, gamma).requires_grad_())
    z, dx, dweight, dbias = site.value_and_gradients(inplace_abn(*site.inplace_abn_args))
    assert all(t.isfinite().all() for t in (z, dx, dweight, dbias))
    assert dx.abs().max() <= 1e-20
    exact = torch.autograd.grad(norm_act(*site.norm_act_args), site.bias, site.grad)[0]
    assert error(dbias, exact) < 0.02


def test_small_gamma_without_bias_loses_nothing(make_site, plain_formula, error, inplace_abn):
    site = make_site(residual=False, activation=LEAKY)
    small = torch.full_like(site.weight, 1e-6).requires_grad_()
    site = replace(site, weight=small, bias=torch.zeros_like(site.bias).requires_grad_())
    assert_equals_plain(inplace_abn, site, plain_formula, error)


def test_expanded_gradient_of_a_sum(invertible_activation, make_site, plain_formula, inplace_abn):
    site = make_site(residual=False, activation=invertible_activation, layout="channels_last")
    got = torch.autograd.grad(inplace_abn(*site.inplace_abn_args).sum(), site.inputs)
    expected = torch.autograd.grad(plain_formula(site).sum(), site.inputs)
    scale = max(b.abs().max() for b in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * scale


def test_backward_twice_gives_the_same_and_writes_to_nothing(make_site, inplace_abn):
    site = make_site(residual=False, activation=LEAKY)
    z = inplace_abn(*site.inplace_abn_args)
    before = z.detach().clone(), site.grad.clone()
    first = torch.autograd.grad(z, site.inputs, site.grad, retain_graph=True)
    second = torch.autograd.grad(z, site.inputs, site.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(z, before[0]) and torch.equal(site.grad, before[1])


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_one_gradient_alone(which, batch_statistics, make_site, plain_formula, error, inplace_abn):
    site = make_site(residual=False, activation=LEAKY, batch_statistics=batch_statistics, requires_grad=False)
    wanted = getattr(site, which).requires_grad_()
    (got,) = torch.autograd.grad(inplace_abn(*site.inplace_abn_args), wanted, site.grad)
    (expected,) = torch.autograd.grad(plain_formula(site), wanted, site.grad)
    assert error(got, expected) < 1e-11


def test_one_value_per_channel_and_an_empty_batch(make_site, plain_formula, error, inplace_abn):
    site = make_site((1, 3), residual=False, batch_statistics=False, activation=LEAKY)
    assert_equals_plain(inplace_abn, site, plain_formula, error)
    site = make_site((0, 3, 4, 4), residual=False, batch_statistics=False, activation=LEAKY)
    z, dx, dweight, dbias = site.value_and_gradients(inplace_abn(*site.inplace_abn_args))
    assert z.shape == dx.shape == (0, 3, 4, 4)
    assert torch.equal(dweight, torch.zeros(3).double()) and torch.equal(dbias, torch.zeros(3).double())
    with pytest.raises(ValueError, match="inplace_abn: with batch_statistics=True `x` must hold"):
        inplace_abn(*replace(site, batch_statistics=True).inplace_abn_args)


def test_gradcheck(invertible_activation, batch_statistics, make_site, inplace_abn):
    site = make_site((3, 2, 2, 2), residual=False, activation=invertible_activation, batch_statistics=batch_statistics)

    def function(x, weight, bias):
        mean, var = moments(x.detach()) if batch_statistics else (site.mean, site.var)
        return inplace_abn(x, weight, bias, mean, var, *site.options)

    assert torch.autograd.gradcheck(function, site.inputs)


def test_keeps_its_output_and_not_its_input(invertible_activation, make_site, saved_sizes, inplace_abn):
    site = make_site((4, 3, 8, 8), residual=False, activation=invertible_activation)
    z, kept = saved_sizes(lambda: inplace_abn(*site.inplace_abn_args))
    assert [p for p, numel in kept.items() if numel == site.x.numel()] == [z.data_ptr()]


def test_a_result_written_over_is_noticed(make_site, inplace_abn):
    site = make_site(residual=False, activation=LEAKY)
    z = inplace_abn(*site.inplace_abn_args)
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(site.grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, dtype, batch_statistics, make_site, opcheck):
    site = make_site(dtype=dtype, layout=layout, residual=False, batch_statistics=batch_statistics, activation=LEAKY)
    opcheck(torch.ops.normpass.inplace_abn.default, site.inplace_abn_args)


@pytest.mark.parametrize("needs", [[True] * 3, [True, False, True], [False, True, False]], ids=str)
def test_opcheck_of_the_backward(needs, batch_statistics, make_site, opcheck):
    site = make_site(layout="channels_last", activation=LEAKY, batch_statistics=batch_statistics, requires_grad=False)
    args = (site.grad, site.x, site.weight, site.bias, site.var, *site.options, needs)
    opcheck(torch.ops.normpass.inplace_abn_backward.default, args)


@pytest.mark.parametrize("name, args", [("relu", ()), ("silu", ()), ("leaky_relu", (0.0,)), ("elu", (-1.0,))])
def test_activations_without_an_inverse_are_refused(name, args, make_site, inplace_abn):
    site = make_site(activation=Activation(name, args))
    with pytest.raises(ValueError, match=f"inplace_abn: the activation must be invertible.*got {name}"):
        inplace_abn(*site.inplace_abn_args)
    with pytest.raises(ValueError, match="inplace_abn_backward: the activation must be invertible"):
        inplace_abn_backward(site.grad, site.x, site.weight, site.bias, site.var, *site.options, [True, True, True])


def test_a_second_derivative_is_refused_with_the_way_out(make_site, inplace_abn):
    site = make_site(residual=False, activation=LEAKY)
    z = inplace_abn(*site.inplace_abn_args)
    (dx,) = torch.autograd.grad((z**2).sum(), site.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="use the exact rewrite instead"):
        dx.sum().backward()


def test_constant_statistics_with_a_gradient_are_refused(make_site, inplace_abn):
    site = make_site(residual=False, batch_statistics=False, activation=LEAKY)
    site.mean.requires_grad_()
    with pytest.raises(ValueError, match="inplace_abn: with batch_statistics=False `mean` is a constant"):
        inplace_abn(*site.inplace_abn_args)
