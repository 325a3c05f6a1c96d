"""The CUDA kernels through the real host code and a stub driver: whatever fails, every op gives its numbers."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import cuda_checks as checks
import pytest
import sample_norm_checks as sample_checks
import torch
from cuda_checks import Site
from cuda_emulated import COMPILER
from cuda_stub import Code, Stubs
from sample_norm_checks import SampleSite
from torch import nn

import normpass
from normpass import kernels as normpass_kernels
from normpass.kernels.contract import Groups, Layout, Rows, Running
from normpass.kernels.cuda import compiler as cuda_compiler
from normpass.kernels.cuda import library as cuda_library
from normpass.kernels.cuda.compiler import cache_folder, target_for
from normpass.kernels.cuda.counters import SMALLEST_BLOCK, Counters

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to run CUDA sources on the CPU")

SITE = Site(Layout(700, 24, 1), torch.float32, residual=True)
LOST = RuntimeError("Function cuSomething not found")


@pytest.fixture
def stubs(device, monkeypatch, tmp_path):
    stubs = Stubs(device)
    stubs.install(monkeypatch, tmp_path)
    return stubs


def loaded():
    kernels, words = cuda_library.load()
    assert kernels is not None, words
    return kernels


def every_op(kernels):
    mean, var = torch.empty_like(SITE.mean), torch.empty_like(SITE.var)
    running = Running(torch.zeros(24), torch.ones(24), 0.5)
    kernels.moments(mean, var, SITE.x, SITE.layout, running)
    torch.testing.assert_close((mean, var, 2 * running.mean), (SITE.mean, SITE.var, SITE.mean))
    checks.check_norm_act(kernels, SITE)
    checks.check_norm_act_backward(kernels, SITE)
    checks.check_cat_norm_act(kernels, Site(SITE.layout, SITE.dtype), (16, 8))
    checks.check_cat_norm_act_backward(kernels, Site(SITE.layout, SITE.dtype), (16, 8), (True, False))
    invertible = Site(SITE.layout, SITE.dtype, "leaky_relu").keep_weight_from_zero()
    checks.check_inplace_abn_backward(kernels, invertible)
    for shape in (Groups(2, 2, 8, 4, False), Rows(6, 12, True)):
        sample_checks.check(kernels.sample_norms, SampleSite(shape, SITE.dtype, "silu"), bit_for_bit=False)
    kernels.running_stats(running, 3 * SITE.mean, SITE.var, 10)
    torch.testing.assert_close(running.mean, 1.75 * SITE.mean)


def test_every_op_runs_as_a_kernel(stubs, device):
    kernels = loaded()
    assert stubs.counts()["cuLaunchKernel"] == 1, "the probe"
    device.launches.clear()
    every_op(kernels)
    assert not kernels.failures and len(device.launches) >= 18
    assert {source for (source, _), _, _ in device.launches} >= {
        *("moments", "norm_act", "running_stats", "sample_norm_act", "sample_norm_act_backward"),
        *("over_samples", "over_rows"),
    }


def test_any_failure_at_load_is_a_reason(stubs):
    """Each function that loading calls, on each of its calls, by its code and by an exception."""
    loaded()
    called = stubs.counts()
    assert len(called) > 15
    for name, count in called.items():
        for failure in (Code.OUT_OF_MEMORY, LOST):
            for after in range(count):
                stubs.forget()
                empty_the_cache()
                stubs.fail(name, failure, after)
                kernels, words = cuda_library.load()
                assert kernels is None and name in words, (name, after, words)


def empty_the_cache():
    for entry in cache_folder().glob("*"):
        entry.unlink()


def test_a_wrong_result_of_the_probe_is_a_reason(stubs, monkeypatch):
    monkeypatch.setattr(stubs.driver, "cuLaunchKernel", lambda *args: (), raising=False)
    kernels, words = cuda_library.load()
    assert kernels is None and "the probe" in words


def test_any_failure_later_is_made_up_for(stubs):
    """Every function, on its first and on a later call after loading: the numbers are right, and it is said why."""
    kernels, before = loaded(), stubs.counts()
    every_op(kernels)
    called = {name: count - before.get(name, 0) for name, count in stubs.counts().items()}
    called = {name: count for name, count in called.items() if count}
    assert {"cuLaunchKernel", "cuModuleLoadData", "cuMemAlloc", "nvrtcCompileProgram"} <= set(called)
    for name, count in called.items():
        for failure, after in ((Code.NO_BINARY_FOR_GPU, 0), (LOST, count - 1)):
            empty_the_cache()
            stubs.forget()
            kernels = loaded()
            stubs.fail(name, failure, after)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                every_op(kernels)
            said = [str(w.message) for w in caught]
            assert len(said) == len(set(said)) == len(kernels.failures), said
            assert stubs.of(name).fails[name][0] < 0, f"{name} was not called"
            assert name == "cuLaunchKernel" or any(name in words for words in kernels.failures), (name, said)


def test_a_source_that_is_gone_is_made_up_for(stubs, monkeypatch, tmp_path):
    kernels = loaded()
    monkeypatch.setattr(cuda_compiler, "FOLDER", tmp_path)
    with pytest.warns(RuntimeWarning, match="norm_act.*FileNotFoundError"):
        checks.check_norm_act(kernels, SITE)


def test_a_failure_is_warned_about_once_and_shown(stubs, monkeypatch):
    kernels = loaded()
    monkeypatch.setitem(normpass_kernels._loaded, "cuda", (kernels, "CUDA C++"))
    stubs.fail("cuModuleLoadData", Code.NO_BINARY_FOR_GPU)
    with pytest.warns(RuntimeWarning, match="norm_act.*Relu.*cuModuleLoadData returned NO_BINARY_FOR_GPU"):
        checks.check_norm_act(kernels, SITE)
    checks.check_norm_act(kernels, SITE)  # the same code is not loaded again, and no second warning
    (words,) = [status.words for status in normpass_kernels.status() if status.device == "cuda"]
    assert "norm_act runs as plain torch" in words and "NO_BINARY_FOR_GPU" in words
    checks.check_norm_act(kernels, Site(SITE.layout, SITE.dtype, "silu"))
    assert len(kernels.failures) == 1, "another variant is another matter"


@pytest.mark.parametrize(
    "capability, target", [((9, 0), "sm_90"), ((7, 5), "sm_75"), ((8, 9), "compute_80"), ((13, 0), "compute_90")]
)
def test_unknown_architectures_get_ptx_for_the_newest_known(stubs, capability, target):
    assert target_for(capability) == target
    stubs.capability = capability
    kernels, words = cuda_library.load()
    assert kernels is not None and words.endswith(target)
    assert f"--gpu-architecture={target}".encode() in stubs.nvrtc.options


def test_a_gpu_too_old_for_the_compiler(stubs):
    stubs.capability = (7, 0)
    kernels, words = cuda_library.load()
    assert kernels is None and "7.5 and newer, and this GPU has 7.0" in words


def test_no_torch_allocation_outlives_a_call(stubs, monkeypatch):
    """What torch's allocator gives in a warm-up inside the pool of a CUDA graph must be back when it ends."""
    kernels, made = loaded(), []
    for name in ("empty", "zeros", "new_empty", "new_zeros", "empty_like"):
        owner = torch.Tensor if name.startswith("new") else torch
        plain = getattr(owner, name)
        noting = lambda *args, plain=plain, **more: made.append(weakref.ref(t := plain(*args, **more))) or t  # noqa: E731
        monkeypatch.setattr(owner, name, noting)
    for stubs.stream, stubs.capturing in ((5, False), (6, False), (6, True)):
        every_op(kernels)
    gc.collect()
    assert made and not any(t() is not None for t in made)


