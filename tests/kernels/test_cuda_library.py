"""The host side of the CUDA kernels: what a grid covers, the cache of machine code, and why there are no kernels."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normpass.kernels.contract import Layout
from normpass.kernels.cuda import compiler as cuda_compiler
from normpass.kernels.cuda import library as cuda_library
from normpass.kernels.cuda.compiler import machine_code
from normpass.kernels.cuda.geometry import THREADS, geometry
from normpass.kernels.cuda.variant import Variant

RUNNING_STATS = Variant("running_stats", (("NORMPASS_STORAGE", "float"),))
HUGE = Layout(256 * 112 * 112, 2048, 1)
LAYOUTS = [
    Layout(256 * 112 * 112, 64, 1),
    Layout(256 * 7 * 7, 2048, 1),
    Layout(100, 100, 1),
    Layout(64, 3, 49),
    Layout(256, 2048, 49),
    Layout(8, 64, 12544),
    Layout(70000, 1, 3),
    HUGE,
    Layout(3, 7, 2**31 + 8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("itemsize, alignment", [(2, 16), (4, 16), (8, 16), (2, 2), (4, 8)])
def test_a_grid_covers_every_value_once(layout, itemsize, alignment):
    shape = geometry(layout, itemsize, alignment, 132)
    channels, width, positions, inner, inner_step, stride, last = shape.parameters
    assert shape.vector * itemsize <= 16 and alignment % (shape.vector * itemsize) == 0
    assert channels * positions * (1 if shape.rows else shape.vector) == layout.outer * layout.channels * layout.inner
    per_tile = width * shape.vector if shape.rows else 1
    assert shape.tiles * per_tile >= channels > (shape.tiles - 1) * per_tile
    step = shape.slabs * (THREADS // width)
    assert inner_step == step % inner and 1 <= shape.slabs <= 65535
    if shape.rows:
        assert stride == step * channels and last == (positions - 1) * channels
    else:
        assert stride == (step // inner * channels * inner + inner_step) * shape.vector
        assert last == (positions // inner - 1) * channels * inner * shape.vector + (inner - 1) * shape.vector


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_large_tensors_keep_the_gpu_busy(layout):
    for multiprocessors in (108, 132, 148):
        shape = geometry(layout, 2, 16, multiprocessors)
        blocks = shape.tiles * shape.slabs
        assert shape.vector == 8
        assert blocks / (-(-blocks // multiprocessors) * multiprocessors) >= 0.9


def test_importing_does_no_work():
    script = (
        "import sys, normpass.kernels.cuda.library, torch\n"
        "assert 'cuda.bindings.nvrtc' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    kernels, why = cuda_library.load()
    assert kernels is None and "no GPU" in why
    monkeypatch.setattr(torch.version, "cuda", None)
    kernels, why = cuda_library.load()
    assert kernels is None and "without CUDA" in why


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_without_the_bindings(with_gpu, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    kernels, why = cuda_library.load()
    assert kernels is None and "cuda-bindings is missing" in why and "pip install 'cuda-bindings==13.*'" in why


def test_without_a_driver(with_gpu):
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings, as torch for CUDA brings it")
    kernels, why = cuda_library.load()
    assert kernels is None and "cuInit" in why


def test_bindings_for_another_cuda(with_gpu, monkeypatch):
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings, as torch for CUDA brings it")
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    kernels, why = cuda_library.load()
    assert kernels is None and "torch for CUDA 11" in why and "cuda-bindings==11.*" in why


class Compiler:
    """Counts compilations."""

    def __init__(self):
        self.calls = 0

    def __call__(self, variant, architecture, *options):
        self.calls += 1
        return b"machine code for " + architecture.encode(), ""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_compiler, "nvrtc_version", lambda: (13, 0))
    counter = Compiler()
    monkeypatch.setattr(cuda_compiler, "compile_variant", counter)
    return counter


def test_the_cache_saves_compilations(compiler, tmp_path):
    first = machine_code(RUNNING_STATS, "sm_90")
    assert machine_code(RUNNING_STATS, "sm_90") == first and compiler.calls == 1
    assert machine_code(RUNNING_STATS, "sm_80") != first and compiler.calls == 2
    assert len(list(tmp_path.rglob("*"))) == 3  # the folder, two entries, nothing temporary


def test_another_compiler_compiles_again(compiler, monkeypatch):
    machine_code(RUNNING_STATS, "sm_90")
    monkeypatch.setattr(cuda_compiler, "nvrtc_version", lambda: (13, 1))
    machine_code(RUNNING_STATS, "sm_90")
    assert compiler.calls == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"\xff" + b[41:]])
def test_a_damaged_entry_is_compiled_again(compiler, tmp_path, damage):
    whole = machine_code(RUNNING_STATS, "sm_90")
    (entry,) = tmp_path.rglob("*.cubin")
    entry.write_bytes(damage(entry.read_bytes()))
    assert machine_code(RUNNING_STATS, "sm_90") == whole and compiler.calls == 2
    assert machine_code(RUNNING_STATS, "sm_90") == whole and compiler.calls == 2


def test_a_folder_that_cannot_be_written(compiler, tmp_path):
    (tmp_path / "normpass").write_text("a file stands where the folder should")
    for calls in (1, 2):
        assert machine_code(RUNNING_STATS, "sm_90") and compiler.calls == calls


def test_no_home(compiler, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
    monkeypatch.setattr(Path, "home", homeless)
    assert machine_code(RUNNING_STATS, "sm_90") and compiler.calls == 1
