"""A depthwise convolution that normalizes and activates what it reads."""

import pytest
import torch
import torch.nn.functional as F

from normpass.kernels import kernels_for
from normpass.ops import Activation
from normpass.ops.norm_act import norm_act
from normpass.ops.norm_act_depthwise import NormActDepthwise, norm_act_depthwise_on

ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-5}
# kernel, stride, padding
KINDS = [
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((5, 5), (1, 1), (2, 2)),
    ((5, 5), (2, 2), (1, 2)),
    ((7, 7), (2, 1), (3, 0)),
    ((1, 3), (1, 2), (0, 2)),
    ((4, 5), (3, 2), (3, 4)),
]

pytestmark = pytest.mark.skipif(kernels_for("cpu") is None, reason="there are no kernels, and no reference is needed")


def weights(channels, kernel, dtype, with_bias=False):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(channels, 1, *kernel, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return weight, bias if with_bias else None


def run(site, weight, bias, stride, padding):
    values = site.weight, site.bias, site.mean, site.var
    return norm_act_depthwise_on("cpu", site.x, values, site.options, weight, bias, stride, padding)


def exact(site, weight, bias, stride, padding, plain_formula):
    """The result, and its leaves, by plain formulas in float64."""
    wide = site.in_double()
    weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in (weight, bias))
    y = F.conv2d(plain_formula(wide), weight, bias, stride, padding, groups=site.x.shape[1])
    return y, [*wide.inputs, *(t for t in (weight, bias) if t is not None)]


def compare(site, weight, bias, stride, padding, plain_formula, error, tolerance, grad=None):
    y = run(site, weight, bias, stride, padding)
    expected, expected_leaves = exact(site, weight, bias, stride, padding, plain_formula)
    assert type(y.grad_fn).__name__ == "NormActDepthwiseBackward" and y.dtype == site.x.dtype
    assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y.detach(), expected.detach()) < tolerance
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    leaves = [*site.inputs, *(t for t in (weight, bias) if t is not None)]
    gradients = torch.autograd.grad(y, leaves, grad)
    for got, want in zip(gradients, torch.autograd.grad(expected, expected_leaves, grad.double()), strict=True):
        assert got.dtype == y.dtype and error(got, want) < tolerance
    return gradients


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_against_float64(make_site, kind, channels, dtype, batch_statistics, plain_formula, error):
    kernel, stride, padding = kind
    site = make_site(
        (3, channels, 9, 11),
        dtype=dtype,
        layout="channels_last",
        residual=False,
        batch_statistics=batch_statistics,
        activation=Activation("silu"),
    )
    weight, bias = weights(channels, kernel, dtype, with_bias=True)
    compare(site, weight, bias, stride, padding, plain_formula, error, ROUNDING[dtype])


def test_every_activation(make_site, activation, plain_formula, error):
    site = make_site((2, 20, 8, 7), layout="channels_last", residual=False, activation=activation)
    weight, _ = weights(20, (3, 3), torch.float64)
    tolerance = 1e-7 if activation.name == "hardsigmoid" else 1e-11  # as in ATen, its 1/6 is a float32
    compare(site, weight, None, (1, 1), (1, 1), plain_formula, error, tolerance)


