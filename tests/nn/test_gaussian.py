"""Moments of an activation of a normal variable, against a fine sum over its density."""

import math

import pytest
import torch

from normpass.nn.gaussian import activated_moments
from normpass.ops import activate
from normpass.ops.activation import RULES

MEANS = torch.tensor([-8.0, -2.0, -0.3, 0.0, 0.4, 1.5, 7.0, 30.0], dtype=torch.float64)
VARS = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.01, 4.0, 9.0, 0.5], dtype=torch.float64)
EXACT = {
    "identity": (),
    "relu": (),
    "leaky_relu": (0.1,),
    "hardtanh": (0.0, 6.0),
    "clamp": (-0.5, 2.0),
    "open_clamp": (0.1, 0.9),
}
INTEGRATED = {"silu": (), "gelu": (), "tanh": (), "sigmoid": (), "elu": (1.0,), "softplus": (1.0, 20.0), "mish": ()}
INTEGRATED |= {"log_sigmoid": (), "tanhshrink": ()}
KINKED = {"hardswish": (), "hardsigmoid": (), "selu": (), "celu": (2.0,), "gelu_tanh": ()}
KINKED |= {"softshrink": (0.5,), "softsign": (), "squared_relu": ()}
JUMPS = {"hardshrink": (0.5,), "threshold": (0.5, -0.2)}


def summed(name, args):
    """Mean and variance by the trapezoidal rule over ±12 standard deviations."""
    t = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    values = activate(MEANS[:, None] + VARS.sqrt()[:, None] * t, name, args)
    mean = (values * density).sum(1)
    return mean, ((values - mean[:, None]).square() * density).sum(1)


@pytest.mark.parametrize(
    "name, args, tolerance",
    [
        *((name, args, 1e-8) for name, args in EXACT.items()),
        *((name, args, 2e-3) for name, args in INTEGRATED.items()),
        *((name, args, 2e-2) for name, args in KINKED.items()),
        *((name, args, 1e-1) for name, args in JUMPS.items()),
    ],
)
def test_against_a_fine_sum(name, args, tolerance):
    for found, expected in zip(activated_moments(MEANS, VARS, name, args), summed(name, args), strict=True):
        assert ((found - expected).abs() / (1 + expected.abs())).max() < tolerance


def test_every_activation_has_a_test():
    assert set(EXACT) | set(INTEGRATED) | set(KINKED) | set(JUMPS) == set(RULES)


@pytest.mark.parametrize("name, args", [*EXACT.items(), ("silu", ())])
def test_gradients(name, args):
    mean, var = MEANS[1:6].clone().requires_grad_(), VARS[1:6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: activated_moments(m, v, name, args), (mean, var))


@pytest.mark.parametrize("name, args", [*EXACT.items(), ("silu", ())])
def test_no_variance_is_the_value(name, args):
    mean, var = MEANS.clone().requires_grad_(), torch.zeros_like(MEANS).requires_grad_()
    found = activated_moments(mean, var, name, args)
    torch.testing.assert_close(found[0], activate(MEANS, name, args), rtol=0, atol=1e-5)
    assert found[1].abs().max() < 1e-9
    grads = torch.autograd.grad(found[0].sum() + found[1].sum(), (mean, var))
    assert all(g.abs().max() < 1e6 for g in grads)
