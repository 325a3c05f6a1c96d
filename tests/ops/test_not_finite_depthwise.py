"""An infinity or a NaN near a border of a depthwise convolution: results have theirs where torch's have them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from normpass import kernels as library
from normpass.ops.depthwise_conv2d import DepthwiseConv2d
from normpass.ops.norm_act_depthwise import norm_act_depthwise_on

VALUES = [float("inf"), float("-inf"), float("nan")]
PLACES = {"corner": (0, 0), "last": (-1, -1), "left": (5, 0), "right": (5, -1), "below": (-1, 5), "inside": (5, 5)}
WIDTHS, STRIDES, SIZE = (3, 5, 7), (1, 2), 13
IDENTITY = 1e-12, False, "identity", []
"""options of a norm in eval mode, with mean 0 and variance 1"""


def patterns(tensors):
    """0 finite, 1 and 2 infinite, 3 NaN."""
    return [t.isnan() * 3 + (t == VALUES[0]) * 1 + (t == VALUES[1]) * 2 for t in tensors]


def drawn(width, stride, dtype, memory_format, channels):
    generator = torch.Generator().manual_seed(0)
    side = (SIZE + 2 * (width // 2) - width) // stride + 1
    shapes = {"x": (2, channels, SIZE, SIZE), "grad": (2, channels, side, side), "weight": (channels, 1, width, width)}
    found = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    return {n: t if n == "weight" else t.contiguous(memory_format=memory_format) for n, t in found.items()}


def plant(tensors, where, place, value):
    t = tensors[where]
    row, column = (min(i, t.shape[-1] - 1) for i in PLACES[place])
    t[(1, 2) if where != "weight" else (2, 0)][row, column] = value


def results(y, x, weight, grad):
    return [y.detach(), *torch.autograd.grad(y, [x, weight], grad)]


def wrong_places(width, stride, dtype, memory_format, is_fused, channels):
    """Of every result whose pattern is not the vendor's: what was planted where."""
    wrong = []
    for where, place, value in itertools.product(("x", "grad", "weight"), PLACES, VALUES):
        tensors = drawn(width, stride, dtype, memory_format, channels)
        plant(tensors, where, place, value)
        x, weight, grad = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_(), tensors["grad"]
        steps = (stride, stride), (width // 2, width // 2)
        expected = results(F.conv2d(x, weight, None, *steps, 1, channels), x, weight, grad)
        if is_fused:
            values = None, None, torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
            y = norm_act_depthwise_on("cpu", x, values, IDENTITY, weight, None, *steps)
            if y is None:  # not with such a weight
                assert where == "weight"
                continue
        else:
            y = DepthwiseConv2d.apply(x, weight, None, *steps, "cpu")
        pairs = zip(patterns(results(y, x, weight, grad)), patterns(expected), strict=True)
        names = ("y", "dx", "dweight")
        wrong += [(name, where, place, value) for name, (a, b) in zip(names, pairs, strict=True) if not a.equal(b)]
    return wrong


CASES = {
    "float32, channels_last": (torch.float32, torch.channels_last, False),
    "float64, channels_last": (torch.float64, torch.channels_last, False),
    "float32": (torch.float32, torch.contiguous_format, False),
    "bfloat16": (torch.bfloat16, torch.contiguous_format, False),
    "float32, behind a norm": (torch.float32, torch.channels_last, True),
    "float64, behind a norm": (torch.float64, torch.channels_last, True),
}


@pytest.mark.parametrize("case", CASES)
def test_where_torch_has_them(case):
    if library.kernels_for("cpu") is None:
        pytest.skip(library.status()[0].words)
    dtype, memory_format, is_fused = CASES[case]
    wrong = {}
    for width, stride, channels in itertools.product(WIDTHS, STRIDES, (4, 20)):
        found = wrong_places(width, stride, dtype, memory_format, is_fused, channels)
        if found:
            wrong[width, stride, channels] = len(found), found[0]
    assert not wrong


def test_a_finite_weight_has_a_kernel_behind_a_norm():
    """Or the cases above would test nothing."""
    if library.kernels_for("cpu") is None:
        pytest.skip(library.status()[0].words)
    tensors = drawn(5, 1, torch.float32, torch.channels_last, 20)
    values = None, None, torch.zeros(20), torch.ones(20)
    assert (
        norm_act_depthwise_on("cpu", tensors["x"], values, IDENTITY, tensors["weight"], None, (1, 1), (2, 2))
        is not None
    )