def test_counters_of_streams_and_captures(stubs):
    gpu = cuda_library.Gpus().prepare(0).gpu
    counters = Counters(gpu)
    first, second = counters.of_stream(5, 10), counters.of_stream(6, 10)
    assert first == counters.of_stream(5, SMALLEST_BLOCK) != second
    assert counters.of_stream(5, SMALLEST_BLOCK + 1) not in (first, second)
    stubs.driver.capture = 1
    taken = {counters.of_capture(5, 10), counters.of_capture(6, 10)}
    assert len(taken) == 2 and first not in taken and counters.of_capture(5, 10) in taken
    stubs.driver.capture = 2
    assert counters.of_capture(5, 10) not in {*taken, first, second}, "the first graph may still be replayed"
    stubs.driver.end_graph(1)
    stubs.driver.capture = 3
    assert {counters.of_capture(5, 10), counters.of_capture(6, 10)} == taken
    large = counters.of_capture(5, 10 * SMALLEST_BLOCK)
    assert counters.of_capture(5, 10 * SMALLEST_BLOCK) == large


def test_captures_without_end_take_no_memory(stubs):
    counters = Counters(cuda_library.Gpus().prepare(0).gpu)
    addresses = set()
    for stubs.driver.capture in range(1, 200):
        addresses.add(counters.of_capture(5, 10))
        stubs.driver.end_graph(stubs.driver.capture)
    assert len(addresses) <= 2


