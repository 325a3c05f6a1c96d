"""Every CUDA kernel, executed on the CPU through the real host code, against the formulas in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import cuda_checks as checks
import cuda_special as special
import pytest
import torch
from cuda_checks import Site
from cuda_emulated import COMPILER, EmulatedDevice

from normpass.kernels.contract import ACTIVATIONS, Layout, Norm, Running
from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.kernels import CudaKernels
from normpass.kernels.masks import bytes_of_mask

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to run CUDA sources on the CPU")

ROWS = [Layout(700, 24, 1), Layout(333, 5, 1), Layout(90, 100, 1), Layout(40, 300, 1), Layout(1, 7, 1)]
PLANES = [Layout(6, 3, 49), Layout(3, 5, 196), Layout(9, 24, 8), Layout(2, 2, 3136), Layout(500, 1, 9)]
FEWER = [ROWS[0], ROWS[2], PLANES[0], PLANES[2]]
FEWEST = [ROWS[0], PLANES[0]]  # for dtypes that differ from the others in little
CASES = [
    pytest.param(dtype, layout, id=f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, layout))}")
    for dtype in checks.DTYPES
    for layout in {torch.float32: [*ROWS, *PLANES], torch.bfloat16: FEWER}.get(dtype, FEWEST)
]
EACH_CASE = pytest.mark.parametrize("dtype, layout", CASES)


@pytest.fixture
def kernels(device: EmulatedDevice) -> Iterator[CudaKernels]:
    device.launches.clear()
    device.reversed = False
    yield CudaKernels(device)
    assert not device.counters.any(), "a kernel left its counters set"


@EACH_CASE
def test_moments(kernels, dtype, layout):
    x = torch.randn(layout, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    checks.check_moments(kernels, x.to(dtype), layout)


@pytest.mark.parametrize("layout", [Layout(4000, 4, 1), Layout(4, 2, 3136)])
@pytest.mark.parametrize("place", [0, 700, None], ids=["first", "inside", "none"])
def test_moments_of_hard_values(kernels, layout, place):
    x = torch.randn(layout, generator=torch.Generator().manual_seed(2)) + 1000
    if place is not None:
        x.movedim(1, -1).reshape(-1, layout.channels)[place] += 1e6
        x.movedim(1, 0).reshape(layout.channels, -1)  # a copy: the outlier goes in below
        x[place // layout.inner, :, place % layout.inner] = -1e6
    checks.check_moments(kernels, x, layout)


def test_moments_of_a_small_outlier_before_constants(kernels):
    x = torch.full((3000, 3, 1), 1000.0) + torch.randn(3000, 3, 1) * 1e-1
    x[0] = 0
    checks.check_moments(kernels, x, Layout(3000, 3, 1))


def test_moments_of_constants_and_single_values(kernels):
    for layout in (Layout(1, 4, 1), Layout(1, 1, 1), Layout(2000, 3, 1)):
        mean, var = torch.empty(layout.channels), torch.empty(layout.channels)
        kernels.moments(mean, var, torch.full(layout, 3.7), layout)
        assert (mean == torch.tensor(3.7)).all() and (var == 0).all()


@EACH_CASE
def test_norm_act(kernels, dtype, layout):
    checks.check_norm_act(kernels, Site(layout, dtype, "relu", residual=True))


@EACH_CASE
def test_norm_act_backward(kernels, dtype, layout):
    checks.check_norm_act_backward(kernels, Site(layout, dtype, "relu", residual=True))


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_gradient_in_two_parts(kernels, dtype):
    for layout in FEWEST:
        checks.check_gradient_in_two_parts(kernels, Site(layout, dtype, "relu", residual=True))


MASKED = [
    *((torch.bfloat16, layout) for layout in (ROWS[0], ROWS[1], PLANES[0], PLANES[1], PLANES[2])),
    *((dtype, layout) for dtype in (torch.float32, torch.float64) for layout in (ROWS[0], PLANES[1])),
    (torch.float16, ROWS[2]),
]


@pytest.mark.parametrize("dtype, layout", MASKED, ids=str)
def test_a_mask_in_the_place_of_the_residual(kernels, dtype, layout):
    checks.check_mask(kernels, Site(layout, dtype, "relu", residual=True))


def test_a_mask_is_refused_where_vectors_would_be_others(kernels):
    """Its bits would lie elsewhere than backward reads them."""
    site, layout = Site(ROWS[0], torch.float32, "relu", residual=True), ROWS[0]
    z = torch.empty(site.x.numel() + 1)[1:].view(site.x.shape)
    mask = torch.empty(bytes_of_mask(layout, 4), dtype=torch.uint8)
    with pytest.raises(
        CudaError, match="norm_act: a mask is of vectors of 16 bytes, and a tensor lies at a multiple of 4"
    ):
        kernels.norm_act(z, site.x, site.added, site.norm, layout, mask)


@pytest.mark.parametrize("dtype, layout", [MASKED[0], MASKED[3], MASKED[5], MASKED[8]], ids=str)
def test_a_residual_that_is_normalized_as_it_is_read(kernels, dtype, layout):
    checks.check_normalized_residual(kernels, Site(layout, dtype, "relu", residual=True))


@pytest.mark.parametrize("activation", ["hardtanh", "leaky_relu"])
def test_masks_of_other_activations(kernels, activation):
    for frozen in (False, True):
        site = Site(PLANES[0], torch.float32, activation, residual=True, batch_statistics=not frozen)
        checks.check_mask(kernels, site)


def test_a_mask_is_read_whatever_the_gradients_begin_with(kernels):
    """Autograd may hand over a part of something: an address that no vector may be read at."""
    site = Site(ROWS[0], torch.bfloat16, "relu", residual=True)
    mask = torch.empty(bytes_of_mask(site.layout, 2), dtype=torch.uint8)
    kernels.norm_act(torch.empty_like(site.x), site.x, site.added, site.norm, site.layout, mask)
    elsewhere = torch.cat([torch.zeros(1, dtype=site.dtype), site.grad.flatten()])[1:].view(site.grad.shape)
    assert elsewhere.data_ptr() % 16
    found = [checks.outputs(site, (True,) * 4) for _ in range(2)]
    for results, grad in zip(found, (site.grad, elsewhere), strict=True):
        kernels.norm_act_backward(*results, grad, site.x, None, site.norm, True, site.layout, grad, mask)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EACH_CASE
def test_inplace_abn_backward(kernels, dtype, layout):
    checks.check_inplace_abn_backward(kernels, Site(layout, dtype, "leaky_relu").keep_weight_from_zero())


PIECES = {  # of the layouts above
    24: (16, 8),
    5: (2, 3),
    100: (64, *[2] * 18),
    300: (4, 256, 40),
    7: (7,),
    3: (1, 2),
    2: (1, 1),
    1: (1,),
}


@EACH_CASE
def test_cat_norm_act(kernels, dtype, layout):
    site, pieces = Site(layout, dtype, "relu"), PIECES[layout.channels]
    z = checks.check_cat_norm_act(kernels, site, pieces)
    assert torch.equal(z, checks.check_norm_act(kernels, site)), "not the bits of norm_act"


@EACH_CASE
def test_cat_norm_act_backward(kernels, dtype, layout):
    site, pieces = Site(layout, dtype, "relu"), PIECES[layout.channels]
    checks.check_cat_norm_act_backward(kernels, site, pieces)
    checks.check_cat_norm_act_backward(kernels, site, pieces, [index % 2 == 0 for index in range(len(pieces))])


def test_cat_norm_act_of_as_many_pieces_as_there_may_be(kernels):
    site = Site(Layout(90, 100, 1), torch.float32)
    pieces = [*[1] * (kernels.most_pieces - 1), 101 - kernels.most_pieces]
    checks.check_cat_norm_act(kernels, site, pieces)
    checks.check_cat_norm_act_backward(kernels, site, pieces, [True] * len(pieces))


def test_what_is_not_wanted_of_pieces(kernels):
    layout = Layout(700, 24, 1)
    site = Site(layout, torch.float32)
    xs = checks.split(site, site.x, (16, 8))
    dxs, totals = [None, torch.full_like(xs[1], torch.nan)], [None, None]
    kernels.cat_norm_act_backward(dxs, [False, False], totals, None, None, site.grad, xs, site.norm, layout)
    want = (site.scale()[:, None] * site.dy(site.y()))[:, 16:]
    checks.assert_close("dx", dxs[1], want, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, activation):
    site = Site(Layout(300, 5, 1), torch.float32, activation)
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, True, True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "elu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_activations_in_other_dtypes(kernels, dtype, activation):
    site = Site(Layout(300, 8, 1), dtype, activation)
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, True, True))


@pytest.mark.parametrize("activation", checks.INVERTIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverses(kernels, dtype, activation):
    site = Site(Layout(300, 5, 1), dtype, activation).keep_weight_from_zero()
    checks.check_inplace_abn_backward(kernels, site)


@pytest.mark.parametrize("batch_statistics", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_norm_act_backward_computes_what_is_needed(kernels, residual, activation, batch_statistics):
    site = Site(Layout(700, 24, 1), torch.float32, activation, residual, batch_statistics=batch_statistics)
    for needs in itertools.product([True, False], [residual, False], [True, False], [True, False]):
        if any(needs):
            checks.check_norm_act_backward(kernels, site, needs)
            if activation == "identity" or not residual:
                checks.check_gradient_in_two_parts(kernels, site, needs)


@pytest.mark.parametrize("batch_statistics", [True, False], ids=["batch", "frozen"])
def test_inplace_abn_backward_computes_what_is_needed(kernels, batch_statistics):
    site = Site(Layout(700, 24, 1), torch.float32, "leaky_relu", batch_statistics=batch_statistics)
    for needs in itertools.product([True, False], repeat=3):
        if any(needs):
            checks.check_inplace_abn_backward(kernels, site, needs)


def test_passes_over_memory(kernels, device):
    """Frozen statistics take one pass, whatever is needed; the batch's take two where dx is needed."""
    layout = Layout(700, 24, 1)
    for frozen, needs, entries in [
        (False, (True, True, True, True), ["reduce", "apply"]),
        (False, (False, True, True, True), ["reduce"]),
        (False, (False, True, False, False), ["apply"]),
        (True, (True, True, True, True), ["reduce"]),
        (True, (True, True, False, False), ["apply"]),
    ]:
        device.launches.clear()
        site = Site(layout, torch.float32, residual=True, batch_statistics=not frozen)
        checks.check_norm_act_backward(kernels, site, needs)
        assert [entry for _, entry, _ in device.launches] == entries


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_without_affine(kernels, frozen):
    site = Site(Layout(300, 5, 1), torch.float32, "leaky_relu", affine=False, batch_statistics=not frozen)
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, False, False))
    checks.check_inplace_abn_backward(kernels, site, (True, False, False))


