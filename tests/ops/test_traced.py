"""The ops under torch.compile, whole graphs only."""

import warnings

import pytest
import torch

from normpass.ops import Activation, inplace_abn, moments, norm_act, updated_running_stats

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        yield
    torch.compiler.reset()


def compile_whole(function, dynamic=False):
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def train_step(x, residual, weight, bias, running_mean, running_var):
    with torch.no_grad():
        mean, var = moments(x)
        new_mean, new_var = updated_running_stats(running_mean, running_var, mean, var, 0.1, x.numel() // x.shape[1])
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    first = norm_act(x, residual, weight, bias, mean, var, 1e-5, True, "relu")
    return inplace_abn(first, weight, bias, running_mean, running_var, 1e-5, False, "leaky_relu", (0.1,))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_step_is_eagers(layout, dynamic, make_site, error):
    results = []
    for function in (train_step, compile_whole(train_step, dynamic)):
        site = make_site(layout=layout, grad_layout=layout)
        buffers = torch.zeros(3).double(), torch.ones(3).double()
        z = function(*site.inputs, *buffers)
        gradients = torch.autograd.grad(z, site.inputs, site.grad)
        assert z.stride() == gradients[0].stride() == gradients[1].stride() == site.x.stride()
        results.append([z, *gradients, *buffers])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-14
    assert results[0][-1].ne(1).all()


def test_every_activation_traces(activation, make_site, error):
    site = make_site(activation=activation, layout="channels_last")
    eager = norm_act(*site.norm_act_args)
    compiled = compile_whole(norm_act)(*site.norm_act_args)
    assert compiled.stride() == eager.stride() and error(compiled, eager) == 0
    expected = torch.autograd.grad(eager, site.inputs, site.grad)
    for a, b in zip(torch.autograd.grad(compiled, site.inputs, site.grad), expected, strict=True):
        assert error(a, b) < 1e-14  # AOTAutograd gives the gradient the layout of z: other vector lanes


def test_a_gradient_through_moments_traces(make_site, error):
    def spread(x):
        mean, var = moments(x)
        return (mean * var).sum()

    x = make_site(activation=Activation("silu")).x
    (expected,) = torch.autograd.grad(spread(x), x)
    (got,) = torch.autograd.grad(compile_whole(spread)(x), x)
    assert error(got, expected) < 1e-14
