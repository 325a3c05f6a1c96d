"""Builds the CPU's kernels (kernels/cpu/*.cpp) as plain shared libraries, one for each instruction set.

Everything else is in pyproject.toml. A library that cannot be built (no compiler, no OpenMP, another processor) is
left out, and the installation goes on: `normpass kernels` says what there is.
"""

import os
import platform
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No reassociation: only what lets a loop with a square root or a comparison be vectorised.
FLAGS = "-std=c++17 -O3 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden -g0".split()
INSTRUCTION_SETS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "baseline": [],
}
ON_X86_ONLY = ("avx512", "avx2")


class BuildLibraries(build_ext):
    """Extensions that are loaded with ctypes: no Python symbols, no ABI tag in the name."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def get_export_symbols(self, extension):
        return extension.export_symbols

    def build_extension(self, extension):
        target = self.get_ext_fullpath(extension.name)
        folder = os.path.join(self.build_temp, extension.name)  # the same sources, compiled anew for each
        flags = extension.extra_compile_args
        objects = self.compiler.compile(extension.sources, output_dir=folder, extra_postargs=flags)
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-fopenmp"], target_lang="c++")


def libraries():
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    headers = sorted(glob("kernels/cpu/*.h") + glob("kernels/include/*.h"))
    return [
        Extension(
            f"normpass.kernels._cpu_{name}",
            sorted(glob("kernels/cpu/*.cpp")),
            depends=headers,
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if is_x86 or name not in ON_X86_ONLY
    ]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries})
