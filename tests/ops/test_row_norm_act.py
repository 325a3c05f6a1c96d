"""Layer and RMS norm over the last dimensions with an activation: against ATen's, in every width and dtype."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.ops.activation import activate
from normpass.ops.row_norm_act import RowNormOptions, rebuild_row_norm_act, row_norm_act_on
from normpass.ops.sample_norm import sample_norms_of

KERNELS = sample_norms_of("cpu")
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built")

SHAPES = [
    ((5, 7), 1),
    ((3, 4, 96), 1),
    ((2, 3, 5, 16), 2),
    ((4, 1), 1),
    ((1, 8, 9, 33), 3),
    ((6, 2049), 1),
    ((300, 17), 1),
]


def plain(options: RowNormOptions, x, weight, bias) -> Tensor:
    if options.is_rms_norm:
        y = F.rms_norm(x, options.normalized_shape, weight, options.eps)
    else:
        y = F.layer_norm(x, options.normalized_shape, weight, bias, options.eps)
    return activate(y, options.activation, options.activation_args)


def tensors(shape, dims, affine=True, dtype=torch.float64, parameters=None, offset=1.0):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 2 + offset
    vectors = [torch.rand(shape[-dims:], dtype=torch.float64) - 0.3, torch.randn(shape[-dims:], dtype=torch.float64)]
    found = [x.to(dtype), *[v.to(parameters or dtype) if affine else None for v in vectors]]
    return [t if t is None else t.detach().requires_grad_() for t in found]


def results(function, given, grad):
    z = function(*given)
    return [z, *torch.autograd.grad(z, [t for t in given if t is not None], grad)]


def ours(options):
    return lambda x, weight, bias: row_norm_act_on(KERNELS, x, weight, bias, None, options)[0]


def assert_alike(options, given, grad, tolerance=1e-12):
    given = [*given[:2], None] if options.is_rms_norm else given
    wide = [t if t is None else t.detach().double().requires_grad_() for t in given]
    expected = results(lambda *t: plain(options, *t), wide, grad.double())
    found = results(ours(options), given, grad)
    for name, a, b in zip(("z", "dx", "dweight", "dbias"), found, expected, strict=False):
        scale = b.abs().max().clamp(min=1.0)
        assert ((a.double() - b).abs().max() / scale).item() < tolerance, name
    return found


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape, dims", SHAPES, ids=str)
def test_every_width(shape, dims, is_rms) -> None:
    for activation, affine in itertools.product(("identity", "gelu", "relu"), (True, False)):
        options = RowNormOptions(shape[-dims:], 1e-5, activation, (), is_rms)
        found = assert_alike(options, tensors(shape, dims, affine), torch.randn(shape, dtype=torch.float64))
        assert found[0].is_contiguous()


def test_an_input_and_a_gradient_that_are_not_contiguous() -> None:
    options = RowNormOptions((8,), 1e-5, "silu", (), False)
    _, weight, bias = tensors((2, 8), 1)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).permute(0, 2, 3, 1).requires_grad_()
    grad = torch.randn(1, dtype=torch.float64).expand(x.shape)
    assert_alike(options, [x, weight, bias], grad)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str
)
def test_narrow_dtypes(dtype, tolerance) -> None:
    for shape, parameters, is_rms in itertools.product([(9, 40), (3, 5, 768)], (torch.float32, dtype), (False, True)):
        options = RowNormOptions(shape[-1:], 1e-5, "gelu", (), is_rms)
        given = tensors(shape, 1, True, dtype, parameters)
        found = assert_alike(options, given, torch.randn(shape).to(dtype), tolerance)
        assert [t.dtype for t in found] == [dtype, dtype, parameters, parameters][: len(found)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_shared_among_threads(threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((4096, 48), (2, 40000), (3, 20000)):
            options = RowNormOptions(shape[-1:], 1e-5, "silu", (), False)
            assert_alike(options, tensors(shape, 1), torch.randn(shape, dtype=torch.float64), 1e-11)
    finally:
        torch.set_num_threads(before)


def test_a_mean_of_a_thousand_standard_deviations_costs_no_more_than_in_aten() -> None:
    options = RowNormOptions((768,), 1e-5, "identity", (), False)
    given = tensors((64, 768), 1, True, torch.float32, offset=2000.0)
    exact = plain(options, *[t.double() for t in given])
    errors = [(f(*given) - exact).abs().max().item() for f in (ours(options), lambda *t: plain(options, *t))]
    assert errors[0] <= 1.5 * errors[1]


def test_made_again_it_is_the_same_bit_for_bit() -> None:
    for is_rms, activation in itertools.product((False, True), ("identity", "gelu")):
        x, weight, bias = tensors((33, 70), 1, dtype=torch.float32)
        options = RowNormOptions((70,), 1e-6, activation, (), is_rms)
        z, mean, var = row_norm_act_on(KERNELS, x, weight, bias, None, options)
        with torch.no_grad():
            again = rebuild_row_norm_act(x, weight, bias, mean, var, options)
        assert torch.equal(z, again) and not mean.requires_grad and not var.requires_grad


def test_first_and_second_derivatives() -> None:
    for is_rms, activation in itertools.product((False, True), ("silu", "identity")):
        given = tensors((4, 6), 1)
        options = RowNormOptions((6,), 1e-3, activation, (), is_rms)
        present = given[:2] if is_rms else given
        call = lambda x, weight, bias=None, options=options: ours(options)(x, weight, bias)  # noqa: E731
        assert torch.autograd.gradcheck(call, present)
        assert torch.autograd.gradgradcheck(call, present)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_spoils_what_it_spoils_in_aten(value) -> None:
    for activation, where in itertools.product(("identity", "gelu"), ("x", "grad")):
        given, grad = tensors((7, 40), 1), torch.randn(7, 40, dtype=torch.float64)
        with torch.no_grad():
            (given[0] if where == "x" else grad)[3, 11] = value
        options = RowNormOptions((40,), 1e-5, activation, (), False)
        found = results(ours(options), given, grad)
        expected = results(functools.partial(plain, options), given, grad)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
