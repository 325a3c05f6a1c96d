"""Builds the CPU's kernels (kernels/cpu/*.cpp) as plain shared libraries, one for each instruction set.

Everything else is in pyproject.toml. A library that cannot be built (no compiler, no OpenMP, another processor) is
left out, and the installation goes on: `normpass kernels` says what there is. A library that was built before, from
the same sources with the same flags, is taken as it is: it carries their fingerprint (kernels/cpu/fingerprint.cpp).
"""

import hashlib
import os
import platform
import shutil
from glob import glob
from pathlib import Path

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
SOURCES = sorted(glob("kernels/cpu/*.cpp"))
HEADERS = sorted(glob("kernels/cpu/*.h") + glob("kernels/include/*.h"))
COMPILER_VARIABLES = ("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "LDSHARED")


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
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = fingerprint(extension.extra_compile_args)
        built = [path for path in (target, in_place(extension)) if not self.force and carries(path, digest)]
        if not built:
            target.unlink(missing_ok=True)  # of other sources
            self.compile_and_link(extension, str(target), digest)
        elif built[0] != target:
            shutil.copy(built[0], target)

    def compile_and_link(self, extension, target, digest):
        folder = os.path.join(self.build_temp, extension.name)  # the same sources, compiled anew for each
        flags = [*extension.extra_compile_args, f'-DNORMPASS_FINGERPRINT="{digest}"']
        objects = self.compiler.compile(extension.sources, output_dir=folder, extra_postargs=flags)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-fopenmp"], target_lang="c++")

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            if not Path(self.build_lib, self.get_ext_filename(extension.name)).exists():
                in_place(extension).unlink(missing_ok=True)  # of other sources
        super().copy_extensions_to_source()


def in_place(extension):
    """Where the library lies in the source tree, from where an editable installation loads it."""
    return Path("kernels", extension.name.split(".")[-1] + ".so")


def fingerprint(flags):
    digest = hashlib.sha256()
    for path in ["setup.py", *SOURCES, *HEADERS]:
        content = Path(path).read_bytes()
        digest.update(f"{path} {len(content)}\n".encode() + content)
    variables = [f"{name}={os.environ.get(name, '')}" for name in COMPILER_VARIABLES]
    digest.update("\n".join([platform.machine(), *flags, *variables]).encode())
    return digest.hexdigest()


def carries(path, digest):
    return path.exists() and digest.encode() in path.read_bytes()


def libraries():
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        Extension(
            f"normpass.kernels._cpu_{name}",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if is_x86 or name not in ON_X86_ONLY
    ]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries})
