import pytest
import torch
import torch.nn.functional as F

from normpass import kernels as library
from normpass.ops import winograd_conv2d, winograd_weight_gradient
from normpass.ops.winograd_conv2d import WinogradConv2d, pays

pytestmark = pytest.mark.usefixtures("kernels", "always")

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6}
# samples, channels, result's channels, rows and columns, padding
SHAPES = [
    (2, 3, 5, (7, 9), (1, 1)),
    (1, 16, 16, (8, 8), (1, 1)),
    (3, 17, 40, (5, 31), (1, 0)),
    (2, 33, 65, (6, 4), (0, 2)),
    (4, 130, 12, (3, 3), (0, 0)),
    (2, 8, 64, (1, 2), (2, 1)),
    (1, 5, 3, (40, 70), (2, 2)),  # a row of tiles is longer than what is worked on at a time
    (2, 1, 1, (4, 5), (1, 1)),
]


def case(shape, memory_format=torch.contiguous_format, dtype=torch.float64, weight_format=None):
    samples, channels, results, size, padding = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, *size, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(results, channels, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(results, generator=generator, dtype=torch.float64)
    y = F.conv2d(x, weight, bias, padding=padding)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    x, grad = (t.to(dtype).contiguous(memory_format=memory_format) for t in (x, grad))
    weight = weight.to(dtype).contiguous(memory_format=weight_format or memory_format)
    return x, weight, bias.to(dtype), grad, padding


def exact(x, weight, grad, padding):
    """The sums of the docstring, by torch's unfold: results without bias, and the gradients of x and the weight."""
    patches = F.unfold(x.double(), 3, padding=padding)
    y = (weight.double().flatten(1) @ patches).view(grad.shape)
    dweight = torch.einsum("nol,nkl->ok", grad.double().flatten(2), patches).view(weight.shape)
    spread = weight.double().flatten(1).T @ grad.double().flatten(2)
    dx = F.fold(spread, x.shape[2:], 3, padding=padding)
    return y, dx, dweight


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("weight_layout", list(FORMATS))
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_sums(shape, layout, weight_layout, dtype, error):
    x, weight, bias, grad, padding = case(shape, FORMATS[layout], dtype, FORMATS[weight_layout])
    y, dx, dweight = exact(x, weight, grad, padding)
    for given in (bias, None):
        got = winograd_conv2d(x, weight, given, padding)
        expected = y if given is None else y + bias.double().view(1, -1, 1, 1)
        assert got.dtype == dtype and got.stride() == F.conv2d(x, weight, given, padding=padding).stride()
        assert error(got, expected) < ROUNDING[dtype]
    assert error(winograd_conv2d(grad, weight, None, padding, transposed=True), dx) < ROUNDING[dtype]
    got = winograd_weight_gradient(grad, x, padding)
    assert got.dtype == dtype and got.is_contiguous(memory_format=FORMATS[layout])
    assert error(got, dweight) < ROUNDING[dtype]


@pytest.mark.parametrize("layout", list(FORMATS))
def test_rounds_about_as_the_vendor(layout, kernels):
    if kernels is None:
        pytest.skip("the vendor's runs")
    x, weight, _, grad, padding = case((4, 64, 64, (28, 28), (1, 1)), FORMATS[layout], torch.float32)
    got = [winograd_conv2d(x, weight, None, padding), winograd_conv2d(grad, weight, None, padding, transposed=True)]
    got.append(winograd_weight_gradient(grad, x, padding))
    with library.disabled():
        vendor = [winograd_conv2d(x, weight, None, padding), winograd_conv2d(grad, weight, None, padding, True)]
        vendor.append(winograd_weight_gradient(grad, x, padding))
    for own, other, true in zip(got, vendor, exact(x, weight, grad, padding), strict=True):
        assert (own - true).abs().mean() <= 1.5 * (other - true).abs().mean()


@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("channels", [16, 300])
def test_threads_share_the_work(layout, channels, error):
    x, weight, _, grad, padding = case((9, channels, 33, (6, 11), (1, 1)), FORMATS[layout], torch.float32)
    y, dx, dweight = exact(x, weight, grad, padding)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert error(winograd_conv2d(x, weight, None, padding), y) < 2e-6
            assert error(winograd_conv2d(grad, weight, None, padding, transposed=True), dx) < 2e-6
            results = [winograd_weight_gradient(grad, x, padding) for _ in range(2)]
            assert error(results[0], dweight) < 2e-6 and torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("grad_layout", ["expanded", "other", "sliced"])
@pytest.mark.parametrize("layout", list(FORMATS))
def test_any_strides(layout, grad_layout, error):
    x, weight, _, grad, padding = case(SHAPES[0], FORMATS[layout])
    if grad_layout == "expanded":
        grad = grad[:1, :, :1, :1].expand_as(grad)
    elif grad_layout == "sliced":
        grad = torch.cat([grad, grad], 1)[:, ::2][:, : grad.shape[1]]
        x = torch.cat([x, x], 3)[..., : x.shape[3]]
        weight = torch.cat([weight, weight], 3)[..., 1:4]
    else:
        grad = grad.contiguous(memory_format=FORMATS["channels_last" if layout == "contiguous" else "contiguous"])
    y, dx, dweight = exact(x, weight, grad, padding)
    assert error(winograd_conv2d(x, weight, None, padding), y) < 1e-14
    assert error(winograd_conv2d(grad, weight, None, padding, transposed=True), dx) < 1e-14
    assert error(winograd_weight_gradient(grad, x, padding), dweight) < 1e-14


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("function", ["op", "eager"])
def test_is_conv2d(function, layout, with_bias, error):
    x, weight, bias, grad, padding = case(SHAPES[2], FORMATS[layout])
    bias = bias if with_bias else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = F.conv2d(x, weight, bias, padding=padding)
    if function == "op":
        got = winograd_conv2d(x, weight, bias, padding)
    else:
        got = WinogradConv2d.apply(x, weight, bias, padding, "cpu")
    assert error(got, expected) < 1e-14 and got.stride() == expected.stride()
    gradients = torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), gradients, strict=True):
        assert error(a, b) < 1e-14 and a.stride() == b.stride()


