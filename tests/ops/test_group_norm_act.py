"""Group and instance norm with an activation: against ATen's, in every layout, size and dtype."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.ops import Activation
from normpass.ops.activation import activate
from normpass.ops.group_norm_act import GroupNormOptions, group_norm_act_on, rebuild_group_norm_act
from normpass.ops.sample_norm import sample_norms_of

KERNELS = sample_norms_of("cpu")
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built")

LAYOUTS = ("contiguous", "channels_last", "every_other", "slice of channels_last")
SIZES = [
    (2, 8),
    (3, 8, 7),
    (2, 8, 5, 6),
    (1, 8, 4, 4),
    (5, 8, 1, 1),
    (2, 8, 3, 4, 2),
    (2, 64, 31, 33),
    (1, 8, 1, 90001),
]


def laid_out(t: Tensor, layout: str) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if layout == "every_other":
        return torch.stack([t, t * 0], -1)[..., 0]
    if last is None or layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=last)
    return torch.cat([t, t], 1).contiguous(memory_format=last)[:, : t.shape[1]]


def plain(options: GroupNormOptions, x, residual, weight, bias) -> Tensor:
    """Instance norm by group norm: its own backward is wrong for one sample in channels_last (torch 2.11 to 2.15)."""
    y = F.group_norm(x, options.groups, weight, bias, options.eps)
    return activate(y if residual is None else y + residual, options.activation, options.activation_args)


def tensors(size, layout="contiguous", residual=True, affine=True, dtype=torch.float64, parameters=None, offset=1.0):
    torch.manual_seed(0)
    x = laid_out(torch.randn(size, dtype=torch.float64) * 2 + offset, layout)
    added = laid_out(torch.randn(size, dtype=torch.float64), layout) if residual else None
    vectors = [torch.rand(size[1], dtype=torch.float64) - 0.3, torch.randn(size[1], dtype=torch.float64)]
    found = [x.to(dtype), None if added is None else added.to(dtype)]
    found += [v.to(parameters or dtype) if affine else None for v in vectors]
    return [t if t is None else t.detach().requires_grad_() for t in found]


def results(function, given, grad):
    z = function(*given)
    sources = [t for t in given if t is not None]
    return [z, *torch.autograd.grad(z, sources, grad)]


def ours(options):
    return lambda x, residual, weight, bias: group_norm_act_on(KERNELS, x, residual, weight, bias, None, options)[0]


def assert_alike(options, given, grad, tolerance=1e-12):
    wide = [t if t is None else t.detach().double().requires_grad_() for t in given]
    expected = results(lambda *t: plain(options, *t), wide, grad.double())
    found = results(ours(options), given, grad)
    for name, a, b in zip(("z", "dx", "second", "third", "fourth"), found, expected, strict=False):
        scale = b.abs().max().clamp(min=1e-3)
        assert ((a.double() - b).abs().max() / scale).item() < tolerance, name
    return found


def options_of(size, kind, activation="silu", args=()):
    groups = {"group": 4, "one group": 1, "instance": size[1], "instance norm": size[1]}[kind]
    return GroupNormOptions(groups, 1e-5, activation, args, kind == "instance norm")


@pytest.mark.parametrize("size, layout", [*itertools.product(SIZES, LAYOUTS)], ids=str)
def test_every_layout_and_size(size, layout) -> None:
    has_one = math.prod(size[2:]) == 1
    for kind in ("group", "one group", "instance", "instance norm"):
        if kind.startswith("instance") and has_one:
            continue  # one value a group: ATen refuses it
        for residual, affine in ((True, True), (False, True), (False, False)):
            given = tensors(size, layout, residual, affine)
            grad = laid_out(torch.randn(size, dtype=torch.float64), layout)
            found = assert_alike(options_of(size, kind), given, grad, 1e-11)
            x = given[0].detach()
            y = F.instance_norm(x) if kind == "instance norm" else F.group_norm(x, options_of(size, kind).groups)
            assert found[0].stride() == F.silu(y).stride()


@pytest.mark.parametrize(
    "activation", ["identity", "relu", "leaky_relu", "hardtanh", "gelu", "elu", "mish", "hardswish"]
)
def test_activations(activation) -> None:
    args = {"leaky_relu": (0.2,), "hardtanh": (-0.5, 0.7), "elu": (0.8,)}.get(activation, ())
    assert Activation(activation, args)
    for layout, residual in itertools.product(("contiguous", "channels_last"), (True, False)):
        given = tensors((2, 8, 9, 11), layout, residual)
        grad = torch.randn(1, dtype=torch.float64).expand(2, 8, 9, 11)  # as after `.sum()`
        assert_alike(options_of((2, 8, 9, 11), "group", activation, args), given, grad)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str
)
def test_narrow_dtypes(dtype, tolerance) -> None:
    for size, kind in itertools.product([(3, 8, 5, 6), (2, 24, 17, 13), (2, 8, 3, 4, 5)], ("group", "instance norm")):
        for layout, parameters in itertools.product(("contiguous", "channels_last"), (torch.float32, dtype)):
            given = tensors(size, layout, True, True, dtype, parameters)
            found = assert_alike(options_of(size, kind), given, torch.randn(size).to(dtype), tolerance)
            assert [t.dtype for t in found] == [dtype, dtype, dtype, parameters, parameters]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_units_and_threads(threads) -> None:
    """Units run side by side where there are enough of them, else the threads share each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, layout in itertools.product([(7, 32, 40, 40), (1, 32, 64, 64), (64, 64, 4, 4)], LAYOUTS[:2]):
            for kind in ("group", "one group", "instance norm"):
                given = tensors(size, layout)
                assert_alike(options_of(size, kind), given, torch.randn(size, dtype=torch.float64), 1e-11)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_mean_of_a_thousand_standard_deviations_costs_no_more_than_in_aten(layout) -> None:
    size = (2, 16, 48, 48)
    given = tensors(size, layout, False, True, torch.float32, offset=2000.0)
    exact = plain(options_of(size, "group"), *[t if t is None else t.double() for t in given])
    errors = [
        (f(*given).double() - exact).abs().max().item()
        for f in (ours(options_of(size, "group")), lambda *t: plain(options_of(size, "group"), *t))
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_made_again_it_is_the_same_bit_for_bit() -> None:
    for layout, kind in itertools.product(LAYOUTS, ("group", "instance norm")):
        x, residual, weight, bias = tensors((3, 8, 33, 31), layout, dtype=torch.float32)
        options = options_of(x.shape, kind)
        z, mean, var = group_norm_act_on(KERNELS, x, residual, weight, bias, None, options)
        assert not mean.requires_grad and not var.requires_grad
        with torch.no_grad():
            again = rebuild_group_norm_act(x, residual, weight, bias, mean, var, options)
        assert torch.equal(z, again) and z.stride() == again.stride()


def test_first_and_second_derivatives() -> None:
    for kind, residual, activation in itertools.product(
        ("group", "instance norm"), (True, False), ("silu", "identity")
    ):
        given = tensors((2, 4, 3, 2), "contiguous", residual)
        options = GroupNormOptions(2 if kind == "group" else 4, 1e-3, activation, (), kind != "group")
        present = [t for t in given if t is not None]

        def call(*present, options=options, residual=residual):
            x, *rest = present
            return ours(options)(x, rest.pop(0) if residual else None, *rest)

        assert torch.autograd.gradcheck(call, present)
        assert torch.autograd.gradgradcheck(call, present)


def test_only_what_is_needed_gets_a_gradient() -> None:
    options = options_of((2, 8, 5, 5), "group")
    for needed in itertools.product((True, False), repeat=4):
        if not any(needed):
            continue
        given = [t.detach().requires_grad_(n) for t, n in zip(tensors((2, 8, 5, 5)), needed, strict=True)]
        sources = [t for t in given if t.requires_grad]
        grad = torch.randn(2, 8, 5, 5, dtype=torch.float64)
        pairs = [torch.autograd.grad(f(*given), sources, grad) for f in (ours(options), lambda *t: plain(options, *t))]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "leaky_relu"])
def test_what_is_not_finite_spoils_what_it_spoils_in_aten(value, activation) -> None:
    args = (0.2,) if activation == "leaky_relu" else ()
    for layout, kind, where in itertools.product(LAYOUTS[:2], ("group", "instance norm"), ("x", "grad")):
        given = tensors((2, 8, 6, 5), layout, False)
        grad = torch.randn(2, 8, 6, 5, dtype=torch.float64)
        with torch.no_grad():
            (given[0] if where == "x" else grad)[1, 3, 2, 2] = value
        options = options_of((2, 8, 6, 5), kind, activation, args)
        found = results(ours(options), given, grad)
        expected = results(functools.partial(plain, options), given, grad)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
