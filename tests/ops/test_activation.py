import pytest
import torch
import torch.nn.functional as F

from normpass.graph import activations as spellings
from normpass.graph.operators import KINDS
from normpass.kernels.activations import clamp_of_torch
from normpass.kernels.contract import ACTIVATIONS
from normpass.ops import Activation, activate, activate_, activation_backward, deactivate, norm_act
from normpass.ops.activation import RULES

EAGER = {
    "identity": lambda y: y * 1,
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "clamp": torch.clamp,
    "open_clamp": torch.clamp,
    "threshold": F.threshold,
    "squared_relu": lambda y: F.relu(y) ** 2,
}


def values(dtype=torch.float64):
    return torch.linspace(-8, 8, 321, dtype=torch.float64).to(dtype)


def test_every_rule_is_tried(activation, formulas):
    assert set(EAGER) == set(RULES) == set(formulas)


def test_value_and_derivative_are_those_of_the_formula(activation, formulas, error):
    y = (values() + 0.0123).requires_grad_()  # off the kinks
    z = formulas[activation.name](y, *activation.args)
    grad = torch.linspace(-1, 2, 321, dtype=torch.float64)
    (expected,) = torch.autograd.grad(z, y, grad)
    y = y.detach()
    # ATen holds hardsigmoid's 1/6 in float32, and softplus is linear above its threshold
    assert error(activate(y, activation.name, activation.args), z.detach()) < 5e-8
    assert error(activation_backward(grad, y, activation.name, activation.args), expected) < 5e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_eagers_to_the_bit(activation, dtype):
    y = values(dtype).requires_grad_()
    grad = torch.linspace(-1, 2, 321).to(dtype)
    z = EAGER[activation.name](y, *activation.args)
    (expected,) = torch.autograd.grad(z, y, grad)
    y, z = y.detach(), z.detach()
    name, args = activation.name, activation.args
    assert torch.equal(activate(y, name, args), z)
    assert torch.equal(activate_(y.clone(), name, args), z)
    assert torch.equal(activation_backward(grad, y, name, args), expected)
    assert torch.equal(activation_backward(grad, y.clone(), name, args, owns_y=True), expected)


@pytest.mark.parametrize("low, high", [(-1.0, 2.0), (0.0, float("inf")), (-float("inf"), 0.5), (2.0, -1.0)])
def test_the_gradient_at_the_bounds_of_a_clamp_is_that_of_this_torch(low, high):
    y = torch.tensor([-float("inf"), -1.0, 0.0, 0.3, 0.5, 2.0, float("inf"), float("nan")], requires_grad=True)
    bounds = [None if abs(bound) == float("inf") else bound for bound in (low, high)]
    (expected,) = torch.autograd.grad(torch.clamp(y, *bounds).sum(), y)
    found = activation_backward(torch.ones(8), y.detach(), clamp_of_torch(), (low, high))
    assert torch.equal(found, expected)
    kernel = y.detach().clone().repeat(4, 1).T.reshape(1, 1, 32).repeat(2, 3, 1).requires_grad_()
    one = torch.ones(3)
    z = norm_act(kernel, None, None, None, one - 1, one, 0.0, False, clamp_of_torch(), (low, high))
    (found,) = torch.autograd.grad(z.sum(), kernel)
    assert torch.equal(found[0, 0, ::4], expected)


def test_backward_writes_to_nothing_it_does_not_own(activation):
    y, grad = values(), torch.ones(1, dtype=torch.float64).expand(321)
    activation_backward(grad, y, activation.name, activation.args)
    activation_backward(grad, y.clone(), activation.name, activation.args, owns_y=True)
    assert torch.equal(y, values())
    assert torch.equal(grad, torch.ones_like(grad))


def test_inverse_undoes_the_value(invertible_activation, error):
    name, args = invertible_activation.name, invertible_activation.args
    y = values()
    assert invertible_activation.invertible
    assert error(deactivate(activate(y, name, args), name, args), y) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inverse_at_the_floor_is_finite(invertible_activation, dtype):
    name, args = invertible_activation.name, invertible_activation.args
    z = activate(torch.full((4,), -100.0).to(dtype), name, args)
    y = deactivate(z, name, args)
    assert y.isfinite().all()
    assert (y < 0).all()


def test_only_increasing_functions_are_invertible(activation):
    y = values()
    z = activate(y, activation.name, activation.args)
    if activation.invertible:
        assert (z.diff() > 0).all()
        return
    with pytest.raises(ValueError, match="no inverse"):
        deactivate(z, activation.name, activation.args)


@pytest.mark.parametrize("name, args", [("leaky_relu", (-0.1,)), ("elu", (-1.0,)), ("celu", (-1.0,))])
def test_a_decreasing_branch_is_not_invertible(name, args):
    assert not Activation(name, args).invertible


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("swish", (), "unknown activation `swish`; allowed are identity, relu, .*mish"),
        ("relu", (1.0,), r"`relu` takes 0 arguments"),
        ("hardtanh", (1.0,), r"`hardtanh` takes 2 arguments \(min, max\), got 1"),
        ("hardtanh", (1.0, -1.0), r"`hardtanh` needs min <= max, got hardtanh\(1, -1\)"),
        ("celu", (0.0,), r"`celu` needs alpha != 0"),
        ("softplus", (0.0, 20.0), r"`softplus` needs beta > 0"),
        ("softshrink", (-0.5,), r"`softshrink` needs lambd >= 0"),
    ],
)
def test_what_is_not_an_activation_is_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        Activation(name, args)


def test_an_activation_is_a_value():
    assert Activation("hardtanh", [0, 6]) == Activation("hardtanh", (0.0, 6.0))
    assert {Activation("relu"): 1}[Activation("relu")] == 1
    assert str(Activation("leaky_relu", (0.01,))) == "leaky_relu(0.01)"


def test_every_rule_is_known_everywhere(activations):
    """To the kernels, to whoever reads a graph, to sub-batches, and to the tests of this folder."""
    spelled = {name for name, _ in spellings._ACTIVATIONS.values()} - {"relu6", "rrelu"}  # a hardtanh, a leaky ReLU
    assert spelled | {"identity", "gelu_tanh", "clamp", "open_clamp", "squared_relu"} == set(RULES) == set(ACTIVATIONS)
    assert spelled | {"clamp"} <= set(KINDS)
    assert {activation.name for activation in activations} == set(RULES)
