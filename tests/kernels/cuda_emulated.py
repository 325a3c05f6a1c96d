"""A `Device` for `CudaKernels` that compiles the CUDA sources with g++ and runs them on CPU tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

import normpass.kernels
from normpass.kernels.cuda.driver import Launch
from normpass.kernels.cuda.variant import Variant, packer, signature

HERE = Path(__file__).parent
SOURCES = Path(normpass.kernels.__file__).parent
COMPILER = shutil.which("g++")
COMMAND = (str(COMPILER), *"-std=c++17 -O1 -fPIC -fno-strict-aliasing -ffp-contract=off".split())
HEADER = "cuda_on_cpu.h"
ENTRIES = {
    "norm_act_backward": ("reduce", "apply"),
    "inplace_abn_backward": ("reduce", "apply"),
    "sample_norm_act_backward": ("plane_sums", "gradients"),
}
FAILURES = {1: "wrong number of arguments", 2: "a barrier that some threads never reached"}


class EmulatedDevice:
    """Few multiprocessors, so that small tensors have several slabs; `reversed` runs threads and blocks backwards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reversed = False
        self.launches: list[tuple[Variant, str, tuple[int, int]]] = []
        self.counters = torch.zeros(0, dtype=torch.int32)
        self._libraries: dict[Variant, ctypes.CDLL] = {}
        self._precompile()

    def multiprocessors(self, index: int) -> int:
        return 6

    def kernel(self, variant: Variant, entry: str, grid: tuple[int, int], threads: int, index: int) -> Launch:
        library, pack = self._library(variant), packer(variant, entry).pack
        function, declared = getattr(library, f"emulated_{entry}"), getattr(library, f"signature_{entry}")
        declared.restype = ctypes.c_char_p
        assert declared().decode() == signature(variant, entry), f"{variant.source}:{entry} is declared otherwise"

        def run(*args: float) -> None:
            code = function(*grid, threads, pack(*args), len(args), int(self.reversed))
            assert code == 0, f"{variant.source}:{entry}: {FAILURES[code]}"
            self.launches.append((variant, entry, grid))

        return run

    def arrivals(self, index: int, count: int) -> int:
        if self.counters.numel() < count:
            self.counters = torch.zeros(count, dtype=torch.int32)
        return self.counters.data_ptr()

    def _precompile(self) -> None:
        """The header, once for all variants: a third of the time of each. A compiler that cannot read it looks on."""
        source, result = HERE / HEADER, self.folder / f"{HEADER}.gch"
        subprocess.run([*COMMAND, "-w", "-x", "c++-header", str(source), "-o", str(result)], check=True)

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self._libraries:
            path = self.folder / f"{len(self._libraries)}.so"
            exports = "".join(f"NORMPASS_EXPORT({e})\n" for e in ENTRIES.get(variant.source, (variant.source,)))
            source = f'#include "{HEADER}"\n#include "{variant.source}.cu"\n{exports}'
            macros = [f"-D{name}={value}" for name, value in variant.macros]
            includes = [f"-I{folder}" for folder in (self.folder, HERE, SOURCES / "cuda", SOURCES / "include")]
            command = [*COMMAND, *macros, *includes, "-shared", "-x", "c++", "-", "-o", str(path)]
            subprocess.run(command, input=source.encode(), check=True)
            self._libraries[variant] = ctypes.CDLL(str(path))
        return self._libraries[variant]
