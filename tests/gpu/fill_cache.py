"""Compile what a GPU run will need, without a GPU, into build/gpu_cache: two minutes here for as many there.

    python3 tests/gpu/fill_cache.py [sm_90]

The entries hold for these sources and this version of NVRTC alone; with others they are not found, and nothing breaks.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from run_all import prepare

DTYPES = ("bfloat16", "float32", "float16", "float64")


def fill(target: str) -> int:
    """How many entries are there now."""
    from normpass.kernels.cuda.compiler import cache_folder, machine_code
    from normpass.kernels.cuda.device import PROBE

    for variant in {PROBE: None, **dict.fromkeys(variants())}:
        machine_code(variant, target)
    return len(list(cache_folder().iterdir()))


def variants() -> Iterator:
    """Every width of access in both layouts with ReLU, and every activation at the widest rows."""
    import torch

    from normpass.kernels.contract import ACTIVATIONS, Layout
    from normpass.kernels.cuda.geometry import geometry
    from normpass.kernels.cuda.variant import Variant

    for name in DTYPES:
        yield from of_runs(getattr(torch, name))
    yield from (Variant("running_stats", (("NORMPASS_STORAGE", storage),)) for storage in ("float", "double"))
    for name, inner, width in itertools.product(DTYPES, (1, 16), (8, 4, 2, 1)):
        dtype = getattr(torch, name)
        if width * dtype.itemsize > 16:
            continue
        layout = Layout(100, 3 * width, 1) if inner == 1 else Layout(100, 3, width)
        shape = geometry(layout, dtype.itemsize, 16, 132)
        yield from of_shape(dtype, shape, ("relu",))
        if inner == 1 and width * dtype.itemsize == 16:
            yield from of_shape(dtype, shape, ACTIVATIONS)


def of_runs(dtype) -> Iterator:
    """Of norms with a sample's own statistics: every team, wide accesses and narrow ones, with SiLU."""
    import torch

    from normpass.kernels.cuda.geometry import geometry_of_rows
    from normpass.kernels.cuda.plans import Join, variant_of
    from normpass.kernels.cuda.runs import Runs, teams
    from normpass.kernels.cuda.sample_norms import variant_of_runs

    for width, spatial in itertools.product((40, 2000, 100000), (1, 7, 16)):
        runs = Runs(100, 1, width, spatial) if spatial == 1 else Runs(100, 1, 2, width * spatial // 40 * 5)
        shape = teams(runs, dtype.itemsize, 16, 132, False)
        for entry, residual in itertools.product(("sample_norm_act", "gradients"), (False, spatial > 1)):
            yield variant_of_runs(entry, dtype, shape, runs, "silu", residual)
    rows = geometry_of_rows(100, 64, 16 // dtype.itemsize, 132)
    yield variant_of("over_rows", dtype, rows, "silu", Join(False))
    if dtype in (torch.float32, torch.float64):
        yield variant_of("over_samples", dtype, rows)


def of_shape(dtype, shape, activations) -> Iterator:
    from normpass.kernels.activations import RULES
    from normpass.kernels.cuda.kernels import PIECES
    from normpass.kernels.cuda.plans import Join, variant_of

    for source in ("moments", "add_statistics_gradient"):
        yield variant_of(source, dtype, shape)
    for activation in activations:
        for residual in (False, True) if activation in ("relu", "identity", "silu", "leaky_relu") else (False,):
            yield variant_of("norm_act", dtype, shape, activation, Join(residual))
            for parts in (1, 2):
                yield variant_of("norm_act_backward", dtype, shape, activation, Join(residual), parts=parts)
        if RULES[activation].two_slopes is not None:
            yield variant_of("norm_act", dtype, shape, activation, Join(True, True))
            yield from (
                variant_of("norm_act", dtype, shape, activation, Join(True, mask, True)) for mask in (False, True)
            )
            for parts in (1, 2):
                yield variant_of("norm_act_backward", dtype, shape, activation, Join(False, True), parts=parts)
        if activation in ("relu", "silu"):
            for source, pieces in itertools.product(("cat_norm_act", "cat_norm_act_backward"), PIECES):
                yield variant_of(source, dtype, shape, activation, pieces=pieces)
        if activation in ("identity", "leaky_relu", "elu", "selu", "celu", "relu"):
            yield variant_of("inplace_abn_backward", dtype, shape, "leaky_relu" if activation == "relu" else activation)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as links:
        os.environ.update(prepare(Path(links)))
        sys.path.insert(0, links)
        print(f"{fill(sys.argv[1] if len(sys.argv) > 1 else 'sm_90')} entries")