@pytest.mark.parametrize("size", [(1, 2), (1, 9), (2, 3), (7, 7), (8, 16), (14, 13)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes(make_site, size, stride, plain_formula, error):
    site = make_site((5, 33, *size), layout="channels_last", residual=False, activation=Activation("relu"))
    weight, _ = weights(33, (5, 5), torch.float64)
    compare(site, weight, None, (stride, stride), (2, 2), plain_formula, error, 1e-11)


def test_a_map_of_one_value_is_contiguous(make_site):
    """Behind a norm ATen has it so, whatever the strides of x; and only channels_last has a kernel."""
    site = make_site((5, 33, 1, 1), layout="channels_last", residual=False, activation=Activation("relu"))
    strided = torch.empty(site.x.shape, dtype=site.x.dtype, memory_format=torch.channels_last)
    object.__setattr__(site, "x", strided.copy_(site.x.detach()).requires_grad_())
    assert run(site, weights(33, (5, 5), torch.float64)[0], None, (1, 1), (2, 2)) is None


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_ones_are_written_past_the_caches(make_site, name, stride, plain_formula, error):
    """8 MiB and more; a costly activation's dy is written between the passes, another's is computed twice."""
    site = make_site(
        (2, 32, 192, 192), dtype=torch.float32, layout="channels_last", residual=False, activation=Activation(name)
    )
    weight, _ = weights(32, (3, 3), torch.float32)
    compare(site, weight, None, (stride, stride), (1, 1), plain_formula, error, 1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_without_parameters(make_site, affine, batch_statistics, plain_formula, error):
    site = make_site(
        (2, 16, 6, 6), layout="channels_last", residual=False, affine=affine, batch_statistics=batch_statistics
    )
    weight, _ = weights(16, (3, 3), torch.float64)
    compare(site, weight, None, (1, 1), (1, 1), plain_formula, error, 1e-11)


@pytest.mark.parametrize("how", ["expanded", "contiguous", "sliced"])
def test_any_gradient(make_site, how, plain_formula, error):
    site = make_site((2, 16, 6, 6), layout="channels_last", residual=False)
    weight, _ = weights(16, (3, 3), torch.float64)
    grad = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if how == "expanded":
        grad = grad[:1, :1, :1, :1].expand(2, 16, 6, 6)
    elif how == "sliced":
        grad = torch.cat([grad, grad], 3)[..., ::2]
    compare(site, weight, None, (1, 1), (1, 1), plain_formula, error, 1e-11, grad=grad)


def test_threads_share_the_work(make_site, plain_formula, error):
    before = torch.get_num_threads()
    site = make_site((3, 40, 40, 40), dtype=torch.float32, layout="channels_last", residual=False)
    weight, _ = weights(40, (3, 3), torch.float32)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            compare(site, weight, None, (1, 1), (1, 1), plain_formula, error, 5e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "convolution", "norm", "all but convolution"])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_only_what_is_needed(make_site, name, frozen, batch_statistics, plain_formula, error):
    site = make_site(
        (2, 16, 6, 6),
        layout="channels_last",
        residual=False,
        activation=Activation(name),
        batch_statistics=batch_statistics,
    )
    weight, _ = weights(16, (3, 3), torch.float64)
    expected, leaves = exact(site, weight, None, (1, 1), (1, 1), plain_formula)
    expected.square().sum().backward()
    names = ["x", "weight", "bias", "convolution"]
    tensors = dict(zip(names, [site.x, site.weight, site.bias, weight], strict=True))
    groups = {"norm": ["weight", "bias"], "all but convolution": ["x", "weight", "bias"]}
    off = groups.get(frozen, [frozen])
    for key in off:
        tensors[key].requires_grad_(False)
    run(site, weight, None, (1, 1), (1, 1)).square().sum().backward()
    for key, leaf in zip(names, leaves, strict=True):
        if key in off:
            assert tensors[key].grad is None
        else:
            assert error(tensors[key].grad, leaf.grad) < 1e-11


def test_gradients_of_gradients(make_site):
    site = make_site((2, 2, 4, 5), layout="channels_last", residual=False, activation=Activation("silu"))
    weight, bias = weights(2, (3, 3), torch.float64, with_bias=True)

    def function(x, norm_weight, norm_bias, weight, bias):
        var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        values = norm_weight, norm_bias, mean, var
        return norm_act_depthwise_on("cpu", x, values, site.options, weight, bias, (1, 2), (1, 1))

    inputs = (site.x, site.weight, site.bias, weight, bias)
    assert type(function(*inputs).grad_fn).__name__ == "NormActDepthwiseBackward"
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_what_is_convolved_is_norm_act(make_site, activation, dtype):
    site = make_site(
        (2, 40, 9, 7), dtype=dtype, layout="channels_last", residual=False, activation=activation, requires_grad=False
    )
    weight, _ = weights(40, (3, 3), dtype)
    with torch.no_grad():
        got = run(site, weight, None, (1, 1), (1, 1))
        z, expected = norm_act(*site.norm_act_args), torch.empty_like(got)
        kernels_for("cpu").depthwise.convolve(expected, z, weight, None, (1, 1), (1, 1))
    assert torch.equal(got, expected)


def test_a_large_mean_costs_no_accuracy(make_site, plain_formula, error):
    site = make_site((4, 16, 12, 12), dtype=torch.float32, layout="channels_last", residual=False, offset=1500.0)
    weight, _ = weights(16, (3, 3), torch.float32)
    y = run(site, weight, None, (1, 1), (1, 1))
    expected, leaves = exact(site, weight, None, (1, 1), (1, 1), plain_formula)
    assert error(y.detach(), expected.detach()) < 1e-3  # x itself is rounded to 1e-7 · 1500
    grad = torch.ones_like(y)
    got = torch.autograd.grad(y, [site.x, weight], grad)
    want = torch.autograd.grad(expected, [leaves[0], leaves[3]], grad.double())
    assert all(error(a, b) < 1e-3 for a, b in zip(got, want, strict=True))


def test_what_has_no_kernel(make_site):
    def found(dtype=torch.float32, layout="channels_last", kernel=(3, 3), stride=(1, 1), padding=(1, 1), **options):
        site = make_site((2, 16, 8, 8), dtype=dtype, layout=layout, residual=False, **options)
        weight, _ = weights(16, kernel, dtype)
        return run(site, weight, None, stride, padding)

    assert found() is not None
    assert found(layout="contiguous") is None
    assert found(dtype=torch.bfloat16) is None  # there z is rounded before it is convolved
    assert found(kernel=(3, 4)) is None
    assert found(stride=(1, 3)) is None
    assert found(padding=(3, 1)) is None
    assert found(kernel=(9, 3), padding=(0, 0)) is None  # larger than the image: the layer says so


def test_without_gradients_nothing_is_recorded(make_site, monkeypatch):
    site = make_site((2, 16, 8, 8), layout="channels_last", residual=False)
    weight, _ = weights(16, (3, 3), torch.float64)
    expected = run(site, weight, None, (1, 1), (1, 1)).detach()
    monkeypatch.setattr(NormActDepthwise, "apply", None)
    with torch.no_grad():
        assert torch.equal(run(site, weight, None, (1, 1), (1, 1)), expected)