@pytest.mark.parametrize("name", ["cuUserObjectCreate", "cuGraphRetainUserObject"])
def test_without_user_objects_a_block_stays_with_its_graph(stubs, name):
    counters = Counters(cuda_library.Gpus().prepare(0).gpu)
    addresses = []
    for stubs.driver.capture in range(1, 40):
        stubs.fail(name, LOST)
        addresses.append(counters.of_capture(5, 10))
        stubs.driver.end_graph(stubs.driver.capture)
    assert len(set(addresses)) == len(addresses)


def test_whole_numbers_as_arguments(stubs):
    """`BatchNorm2d(3, eps=1)`: an int that is read as a double would be a tiny number."""
    kernels, z = loaded(), torch.empty(SITE.layout)
    norm = SITE.norm._replace(eps=1, activation="leaky_relu", activation_args=(2,))
    kernels.norm_act(z, SITE.x, None, norm, SITE.layout)
    y = (SITE.x - SITE.mean[:, None]) * (SITE.weight / (SITE.var + 1).sqrt())[:, None] + SITE.bias[:, None]
    torch.testing.assert_close(z, torch.where(y > 0, y, 2 * y))

    for shape in (Groups(2, 2, 8, 4, False), Rows(6, 12, True)):
        site = SampleSite(shape, torch.float32, "leaky_relu", eps=1)
        site.args = (2,)
        sample_checks.check(kernels.sample_norms, site)


def test_norms_of_samples_train_by_them(stubs, device, monkeypatch):
    """The ops on the CPU take the stub's kernels, forward, made again and backward."""
    monkeypatch.setitem(normpass_kernels._loaded, "cpu", (kernels := loaded(), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # Dynamo would look for one
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.InstanceNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.LayerNorm(36), nn.GELU(), nn.Linear(36, 3)]
    plain = nn.Sequential(*layers).double()
    own = normpass.optimize(copy.deepcopy(plain))
    x, device.launches[:] = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for model in (plain, own):
        model(x).square().mean().backward()
    for a, b in zip(plain.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
    entries = [entry for _, entry, _ in device.launches]
    assert entries.count("gradients") == 3 and entries.count("sample_norm_act") == 6 and not kernels.failures


def test_a_network_trains_by_them_and_without_them(stubs, monkeypatch):
    """The ops on the CPU take the stub's kernels; in the middle of it every launch begins to fail."""
    monkeypatch.setitem(normpass_kernels._loaded, "cpu", (kernels := loaded(), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # Dynamo would look for one
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    plain = nn.Sequential(*layers).double()
    own = normpass.optimize(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for step in range(3):
        if step == 2:
            stubs.fail("cuLaunchKernel", Code.NO_BINARY_FOR_GPU, lasts=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if step == 2 else "error", RuntimeWarning)
            for model in (plain, own):
                model.zero_grad()
                model(x).square().mean().backward()
        for a, b in zip(plain.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(own.state_dict()), dict(plain.state_dict()), rtol=1e-9, atol=1e-12)
    assert kernels.failures
