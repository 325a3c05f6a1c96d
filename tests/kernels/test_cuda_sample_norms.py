"""The CUDA kernels of norms with a sample's own statistics, executed on the CPU, against ATen in float64."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import cuda_checks
import sample_norm_checks as checks
from cuda_emulated import COMPILER, EmulatedDevice
from sample_norm_checks import SampleSite

from normpass.kernels import plain_sample_norms
from normpass.kernels.contract import ACTIVATIONS, Groups, Rows
from normpass.kernels.cuda.counting import CountingDevice
from normpass.kernels.cuda.kernels import CudaKernels
from normpass.kernels.cuda.sample_norms import CudaSampleNorms

EMULATED = pytest.mark.skipif(COMPILER is None, reason="needs g++ to run CUDA sources on the CPU")

GROUPS = [
    Groups(3, 4, 8, 49, False),
    Groups(2, 2, 4, 4, False),
    Groups(5, 4, 16, 1, True),
    Groups(2, 1, 6, 700, False),
    Groups(2, 3, 3, 64, False),
    Groups(1, 1, 4, 20000, False),
]
ROWS = [Rows(5, 7, True), Rows(9, 96, True), Rows(3, 1100, True), Rows(2, 9000, True), Rows(4, 1, True)]
RMS = [Rows(7, 40, False), Rows(2, 2049, False)]
FEWER = [GROUPS[0], GROUPS[2], GROUPS[3], ROWS[1], RMS[0]]


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDevice:
    return EmulatedDevice(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def kernels(device: EmulatedDevice) -> Iterator[CudaSampleNorms]:
    device.launches.clear()
    device.reversed = False
    yield CudaKernels(device).sample_norms
    assert not device.counters.any(), "a kernel left its counters set"


def sites(shapes, dtype, activation="relu") -> Iterator[SampleSite]:
    for shape in shapes:
        yield SampleSite(shape, dtype, activation, residual=isinstance(shape, Groups))


@EMULATED
@pytest.mark.parametrize("shape", [*GROUPS, *ROWS, *RMS], ids=str)
def test_every_shape(kernels, shape):
    checks.check(kernels, SampleSite(shape, torch.float32, residual=isinstance(shape, Groups)))


@EMULATED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_other_dtypes(kernels, dtype):
    for site in sites(FEWER if dtype == torch.bfloat16 else FEWER[:3:2], dtype):
        checks.check(kernels, site)


@EMULATED
def test_activations(kernels):
    for shape, activation in zip(itertools.cycle((GROUPS[1], Rows(6, 12, True))), ACTIVATIONS, strict=False):
        checks.check(kernels, SampleSite(shape, torch.float32, activation))


@EMULATED
@pytest.mark.parametrize("shape", [GROUPS[1], GROUPS[2], ROWS[1], RMS[0]], ids=str)
def test_only_what_is_needed(kernels, device, shape):
    site, launched = SampleSite(shape, torch.float32, "relu", isinstance(shape, Groups)), set()
    for needs in itertools.product((True, False), repeat=4):
        if any(found is not None for found in site.outputs(needs).values()):
            device.launches.clear()
            checks.check(kernels, site, needs)
            launched.add(tuple(entry for _, entry, _ in device.launches[2:]))
    sums = {("plane_sums", "gradients", "over_samples"), ("plane_sums", "over_samples"), ("plane_sums", "gradients")}
    rows = {("gradients", "over_rows"), ("over_rows",), ("gradients",)}
    assert launched == (sums | {("gradients",)} if shape == GROUPS[1] else rows)


@EMULATED
def test_without_a_weight_and_a_bias(kernels):
    for shape in (GROUPS[0], GROUPS[2], ROWS[1], RMS[0]):
        checks.check(kernels, SampleSite(shape, torch.float32, "silu", affine=False))


@EMULATED
def test_a_mean_of_a_thousand_standard_deviations(kernels):
    for shape in (GROUPS[3], ROWS[3]):
        site = SampleSite(shape, torch.float32, "identity", offset=1500.0)
        norm = site.new_norm()
        checks.forward(kernels, site, norm, False)
        wide = site.x.double().reshape(norm.var.numel(), -1)
        assert ((norm.mean.view(-1).double() - wide.mean(1)).abs() < 2e-4).all()  # an ulp and a half
        assert ((norm.var.view(-1).double() / wide.var(1, correction=0) - 1).abs() < 1e-5).all()


@EMULATED
def test_few_long_runs_are_shared_out(kernels, device):
    """Their moments come from a kernel of their own, over several blocks, and so does the rest."""
    checks.check(kernels, SampleSite(GROUPS[5], torch.float32, residual=True))
    grids = {entry: grid for _, entry, grid in device.launches}
    assert grids["moments"][1] > 1 and grids["sample_norm_act"][1] > 1 and grids["gradients"][1] > 1


@EMULATED
def test_unaligned_tensors(kernels, device):
    """Of x one value into its storage: no access is wider than a value. Of the weight alone: it is copied."""
    for shape in (GROUPS[1], ROWS[1]):
        site = SampleSite(shape, torch.float32, "silu")
        whole, site.weight = site.x, torch.cat([site.weight[:1], site.weight])[1:]
        for width in (4, 1):
            device.launches.clear()
            checks.check(kernels, site)
            forward, _, *others = [dict(variant.macros)["NORMPASS_VECTOR"] for variant, _, _ in device.launches]
            assert others[:2] == [str(width)] * 2 and forward == others[0]
            site.x = torch.empty(whole.numel() + 1)[1:].view(whole.shape).copy_(whole)


@EMULATED
@pytest.mark.parametrize("shape", [GROUPS[0], GROUPS[3], GROUPS[5], ROWS[1], ROWS[3]], ids=str)
def test_threads_and_blocks_may_come_in_any_order(kernels, device, shape):
    site, found = SampleSite(shape, torch.float32), []
    for device.reversed in (False, True):
        found.append(checks.check(kernels, site).values())
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found, strict=True))


@EMULATED
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_spoils_its_own_run_alone(kernels, value):
    for shape, place in itertools.product((GROUPS[1], GROUPS[2], ROWS[1]), ("x", "grad")):
        site = SampleSite(shape, torch.float32, "silu")
        getattr(site, place).view(-1)[3] = value
        want_z, want = site.wanted()
        norm = site.new_norm()
        z = checks.forward(kernels, site, norm, False)
        assert torch.equal(z.isfinite(), want_z.isfinite())
        for name, got in checks.backward(kernels, site, norm).items():
            assert got is None or torch.equal(got.isfinite(), want[name].isfinite()), name


def test_bytes_are_counted():
    """Forward x, residual, z; backward of planes grad, x and residual twice, dx, dresidual; of rows 3 and 2."""
    device = CountingDevice()
    kernels = CudaKernels(device).sample_norms
    for shape, arrays in ((GROUPS[0], [3, 3, 5, 0]), (ROWS[1], [2, 3, 2])):
        site = SampleSite(shape, torch.bfloat16, "silu", isinstance(shape, Groups))
        device.launches.clear()
        norm = site.new_norm()
        checks.forward(kernels, site, norm, False)
        checks.backward(kernels, site, norm)
        assert [moved.bytes for moved in device.launches] == [n * 2 * site.x.numel() for n in arrays]


@pytest.mark.parametrize("dtype", cuda_checks.DTYPES, ids=str)
def test_the_plain_formulas(dtype):
    last = [Groups(3, 4, 8, 49, True), Groups(2, 2, 4, 4, True)]
    for site in sites([*FEWER, *last], dtype):
        checks.check(plain_sample_norms, site)
