"""The CUDA kernels on a GPU, against the formulas in float64; streams, graphs, threads and the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import cuda_checks as checks
import cuda_special as special
import pytest
import sample_norm_checks as sample_checks
import torch
from cuda_checks import Site
from sample_norm_checks import SampleSite

from normpass.kernels.contract import ACTIVATIONS, Groups, Layout, Norm, Rows, Running
from normpass.kernels.cuda import library as cuda_library
from normpass.kernels.cuda.library import GuardedKernels

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

LAYOUTS = [
    Layout(64 * 56 * 56, 64, 1),
    Layout(256 * 7 * 7, 2048, 1),
    Layout(5000, 3, 1),
    Layout(999, 5, 1),
    Layout(4096, 100, 1),
    Layout(1, 7, 1),
    Layout(32, 64, 3136),
    Layout(64, 500, 49),
    Layout(9, 24, 8),
    Layout(100000, 1, 9),
]
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda s: "x".join(map(str, s)))
EACH_DTYPE = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
SMALL = Layout(40000, 24, 1)


@pytest.fixture(scope="session")
def kernels() -> GuardedKernels:
    found, words = cuda_library.load()
    if found is None:
        pytest.skip(words)
    return found


@EACH_LAYOUT
@EACH_DTYPE
def test_moments(kernels, dtype, layout):
    site = Site(layout, dtype, device="cuda")
    checks.check_moments(kernels, site.x, layout)


@EACH_LAYOUT
@EACH_DTYPE
def test_concatenations(kernels, dtype, layout):
    """In pieces of one channel, of a third, and the rest; every other one is added to."""
    third = layout.channels // 3
    pieces = [n for n in (1, third, layout.channels - 1 - third) if n > 0]
    site = Site(layout, dtype, device="cuda")
    checks.check_cat_norm_act(kernels, site, pieces)
    checks.check_cat_norm_act_backward(kernels, site, pieces)
    checks.check_cat_norm_act_backward(kernels, site, pieces, [index % 2 == 0 for index in range(len(pieces))])


@pytest.mark.parametrize("layout", [Layout(200000, 16, 1), Layout(16, 4, 12544)], ids=["rows", "planes"])
@pytest.mark.parametrize("outlier", [False, True])
def test_moments_of_hard_values(kernels, layout, outlier):
    x = torch.randn(layout, device="cuda", generator=torch.Generator("cuda").manual_seed(2)) + 1000
    if outlier:
        x[0, :, 0] = -1e6
    checks.check_moments(kernels, x, layout)


@EACH_LAYOUT
@EACH_DTYPE
def test_norm_act_and_its_backward(kernels, dtype, layout):
    for residual in (False, True):
        site = Site(layout, dtype, "relu", residual, device="cuda")
        checks.check_norm_act(kernels, site)
        checks.check_norm_act_backward(kernels, site)
        checks.check_gradient_in_two_parts(kernels, site)
    checks.check_mask(kernels, site)
    checks.check_normalized_residual(kernels, site)


@EACH_LAYOUT
@EACH_DTYPE
def test_inplace_abn_backward(kernels, dtype, layout):
    site = Site(layout, dtype, "leaky_relu", device="cuda").keep_weight_from_zero()
    checks.check_inplace_abn_backward(kernels, site)


@EACH_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, dtype, activation):
    site = Site(SMALL, dtype, activation, device="cuda")
    checks.check_norm_act(kernels, site)
    checks.check_norm_act_backward(kernels, site, (True, False, True, True))
    if activation in checks.INVERTIBLE:
        checks.check_inplace_abn_backward(kernels, site.keep_weight_from_zero())


RUNS = [
    Groups(32, 32, 256, 56 * 56, False),
    Groups(64, 32, 512, 49, False),
    Groups(16, 64, 64, 112 * 112, False),
    Groups(4, 1, 64, 40000, False),
    Groups(512, 8, 64, 1, True),
    Groups(3, 4, 8, 7, False),
    *(Rows(5000, width, is_centred) for width in (7, 96, 768, 4099) for is_centred in (True, False)),
    Rows(300, 70000, True),
    Rows(4, 800000, True),
]


@EACH_DTYPE
@pytest.mark.parametrize("shape", RUNS, ids=lambda s: "x".join(map(str, s)))
def test_norms_of_samples(kernels, dtype, shape):
    for residual in (False, True) if isinstance(shape, Groups) else (False,):
        site = SampleSite(shape, dtype, "silu", residual, device="cuda")
        first, again = (sample_checks.check(kernels.sample_norms, site) for _ in range(2))
        assert all(a is b or torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    assert not kernels.failures


@EACH_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_behind_norms_of_samples(kernels, dtype, activation):
    for shape in (Groups(20, 4, 16, 196, False), Rows(700, 384, True)):
        sample_checks.check(kernels.sample_norms, SampleSite(shape, dtype, activation, device="cuda"))


@pytest.mark.parametrize("needs", [(True, True, False, False), (False, True, True, True), (True, True, True, True)])
def test_frozen_statistics(kernels, needs):
    site = Site(SMALL, torch.bfloat16, "silu", residual=True, batch_statistics=False, device="cuda")
    checks.check_norm_act_backward(kernels, site, needs)


def test_what_is_no_number_stays_in_its_place(kernels):
    for layout in (Layout(4000, 24, 1), Layout(20, 3, 3136)):
        special.check_norm_act_backward(kernels, layout, "relu", "cuda")
        special.check_cat_norm_act_backward(kernels, layout, "cuda")
        special.check_inplace_abn_backward(kernels, layout, "leaky_relu", "cuda")


def test_running_stats(kernels):
    mean, var, old = torch.randn(700, device="cuda"), torch.rand(700, device="cuda"), torch.rand(700, device="cuda")
    running = Running(old.clone(), old.clone(), 0.1)
    kernels.running_stats(running, mean, var, 20)
    torch.testing.assert_close(running.mean, 0.9 * old + 0.1 * mean)
    torch.testing.assert_close(running.var, 0.9 * old + 0.1 * var * 20 / 19)


def test_every_16_bit_value_is_converted_as_torch_does(kernels):
    """z = x + residual, both of them every bit pattern that is a number, rounded to nearest even."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
        x = bits[bits.isfinite()].reshape(-1, 8, 1)[:, :, :]
        added = x.flatten()[torch.randperm(x.numel(), device="cuda")].view_as(x)
        layout, zeros, ones = Layout(*x.shape), torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
        z = torch.empty_like(x)
        kernels.norm_act(z, x, added, Norm(None, None, zeros, ones, 0.0, "identity", ()), layout)
        torch.testing.assert_close(z, (x.float() + added.float()).to(dtype), rtol=0, atol=0)


