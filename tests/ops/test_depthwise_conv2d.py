import pytest
import torch
import torch.nn.functional as F

from normpass import kernels as library
from normpass.kernels.cpu import depthwise as cpu_depthwise
from normpass.ops import depthwise_conv2d, depthwise_weight_gradient
from normpass.ops.depthwise_conv2d import DepthwiseConv2d, input_gradient_on

pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
# channels, rows and columns, kernel, stride, padding
SHAPES = [
    (3, (9, 11), (5, 5), (1, 1), (2, 2)),
    (40, (14, 9), (5, 5), (2, 2), (2, 2)),
    (16, (7, 7), (7, 7), (1, 1), (3, 3)),
    (33, (8, 6), (3, 7), (1, 2), (0, 1)),
    (5, (4, 5), (1, 5), (3, 1), (1, 4)),
    (17, (12, 3), (7, 5), (2, 1), (5, 1)),
    (6, (5, 5), (3, 3), (1, 1), (1, 1)),  # in planes too narrow for the kernel
    (20, (12, 11), (3, 3), (2, 2), (1, 1)),
    (6, (9, 8), (3, 4), (1, 1), (1, 1)),  # no loop for this width
    (6, (9, 30), (5, 5), (1, 3), (2, 2)),  # no loop for this stride
]


def case(shape, memory_format, dtype, samples=3):
    channels, size, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, *size, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(channels, 1, *kernel, generator=generator, dtype=torch.float64)
    x, weight = x.to(dtype).contiguous(memory_format=memory_format), weight.to(dtype)
    return x, weight, stride, padding


def output_like(x, weight, stride, padding):
    y = F.conv2d(x.double(), weight.double(), None, stride, padding, groups=x.shape[1])
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)


def exact(grad, x, weight, stride, padding):
    """The sum of the docstring, by torch's unfold: every value of grad times the patch it was made from."""
    samples, channels = x.shape[:2]
    patches = F.unfold(x.double(), weight.shape[2:], padding=padding, stride=stride)
    patches = patches.view(samples, channels, weight[0].numel(), -1)
    return torch.einsum("nckl,ncl->ck", patches, grad.double().flatten(2)).view(weight.shape)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient_against_float64(shape, layout, dtype, error):
    x, weight, stride, padding = case(shape, FORMATS[layout], dtype)
    grad = output_like(x, weight, stride, padding)
    got = depthwise_weight_gradient(grad, x, weight.shape[2:], stride, padding)
    assert got.dtype == dtype and got.shape == weight.shape
    assert got.is_contiguous(memory_format=FORMATS[layout])
    assert error(got, exact(grad, x, weight, stride, padding)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient_against_float64(shape, layout, dtype, error, monkeypatch):
    monkeypatch.setattr(cpu_depthwise, "_STREAMED_BYTES", 0)  # small ones by the kernel, too
    x, weight, stride, padding = case(shape, FORMATS[layout], dtype)
    grad = output_like(x, weight, stride, padding)
    got = input_gradient_on(library.kernels_for("cpu"), grad, x, weight, stride, padding)
    wide = x.double().requires_grad_()
    y = F.conv2d(wide, weight.double(), None, stride, padding, groups=x.shape[1])
    (expected,) = torch.autograd.grad(y, wide, grad.double())
    assert got.dtype == dtype and got.is_contiguous(memory_format=FORMATS[layout])
    assert error(got, expected) < ROUNDING[dtype]


def test_the_kernel_of_the_input_gradient_runs(monkeypatch, kernels):
    if kernels is None:
        pytest.skip("the reference runs, there is no kernel to look at")
    called = []
    monkeypatch.setattr(kernels.depthwise, "_convolve", lambda *args: called.append(args) or 0)
    for layout in FORMATS.values():
        x, weight, stride, padding = case(SHAPES[1], layout, torch.float32)
        input_gradient_on(kernels, output_like(x, weight, stride, padding), x, weight, stride, padding)
    assert len(called) == 1  # in planes there is none
    narrow = case((32, (40, 30), (3, 3), (1, 1), (1, 1)), FORMATS["channels_last"], torch.float32)
    for samples, times in ((54, 1), (55, 2)):  # with 3 columns only where 8 MiB are written
        x = narrow[0][:1].expand(samples, 32, 40, 30).contiguous(memory_format=FORMATS["channels_last"])
        input_gradient_on(kernels, torch.zeros_like(x), x, *narrow[1:])
        assert len(called) == times


@pytest.mark.parametrize("layout", list(FORMATS))
def test_many_samples_are_shared_among_threads(layout, error):
    x, weight, stride, padding = case((20, (16, 16), (5, 5), (1, 1), (2, 2)), FORMATS[layout], torch.float32, 9)
    grad = output_like(x, weight, stride, padding)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(depthwise_weight_gradient(grad, x, weight.shape[2:], stride, padding))
    finally:
        torch.set_num_threads(before)
    for got in results:
        assert error(got, exact(grad, x, weight, stride, padding)) < 2e-6


@pytest.mark.parametrize("grad_layout", ["expanded", "other", "sliced"])
@pytest.mark.parametrize("layout", list(FORMATS))
def test_any_strides(layout, grad_layout, error):
    x, weight, stride, padding = case(SHAPES[0], FORMATS[layout], torch.float64)
    grad = output_like(x, weight, stride, padding)
    if grad_layout == "expanded":
        grad = grad[:1, :, :1, :1].expand_as(grad)
    elif grad_layout == "sliced":
        grad = torch.cat([grad, grad], 1)[:, ::2][:, : x.shape[1]]
        x = torch.cat([x, x], 3)[..., : x.shape[3]]
    else:
        grad = grad.contiguous(memory_format=FORMATS["channels_last" if layout == "contiguous" else "contiguous"])
    got = depthwise_weight_gradient(grad, x, weight.shape[2:], stride, padding)
    assert error(got, exact(grad, x, weight, stride, padding)) < 1e-13


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("function", ["op", "eager"])
def test_is_conv2d(function, layout, with_bias, error):
    x, weight, stride, padding = case(SHAPES[1], FORMATS[layout], torch.float64)
    bias = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64) if with_bias else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])
    grad = output_like(x, weight, stride, padding)
    if function == "op":
        got = depthwise_conv2d(x, weight, bias, stride, padding)
    else:
        got = DepthwiseConv2d.apply(x, weight, bias, stride, padding, "cpu")
    assert torch.equal(got, expected) and got.stride() == expected.stride()
    expected_gradients = torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), expected_gradients, strict=True):
        assert error(a, b) < 1e-13


