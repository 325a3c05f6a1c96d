import pytest
import torch

from normpass.ops import moments, norm_act

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(5, 3), (5, 3, 7), (2, 3, 4, 5), (2, 3, 4, 5, 6)]
LAYOUTS = ["contiguous", "channels_last", "every_other", "transposed"]


def exact(x):
    var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    return mean, var


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, layout, dtype, make_site, error):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("no such layout")
    x = make_site(shape, dtype=dtype, layout=layout).x.detach()
    mean, var = moments(x)
    expected_mean, expected_var = exact(x)
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(mean, expected_mean) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert error(var, expected_var) < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(
    "shape, layout",
    [((20001, 4), "contiguous"), ((9, 4, 50, 60), "contiguous"), ((9, 4, 50, 60), "channels_last")],
)
def test_far_from_zero(shape, layout, make_site):
    x = make_site(shape, dtype=torch.float32, layout=layout, offset=1500.0, residual=False).x.detach()
    mean, var = moments(x)
    expected_mean, expected_var = exact(x)
    deviations = (mean.double() - expected_mean).abs() / expected_var.sqrt()
    assert deviations.max() < 2e-4
    assert ((var.double() - expected_var) / expected_var).abs().max() < 1e-5


def test_several_blocks_of_rows_of_unequal_means(error):
    x = torch.linspace(-3, 5, 20001)[:, None] ** torch.tensor([1.0, 2.0, 3.0])
    for got, expected in zip(moments(x), exact(x), strict=True):
        assert ((got.double() - expected) / expected).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_first_value_far_from_the_others(layout, kernels, make_site):
    x = make_site((9, 4, 50, 60), dtype=torch.float32, layout=layout, residual=False).x.detach()
    x[0, :, 0, 0] = 1e4
    mean, var = moments(x)
    expected_mean, expected_var = exact(x)
    assert ((mean.double() - expected_mean).abs() / expected_var.sqrt()).max() < 1e-6
    assert ((var.double() - expected_var) / expected_var).abs().max() < (1e-4 if kernels is None else 1e-6)


def test_one_value_and_constants_have_no_variance():
    for x in (torch.tensor([[1.5, -2.0]]), torch.full((4, 2, 3, 3), 1e4)):
        mean, var = moments(x)
        assert torch.equal(mean, x.transpose(0, 1).flatten(1)[:, 0])
        assert torch.equal(var, torch.zeros(2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, make_site):
    x = make_site(shape).x
    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradgradcheck(moments, x)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_alone_and_expanded(which, make_site, error):
    x = make_site(layout="channels_last").x
    (got,) = torch.autograd.grad(moments(x)[which].sum(), x)
    (expected,) = torch.autograd.grad(exact(x)[which].sum(), x)
    assert error(got, expected) < 1e-13


def test_16_bit_gradient_has_the_inputs_dtype(make_site, error):
    site = make_site(dtype=torch.bfloat16)
    mean, var = moments(site.x)
    (got,) = torch.autograd.grad((mean + var).sum(), site.x)
    wide = site.in_double()
    mean, var = exact(wide.x)
    (expected,) = torch.autograd.grad((mean + var).sum(), wide.x)
    assert got.dtype == torch.bfloat16
    assert error(got, expected) < 2**-8


def test_an_op_that_owns_the_statistics_costs_no_second_gradient(make_site, plain_formula, error):
    site = make_site(residual=False)
    mean, var = moments(site.x)
    made = []
    mean.grad_fn.register_hook(lambda grad_inputs, grad_outputs: made.extend(grad_inputs))
    z = norm_act(site.x, None, site.weight, site.bias, mean, var, *site.options)
    (got,) = torch.autograd.grad(z, site.x, site.grad)
    assert made in ([], [None])
    (expected,) = torch.autograd.grad(plain_formula(site), site.x, site.grad)
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, make_site, opcheck):
    opcheck(torch.ops.normpass.moments.default, (make_site(layout=layout, dtype=torch.float32).x,))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(0, 3, 4, 4), r"moments: `x` must hold at least one value.*\(0, 3, 4, 4\)"),
        (torch.zeros(2, 3, 0), r"moments: `x` must hold at least one value.*\(2, 3, 0\)"),
        (torch.zeros(3), r"moments: `x` must have shape \(N, C, \*\), got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"moments: `x` must have a floating dtype, got torch.int64"),
    ],
)
def test_what_has_no_moments_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        moments(x)