def test_weights_around_zero(kernels):
    weight = torch.tensor([0.0, -0.0, 1e-30, -1e-30, -0.7, 2.0, 1e-3, -1e-3])
    site = Site(Layout(600, 8, 1), torch.float32, "leaky_relu", weight=weight, bias=torch.zeros(8))
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, True, True))
    checks.check_inplace_abn_backward(kernels, site)


def test_inplace_abn_backward_is_finite_at_the_floor(kernels):
    layout = Layout(64, 4, 1)
    z = torch.full(layout, -1.0)
    dx, dweight, dbias = torch.full(layout, torch.nan), torch.empty(4), torch.empty(4)
    weight, bias, var = torch.tensor([1.0, 0.0, -1.0, 1e-20]), torch.ones(4), torch.ones(4)
    norm = Norm(weight, bias, None, var, 1e-5, "elu", (1.0,))
    kernels.inplace_abn_backward(dx, dweight, dbias, torch.ones(layout), z, norm, True, layout)
    assert all(t.isfinite().all() for t in (dx, dweight, dbias))
    assert (dx[:, 1] == 0).all()


def test_large_mean(kernels):
    site = Site(Layout(2000, 4, 1), torch.float32, "silu", offset=1000.0)
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, True, True))


def test_relu_mask_is_that_of_forward(kernels):
    layout = Layout(600, 8, 1)
    x = torch.randn(layout).mul(1e-3).round(decimals=4)  # many y within rounding of 0
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    weight, bias = torch.rand(8), torch.zeros(8)
    bias = -(x[0, :, 0] - mean) * weight * (var + checks.EPS).rsqrt()
    z, dx = torch.empty_like(x), torch.empty_like(x)
    norm = Norm(weight, bias, mean, var, checks.EPS, "relu", ())
    kernels.norm_act(z, x, None, norm, layout)
    kernels.norm_act_backward(dx, None, None, None, torch.ones_like(x), x, None, norm, False, layout)
    assert torch.equal(z > 0, dx != 0)


