"""NVRTC compiles every kernel for every GPU that is meant, without a GPU, and none spills registers to memory.

Of each kernel, dtype and layout the variant that is nearest to spilling (no other has more registers where few are
left): with a residual, the gradient in two parts, SiLU. The long sweeps compile all, where `--results DIR` writes
registers and spills of each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings, as torch for CUDA brings it")

from normpass.kernels.contract import ACTIVATIONS, Layout
from normpass.kernels.cuda.compiler import compile_variant, supported_architectures
from normpass.kernels.cuda.geometry import THREADS, geometry, geometry_of_rows
from normpass.kernels.cuda.kernels import PIECES
from normpass.kernels.cuda.plans import Join, variant_of
from normpass.kernels.cuda.runs import Runs, teams
from normpass.kernels.cuda.sample_norms import variant_of_runs
from normpass.kernels.cuda.variant import Variant

SOURCES = (
    *("moments", "norm_act", "norm_act_backward", "inplace_abn_backward"),
    *("cat_norm_act", "cat_norm_act_backward", "add_statistics_gradient"),
)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = {"rows": Layout(1000, 64, 1), "planes": Layout(10, 64, 64), "scalar planes": Layout(10, 64, 49)}
FUNCTION = re.compile(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)


def largest(source: str, layout: str, dtype: torch.dtype) -> Variant:
    """The one with a residual and two parts of the gradient: `variants` ends with it."""
    return list(variants(source, LAYOUTS[layout], dtype, ("silu",)))[-1]


def variants(source: str, layout: Layout, dtype: torch.dtype, activations: Sequence[str]) -> Iterator[Variant]:
    shape = geometry(layout, dtype.itemsize, 16, 132)
    if source in ("moments", "add_statistics_gradient"):
        yield variant_of(source, dtype, shape)
    elif source.startswith("cat_"):
        yield from (variant_of(source, dtype, shape, name, pieces=PIECES[-1]) for name in activations)
    elif source == "inplace_abn_backward":
        yield variant_of(source, dtype, shape, "leaky_relu")
    else:
        is_backward = source == "norm_act_backward"
        parts = (1, 2) if is_backward else (1,)
        for name, residual, count in itertools.product(activations, (False, True), parts):
            yield variant_of(source, dtype, shape, name, Join(residual), parts=count)
        masked = ("relu", "leaky_relu") if "relu" in activations else ("leaky_relu",)
        for name, count in itertools.product(masked, parts):  # forward reads the residual, backward does not
            yield variant_of(source, dtype, shape, name, Join(not is_backward, True), parts=count)
        if not is_backward:
            yield from (variant_of(source, dtype, shape, masked[0], Join(True, mask, True)) for mask in (False, True))


def functions(variant: Variant, architecture: str) -> list[tuple[str, int, int]]:
    """Name, registers and bytes of spills of each kernel in the file."""
    code, log = compile_variant(variant, architecture, "--ptxas-options=-v")
    assert code and "warning" not in log, log
    return [(name, int(registers), int(spills)) for name, spills, registers in FUNCTION.findall(log)]


def cases() -> Iterator[tuple[str, str, str, torch.dtype]]:
    """Everything for Hopper; what is likeliest to spill, channels_last in 16 bits and float32, for the others."""
    for source in SOURCES:
        for layout in LAYOUTS:
            yield from (("sm_90", source, layout, dtype) for dtype in DTYPES)
        for architecture in ("sm_80", "sm_100", "sm_120"):
            yield from ((architecture, source, "rows", dtype) for dtype in (torch.bfloat16, torch.float32))


EACH_CASE = pytest.mark.parametrize("architecture, source, layout, dtype", list(cases()))


def assert_no_spills(found: list[tuple[str, int, int]], variant: Variant, threads: int = THREADS) -> None:
    assert found
    for name, registers, spills in found:
        assert registers * threads <= 65536
        assert spills == 0, f"{variant}: {name} spills {spills} bytes"


RUNS = {
    "warps": Runs(1000, 32, 8, 64),
    "planes": Runs(100, 4, 64, 3136),
    "scalar planes": Runs(1000, 32, 8, 49),
    "rows": Runs(1000, 1, 768, 1),
    "wide rows": Runs(100, 1, 40000, 1),
}


FIRST = [("sm_90", "planes", dtype) for dtype in DTYPES] + [("sm_90", kind, torch.bfloat16) for kind in list(RUNS)[2:]]
FIRST += [(architecture, "wide rows", torch.bfloat16) for architecture in ("sm_80", "sm_100", "sm_120")]
OTHERS = [case for case in itertools.product(ARCHITECTURES, RUNS, DTYPES) if case not in FIRST]


@pytest.mark.parametrize(
    "architecture, kind, dtype", [*FIRST, *(pytest.param(*case, marks=pytest.mark.nets) for case in OTHERS)]
)
def test_kernels_of_runs_compile_without_spills(architecture, kind, dtype):
    """Norms with a sample's own statistics."""
    runs = RUNS[kind]
    shape = teams(runs, dtype.itemsize, 16, 132, False)
    for entry in ("sample_norm_act", "gradients"):
        variant = variant_of_runs(entry, dtype, shape, runs, "silu", True)
        assert_no_spills(functions(variant, architecture), variant, shape.threads)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_over_rows_and_samples_compile_without_spills(architecture):
    rows, samples = (geometry_of_rows(1000, 64, vector, 132) for vector in (8, 4))
    for variant in (
        variant_of("over_rows", torch.bfloat16, rows, "silu", Join(True)),
        variant_of("over_samples", torch.float32, samples),
    ):
        assert_no_spills(functions(variant, architecture), variant)


