"""An infinity or a NaN in x: results and gradients have theirs where plain torch has them."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from normpass import kernels as library
from normpass import ops
from normpass.ops import Activation
from normpass.ops.activation import RULES, activate
from normpass.ops.norm_act_depthwise import norm_act_depthwise_on

VALUES = [float("inf"), float("-inf"), float("nan")]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
C, EPS = 4, 1e-5


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_activation(y, activation, layout):
    """As torch computes it. `layout` "strided" takes it past the loops over vectors, which treat some NaNs otherwise.

    (These loops have no rest here: there are as many values as fill vectors.)
    """
    if layout == "vectors":
        return activate(y, activation.name, activation.args)
    apart = torch.stack([y, y], -1)[..., 0]
    return activate(apart, activation.name, activation.args)


def patterns(tensors):
    """0 finite, 1 and 2 infinite, 3 NaN."""
    return [t.isnan() * 3 + (t == VALUES[0]) * 1 + (t == VALUES[1]) * 2 for t in tensors]


def differences(got, expected):
    """How many values of each are not of the kind of one of the expected ones."""
    wrong = []
    for own, *plain in zip(patterns(got), *map(patterns, expected), strict=True):
        wrong.append(int(torch.stack([own != p for p in plain]).all(0).sum()))
    return wrong


class Case:
    """A norm of one x, by plain torch and by the ops."""

    def __init__(self, activation, value, dtype, memory_format, residual=False, training=False):
        self.activation, self.training = activation, training
        x = drawn(2, C, 8, 8, dtype=dtype).contiguous(memory_format=memory_format)
        x[1, 2, 0, 7] = value
        self.x, self.weight, self.bias = (t.requires_grad_() for t in (x, drawn(C, dtype=dtype), drawn(C, dtype=dtype)))
        self.residual = None
        if residual:
            self.residual = (
                drawn(*x.shape, dtype=dtype, seed=1).contiguous(memory_format=memory_format).requires_grad_()
            )
        self.mean, self.var = drawn(C, dtype=dtype, seed=2), drawn(C, dtype=dtype, seed=3).square() + 0.5
        if training:
            self.var, self.mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        self.grad = drawn(*x.shape, dtype=dtype, seed=4).contiguous(memory_format=memory_format)
        self.leaves = [t for t in (x, self.residual, self.weight, self.bias) if t is not None]
        self.options = EPS, training, activation.name, list(activation.args)

    @property
    def values(self):
        return self.weight, self.bias, self.mean, self.var

    def plain(self, behind=lambda z: z, grad=None, leaves=()):
        found = []
        for layout in ("vectors", "strided"):
            moments = (None, None) if self.training else (self.mean, self.var)
            y = F.batch_norm(self.x, *moments, self.weight, self.bias, self.training, 0.1, EPS)
            y = y if self.residual is None else y + self.residual
            z = behind(plain_activation(y, self.activation, layout))
            grads = torch.autograd.grad(z, [*self.leaves, *leaves], self.grad if grad is None else grad)
            found.append([z.detach(), *grads])
        return found

    def ours(self, z, grad=None, leaves=()):
        return [z.detach(), *torch.autograd.grad(z, [*self.leaves, *leaves], self.grad if grad is None else grad)]


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float32, False), (torch.float64, False), (torch.float32, True)],
    ids=["frozen", "frozen, float64", "batch"],
)
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("by", ["reference", "kernels"])
def test_where_plain_has_them(by, layout, dtype, training, activation):
    wrong = {}
    for value in VALUES:
        for residual in (False, True):
            case = Case(activation, value, dtype, FORMATS[layout], residual, training)
            expected = case.plain()
            with library.disabled() if by == "reference" else nullcontext():
                z = ops.norm_act(case.x, case.residual, *case.values, *case.options)
                wrong[value, residual, "norm_act"] = differences(case.ours(z), expected)
                if not residual:
                    pieces = [case.x[:, :3], case.x[:, 3:]]
                    z = ops.cat_norm_act(pieces, *case.values, *case.options)
                    wrong[value, residual, "cat"] = differences(case.ours(z), expected)
    assert not any(map(any, wrong.values())), wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_depthwise_convolution_behind(dtype, activation):
    if library.kernels_for("cpu") is None:
        pytest.skip(library.status()[0].words)
    wrong = {}
    for value in VALUES:
        for width in (3, 5):
            case = Case(activation, value, dtype, torch.channels_last)
            kernel = drawn(C, 1, width, width, dtype=dtype).requires_grad_()
            padding = (width // 2,) * 2
            expected = case.plain(lambda z, k=kernel, p=padding: F.conv2d(z, k, None, 1, p, 1, C), case.grad, [kernel])
            y = norm_act_depthwise_on("cpu", case.x, case.values, case.options, kernel, None, (1, 1), padding)
            wrong[value, width] = differences(case.ours(y, case.grad, [kernel]), expected)
    assert not any(map(any, wrong.values())), wrong


@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("by", ["reference", "kernels"])
def test_in_place(by, layout, invertible_activation):
    """The gradient of x alone: that of the weight is made of x̂, which the saved result has not where it is flat."""
    for value in VALUES:
        case = Case(invertible_activation, value, torch.float32, FORMATS[layout])
        with library.disabled() if by == "reference" else nullcontext():
            got = case.ours(ops.inplace_abn(case.x, *case.values, *case.options))
        assert differences(got, case.plain())[:2] == [0, 0], value


@pytest.mark.parametrize("size", [200.0, 1e4, 1e30, 1e38])
def test_far_from_zero(size, activation):
    """Where an exponential is 0, and where it stood at the smallest there is: times 1e38 that was 1.6."""
    for sign in (1, -1):
        y = torch.full((2, 3, 4, 8), sign * size).requires_grad_()
        z = ops.norm_act(
            y, None, None, None, torch.zeros(3), torch.ones(3), 0.0, False, activation.name, activation.args
        )
        (dy,) = torch.autograd.grad(z.sum(), y)
        given = y.double() if activation.name == "softsign" else y  # of which autograd's gradient cancels
        expected = RULES[activation.name].forward(given, *activation.args).float()
        (expected_dy,) = torch.autograd.grad(expected.sum(), y)
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-37, equal_nan=True)
        torch.testing.assert_close(dy, expected_dy, rtol=1e-6, atol=1e-37, equal_nan=True)


def test_the_gradient_where_hardsigmoid_is_nan():
    """0, as ATen has it in all its loops."""
    y = torch.full((2, 3, 4, 8), float("nan")).requires_grad_()
    name = Activation("hardsigmoid").name
    residual = torch.zeros_like(y).requires_grad_()
    z = ops.norm_act(y, residual, None, None, torch.zeros(3), torch.ones(3), EPS, False, name, ())
    assert torch.autograd.grad(z.sum(), residual)[0].eq(0).all()