def test_a_mask_lets_nan_through(kernels):
    layout = Layout(16, 8, 1)
    x, residual, grad = torch.zeros(layout), torch.zeros(layout), torch.ones(layout)
    residual[3], residual[4], residual[5], residual[6] = torch.nan, torch.inf, -torch.inf, -0.0
    z, dx, mask = torch.empty_like(x), torch.empty_like(x), torch.empty(16, dtype=torch.uint8)
    norm = Norm(None, None, torch.zeros(8), torch.ones(8), 0.0, "relu", ())
    kernels.norm_act(z, x, residual, norm, layout, mask)
    kernels.norm_act_backward(dx, None, None, None, grad, x, None, norm, False, layout, None, mask)
    assert dx[:, 0, 0].tolist() == [0, 0, 0, 1, 1, *[0] * 11]


def test_relu_lets_nan_through(kernels):
    layout = Layout(16, 8, 1)
    x = torch.zeros(layout)
    x[3] = torch.nan
    z = torch.empty_like(x)
    kernels.norm_act(z, x, None, Norm(None, None, torch.zeros(8), torch.ones(8), 0.0, "relu", ()), layout)
    assert z[3].isnan().all() and not z[:3].isnan().any()


@pytest.mark.parametrize("layout", [Layout(90, 8, 1), Layout(2, 3, 32)], ids=["rows", "planes"])
def test_what_is_no_number_stays_in_its_place(kernels, layout):
    for activation in ("relu", "identity", "leaky_relu"):
        special.check_norm_act_backward(kernels, layout, activation)
    special.check_cat_norm_act_backward(kernels, layout)
    for activation in ("identity", "leaky_relu"):
        special.check_inplace_abn_backward(kernels, layout, activation)