@EACH_CASE
def test_kernels_compile_without_spills(architecture, source, layout, dtype):
    variant = largest(source, layout, dtype)
    assert_no_spills(functions(variant, architecture), variant)


@pytest.mark.parametrize("source", ["norm_act", "norm_act_backward"])
def test_what_a_variant_leaves_out_compiles(source):
    """Without a residual, with one gradient."""
    for variant in list(variants(source, LAYOUTS["rows"], torch.bfloat16, ("relu",)))[:-1]:
        assert_no_spills(functions(variant, "sm_90"), variant)


@pytest.mark.nets
@EACH_CASE
def test_every_variant_compiles_without_spills(architecture, source, layout, dtype, results):
    activations = ("relu", "silu") if architecture == "sm_90" and layout == "rows" else ("silu",)
    for variant in variants(source, LAYOUTS[layout], dtype, activations):
        found = functions(variant, architecture)
        for name, registers, spills in found:
            macros = dict(variant.macros)
            row = {"architecture": architecture, "source": source, "kernel": name, "layout": layout}
            row |= {"dtype": str(dtype), "activation": macros.get("NORMPASS_ACTIVATION", "")}
            row |= {
                "residual": macros.get("NORMPASS_RESIDUAL", ""),
                "parts": macros.get("NORMPASS_PARTS", "1"),
                "masked": macros.get("NORMPASS_MASKED", "0"),
                "normed": macros.get("NORMPASS_NORMED", "0"),
                "registers": registers,
                "spilled_bytes": spills,
            }
            results.add("cuda_registers", row)
        assert_no_spills(found, variant)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_compile(activation):
    """Nothing in them needs a header or a function that only the CPU has."""
    shape = geometry(LAYOUTS["rows"], 2, 16, 132)
    for name, _, spills in functions(variant_of("norm_act", torch.bfloat16, shape, activation), "sm_90"):
        assert spills == 0, name


def test_a_gpu_that_the_compiler_does_not_know_gets_ptx():
    """For the driver to finish; with the NUL that ends it."""
    newest = max(supported_architectures())
    code, _ = compile_variant(Variant("probe"), f"compute_{newest}")
    assert f".target sm_{newest}".encode() in code and code.endswith(b"\0")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["float", "double"])
def test_running_stats_compile(architecture, storage):
    assert functions(Variant("running_stats", (("NORMPASS_STORAGE", storage),)), architecture)