def test_is_conv_transpose2d(error):
    x, weight, _, grad, padding = case(SHAPES[2])
    bias = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    expected = F.conv_transpose2d(grad, weight, bias, padding=padding)
    assert error(winograd_conv2d(grad, weight, bias, padding, transposed=True), expected) < 1e-14


@pytest.mark.parametrize("function", ["op", "eager"])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_needed(function, frozen):
    x, weight, _, _, padding = case(SHAPES[0])
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    if function == "op":
        y = winograd_conv2d(x, weight, None, padding)
    else:
        y = WinogradConv2d.apply(x, weight, None, padding, "cpu")
    y.sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_gradients_of_gradients():
    x, weight, bias, grad, padding = case((2, 2, 3, (4, 3), (1, 0)))
    for t in (x, weight, bias, grad):
        t.requires_grad_()
    functions = {
        lambda *t: winograd_conv2d(*t, padding): (x, weight, bias),
        lambda *t: WinogradConv2d.apply(*t, padding, "cpu"): (x, weight, bias),
        lambda *t: winograd_conv2d(*t, None, padding, transposed=True): (grad, weight),
        lambda *t: winograd_weight_gradient(*t, padding): (grad, x),
    }
    for function, inputs in functions.items():
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("layout", list(FORMATS))
def test_opcheck(layout):
    x, weight, bias, grad, padding = case(SHAPES[0], FORMATS[layout])
    x, weight, bias, grad = (t.requires_grad_() for t in (x, weight, bias, grad))
    torch.library.opcheck(torch.ops.normpass.winograd_conv2d.default, (x, weight, bias, padding))
    torch.library.opcheck(torch.ops.normpass.winograd_conv2d.default, (grad, weight, None, padding, True))
    torch.library.opcheck(torch.ops.normpass.winograd_weight_gradient.default, (grad, x, padding))


def test_empty():
    x, weight = torch.ones(0, 4, 6, 6), torch.ones(5, 4, 3, 3)
    y = winograd_conv2d(x, weight, None, (1, 1))
    assert y.shape == (0, 5, 6, 6)
    assert torch.equal(winograd_weight_gradient(y, x, (1, 1)), torch.zeros(5, 4, 3, 3))


def test_what_does_not_fit():
    x, weight = torch.ones(2, 3, 6, 6), torch.ones(4, 3, 3, 3)
    with pytest.raises(ValueError, match="must have one dtype"):
        winograd_conv2d(x.double(), weight, None, (1, 1))
    with pytest.raises(ValueError, match=r"`weight` \(O, C, 3, 3\) must have one dtype"):
        winograd_conv2d(x, weight[:, :2], None, (1, 1))
    with pytest.raises(ValueError, match=r"`weight` \(C, O, 3, 3\)"):
        winograd_conv2d(x, weight, None, (1, 1), transposed=True)
    with pytest.raises(ValueError, match="`padding` must be from 0 to 2"):
        winograd_conv2d(x, weight, None, (1, 3))
    with pytest.raises(ValueError, match=r"`grad` must have shape \(2, 4, 6, 6\)"):
        winograd_weight_gradient(torch.ones(2, 4, 5, 6), x, (1, 1))
    with pytest.raises(ValueError, match="must have the dtype of `x`"):
        winograd_weight_gradient(torch.ones(2, 4, 6, 6).double(), x, (1, 1))


def test_the_kernels_are_what_runs(monkeypatch, kernels):
    if kernels is None:
        pytest.skip("the reference runs, there is no kernel to look at")
    called = []
    for name in ("_convolve", "_weight_gradient"):
        monkeypatch.setattr(kernels.winograd, name, lambda *args, name=name: called.append(name) or 0)

    def all_three():
        x, weight, _, grad, padding = case(SHAPES[0], dtype=torch.float32)
        winograd_conv2d(x, weight, None, padding)
        winograd_conv2d(grad, weight, None, padding, transposed=True)
        winograd_weight_gradient(grad, x, padding)

    all_three()
    assert called == ["_convolve", "_convolve", "_weight_gradient"]
    with library.disabled():
        all_three()
    assert len(called) == 3


def test_where_the_user_allows_fewer_bits_the_vendor_runs(monkeypatch, kernels):
    if kernels is None:
        pytest.skip("the reference runs anyway")
    x = torch.ones(2, 32, 64, 64)
    assert pays(kernels.winograd, x, 32, (1, 1)) and not pays(kernels.winograd, x.bfloat16(), 32, (1, 1))
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        assert not pays(kernels.winograd, x, 32, (1, 1))
        called = []
        monkeypatch.setattr(kernels.winograd, "_convolve", lambda *args: called.append(args) or 0)
        winograd_conv2d(x, torch.ones(32, 32, 3, 3), None, (1, 1))
        assert not called
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