def step(kernels: GuardedKernels, site: Site) -> list[torch.Tensor]:
    """Moments, forward and backward: new tensors."""
    mean, var, z = torch.empty_like(site.mean), torch.empty_like(site.var), torch.empty_like(site.x)
    results = [torch.empty_like(site.x), torch.empty_like(site.mean), torch.empty_like(site.mean)]
    dx, dweight, dbias = results
    norm = site.norm._replace(mean=mean, var=var, activation="relu", activation_args=())
    kernels.moments(mean, var, site.x, site.layout)
    kernels.norm_act(z, site.x, None, norm, site.layout)
    kernels.norm_act_backward(dx, None, dweight, dbias, site.grad, site.x, None, norm, True, site.layout)
    return [mean, var, z, *results]


def test_a_graph_replays(kernels):
    site = Site(SMALL, torch.bfloat16, device="cuda")
    step(kernels, site)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(kernels, site)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        site.x.normal_(1.0, 2.0)
        graph.replay()
        for got, want in zip(captured, step(kernels, site), strict=True):
            assert torch.equal(got, want)


def test_a_kernel_may_be_compiled_inside_a_capture(kernels):
    site = Site(SMALL, torch.float32, "mish", device="cuda")
    fresh, _ = cuda_library.load()
    z = torch.empty_like(site.x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh.norm_act(z, site.x, None, site.norm, site.layout)
    graph.replay()
    checks.assert_close("z", z, site.z(), site.dtype)


def test_kernels_may_be_loaded_inside_a_capture(kernels):
    """By an op that is the first of all: the probe runs beside the capture."""
    site = Site(SMALL, torch.float32, device="cuda")
    want, graph = step(kernels, site), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh, words = cuda_library.load()
        assert fresh is not None, words
        captured = step(fresh, site)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_graphs_that_run_beside_each_other(kernels):
    """Each was captured on the same stream, and each is replayed on its own: none counts in the other's block."""
    sites = [Site(SMALL, torch.float32, offset=offset, device="cuda") for offset in (0.0, 3.0)]
    wanted, graphs = [step(kernels, site) for site in sites], [torch.cuda.CUDAGraph() for _ in sites]
    captured = []
    for site, graph in zip(sites, graphs, strict=True):
        with torch.cuda.graph(graph):
            captured.append(step(kernels, site))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_streams_do_not_share_counters(kernels):
    sites = [Site(SMALL, torch.float32, offset=offset, device="cuda") for offset in (0.0, 3.0)]
    wanted = [step(kernels, site) for site in sites]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(20):
        for stream, site, results in zip(streams, sites, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(kernels, site))
    torch.cuda.synchronize()
    for results, want in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for got in results for a, b in zip(got, want, strict=True))


