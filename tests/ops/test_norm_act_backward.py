from dataclasses import replace
from itertools import product

import pytest
import torch

from normpass.ops import Activation, norm_act_backward
from normpass.ops.norm_act_backward import _reference, norm_act_gradients

pytestmark = pytest.mark.usefixtures("kernels")

ALL = (True, True, True, True)


def backward_args(site, needs=ALL):
    return site.grad, *site.norm_act_args, needs


@pytest.mark.parametrize("activation_name", ["identity", "silu"])
def test_every_choice_of_gradients(activation_name, batch_statistics, make_site, plain_formula, error):
    site = make_site(activation=Activation(activation_name), batch_statistics=batch_statistics)
    expected = torch.autograd.grad(plain_formula(site), site.inputs, site.grad)
    with torch.no_grad():
        for needs in product([True, False], repeat=4):
            results = norm_act_backward(*backward_args(site, needs))
            for got, wanted, needed in zip(results, expected, needs, strict=True):
                assert got.shape == (wanted.shape if needed else (0,))
                assert not needed or error(got, wanted) < 1e-12


def test_the_gradient_of_what_is_absent_is_empty(make_site):
    site = make_site(affine=False, requires_grad=False)
    dx, dresidual, dweight, dbias = norm_act_backward(*backward_args(site))
    assert dweight.shape == dbias.shape == (0,)
    assert dx.shape == dresidual.shape == site.x.shape


@pytest.mark.parametrize("activation_name", ["identity", "relu", "sigmoid"])
def test_results_are_new_tensors_and_arguments_stay(activation_name, batch_statistics, make_site):
    site = make_site(activation=Activation(activation_name), batch_statistics=batch_statistics, requires_grad=False)
    tensors = [t for t in backward_args(site) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    results = norm_act_backward(*backward_args(site))
    pointers = [t.data_ptr() for t in (*tensors, *results)]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
def test_two_temporaries_beside_the_result(activation, expanded, layout, make_site, live_tensors):
    site = make_site((2, 3, 8, 8), activation=activation, layout=layout, grad_layout=layout, requires_grad=False)
    grad = torch.ones(1, dtype=torch.float64).expand(site.x.shape) if expanded else site.grad
    with live_tensors(site.x.numel()) as live:
        _reference(*backward_args(replace(site, grad=grad), (True, False, True, True)))
    if activation.name == "identity":
        assert live.peak == 1 + expanded
    else:
        more = activation.name in "softsign log_sigmoid tanhshrink clamp open_clamp".split()  # as ATen's backward has
        assert live.peak <= 2 + more  # y and dy, then dy and dx


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
def test_a_kernel_needs_no_temporary(activation, expanded, layout, kernels, make_site, live_tensors):
    if kernels is None:
        pytest.skip("the reference has temporaries")
    site = make_site((2, 3, 8, 8), activation=activation, layout=layout, grad_layout=layout, requires_grad=False)
    grad = torch.ones(1, dtype=torch.float64).expand(site.x.shape) if expanded else site.grad
    with live_tensors(site.x.numel()) as live:
        norm_act_gradients(kernels, *backward_args(replace(site, grad=grad), (True, False, True, True)))
    assert live.peak == 1 + expanded


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("needs", [ALL, (True, False, True, False), (False, True, False, False)], ids=str)
@pytest.mark.parametrize("activation_name", ["identity", "relu"])
def test_opcheck(activation_name, needs, layout, make_site, opcheck):
    site = make_site(activation=Activation(activation_name), layout=layout, requires_grad=False)
    opcheck(torch.ops.normpass.norm_act_backward.default, backward_args(site, list(needs)))


def test_third_derivative(make_site, plain_formula, error, norm_act):
    site = make_site((3, 2, 2, 2), activation=Activation("silu"), residual=False)

    def third(z):
        total = z
        for _ in range(3):
            (dx,) = torch.autograd.grad((total**2).sum(), site.x, create_graph=True)
            total = dx
        return total.detach()

    assert error(third(norm_act(*site.norm_act_args)), third(plain_formula(site))) < 1e-10


def test_double_backward_where_x_is_fixed(make_site, plain_formula, error, norm_act):
    site = make_site(activation=Activation("silu"), requires_grad=False)
    grad, weight = site.grad.requires_grad_(), site.weight.requires_grad_()

    def second(z):
        (dweight,) = torch.autograd.grad(z, weight, grad, create_graph=True)
        return torch.autograd.grad((dweight**2).sum(), (grad, weight))

    for got, expected in zip(second(norm_act(*site.norm_act_args)), second(plain_formula(site)), strict=True):
        assert error(got, expected) < 1e-12


def test_a_gradient_that_does_not_fit_is_refused(make_site):
    site = make_site()
    with pytest.raises(ValueError, match="norm_act_backward: `grad` must have the shape of `x`"):
        norm_act_backward(*backward_args(replace(site, grad=site.grad[:1])))
    with pytest.raises(ValueError, match="norm_act_backward: `grad` must have the dtype of `x`"):
        norm_act_backward(*backward_args(replace(site, grad=site.grad.float())))