def test_unaligned_tensors(kernels, device):
    """A tensor may begin anywhere: one value into its storage, no access is wider than a value."""
    layout = Layout(200, 8, 1)
    x = torch.randn(200 * 8 + 1)[1:].view(layout)
    checks.check_moments(kernels, x, layout)
    assert ("NORMPASS_VECTOR", "1") in device.launches[-1][0].macros


@pytest.mark.parametrize("layout", [Layout(4000, 24, 1), Layout(8, 2, 3136)], ids=["rows", "planes"])
def test_blocks_may_come_in_any_order(kernels, device, layout):
    """The last block, whichever it is, finishes the reduction, and the result is the same to the bit."""
    site = Site(layout, torch.float32)
    found = []
    for device.reversed in (False, True, False):
        mean, var = torch.empty(layout.channels), torch.empty(layout.channels)
        kernels.moments(mean, var, site.x, layout)
        results = checks.outputs(site, (True, False, True, True))
        kernels.norm_act_backward(*results, site.grad, site.x, None, site.norm, True, layout)
        found.append([mean, var, *(t for t in results if t is not None)])
    assert max(slabs for _, _, (_, slabs) in device.launches) > 1
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_stats(kernels, dtype):
    for channels in (1, 1000):
        running = Running(torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype), 0.1)
        mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)
        want = 0.9 * running.mean + 0.1 * mean, 0.9 * running.var + 0.1 * var * 20 / 19
        kernels.running_stats(running, mean, var, 20)
        for got, wanted in zip(running[:2], want, strict=True):
            torch.testing.assert_close(got, wanted)