def test_a_thread_without_a_context(kernels):
    site = Site(SMALL, torch.float32, device="cuda")
    want = step(kernels, site)
    found: list[list[torch.Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(step(kernels, site)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found[0], want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current(kernels):
    with torch.cuda.device(0):
        checks.check_norm_act_backward(kernels, Site(SMALL, torch.float32, device="cuda:1"))
        assert torch.cuda.current_device() == 0


def test_processes_share_compiled_kernels(kernels, tmp_path):
    script = (
        "import sys, torch\n"
        "from normpass.kernels.contract import Layout\n"
        "from normpass.kernels.cuda import compiler as cuda_compiler, library as cuda_library\n"
        "calls, compiled = [], cuda_compiler.compile_variant\n"
        "cuda_compiler.compile_variant = lambda *args, **more: calls.append(args) or compiled(*args, **more)\n"
        "kernels, _ = cuda_library.load()\n"
        "x, mean, var = torch.ones(64, 8, 1, device='cuda'), *torch.empty(2, 8, device='cuda')\n"
        "kernels.moments(mean, var, x, Layout(64, 8, 1))\n"
        "assert (mean == 1).all()\n"
        "print(len(calls))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    outputs = [subprocess.check_output(command, env=environment, text=True) for _ in range(2)]
    assert [int(output) for output in outputs] == [2, 0]  # the probe and moments


@pytest.mark.parametrize("layout", [Layout(2**31 // 64 + 1000, 64, 1), Layout(3, 2, 2**29 + 8)], ids=["rows", "planes"])
def test_more_values_than_32_bits_count(kernels, layout):
    outer, channels, inner = layout
    if torch.cuda.mem_get_info()[0] < 12 * outer * channels * inner:
        pytest.skip("needs more GPU memory")
    x = torch.randn(outer, channels, 1, dtype=torch.bfloat16, device="cuda").expand(layout).contiguous()
    x[-1, :, -8:] = 30.0
    mean, var, z = torch.empty(channels, device="cuda"), torch.empty(channels, device="cuda"), torch.empty_like(x)
    kernels.moments(mean, var, x, layout)
    torch.testing.assert_close(mean, x.mean((0, 2), dtype=torch.float32), rtol=1e-3, atol=1e-3)
    kernels.norm_act(z, x, None, Norm(None, None, mean, var, 0.0, "identity", ()), layout)
    ends = (slice(0, 2), slice(None), slice(0, 8)), (slice(-2, None), slice(None), slice(-8, None))
    for end in ends:
        want = (x[end].float() - mean[:, None]) * var.rsqrt()[:, None]
        torch.testing.assert_close(z[end].float(), want, rtol=1e-2, atol=1e-2)