@pytest.mark.parametrize("function", ["op", "eager"])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_needed(function, frozen):
    x, weight, stride, padding = case(SHAPES[0], torch.contiguous_format, torch.float64)
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    if function == "op":
        y = depthwise_conv2d(x, weight, None, stride, padding)
    else:
        y = DepthwiseConv2d.apply(x, weight, None, stride, padding, "cpu")
    y.sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_gradients_of_gradients():
    x, weight, stride, padding = case((2, (5, 6), (3, 5), (1, 2), (1, 2)), torch.contiguous_format, torch.float64, 2)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    inputs = (x.requires_grad_(), weight.requires_grad_(), bias)
    for function in (depthwise_conv2d, lambda *args: DepthwiseConv2d.apply(*args, "cpu")):
        assert torch.autograd.gradcheck(lambda *t, f=function: f(*t, stride, padding), inputs)
        assert torch.autograd.gradgradcheck(lambda *t, f=function: f(*t, stride, padding), inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_opcheck():
    x, weight, stride, padding = case(SHAPES[0], torch.channels_last, torch.float64)
    grad = output_like(x, weight, stride, padding)
    args = (x.requires_grad_(), weight.requires_grad_(), None, stride, padding)
    torch.library.opcheck(torch.ops.normpass.depthwise_conv2d.default, args)
    args = (grad.requires_grad_(), x, weight.shape[2:], stride, padding)
    torch.library.opcheck(torch.ops.normpass.depthwise_weight_gradient.default, args)


@pytest.mark.parametrize("samples, rows", [(0, 5), (1, 1)])
def test_empty_and_small(samples, rows):
    x = torch.ones(samples, 2, rows, 5, dtype=torch.float64)
    grad = torch.ones(samples, 2, rows, 5, dtype=torch.float64)
    got = depthwise_weight_gradient(grad, x, (5, 5), (1, 1), (2, 2))
    assert got.shape == (2, 1, 5, 5)
    assert torch.equal(got[:, 0, 2], torch.tensor([3.0, 4, 5, 4, 3]).double().expand(2, 5) * samples * (rows == 1))


def test_what_does_not_fit():
    x = torch.ones(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"`grad` must have shape \(2, 3, 6, 6\)"):
        depthwise_weight_gradient(torch.ones(2, 3, 5, 6), x, (5, 5), (1, 1), (2, 2))
    with pytest.raises(ValueError, match="must have the dtype of `x`"):
        depthwise_weight_gradient(x.double(), x, (5, 5), (1, 1), (2, 2))
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\)"):
        depthwise_weight_gradient(x[0], x[0], (5, 5), (1, 1), (2, 2))
    with pytest.raises(ValueError, match="must have one dtype"):
        depthwise_conv2d(x, torch.ones(3, 3, 5, 5), None, (1, 1), (2, 2))


def test_the_kernel_is_what_runs(monkeypatch, kernels):
    if kernels is None:
        pytest.skip("the reference runs, there is no kernel to look at")
    called = []
    monkeypatch.setattr(kernels.depthwise, "_weight_gradient", lambda *args: called.append(args) or 0)
    x, weight, stride, padding = case(SHAPES[0], torch.contiguous_format, torch.float32)
    depthwise_weight_gradient(output_like(x, weight, stride, padding), x, weight.shape[2:], stride, padding)
    assert len(called) == 1
    with library.disabled():
        depthwise_weight_gradient(output_like(x, weight, stride, padding), x, weight.shape[2:], stride, padding)
    assert len(called) == 1
