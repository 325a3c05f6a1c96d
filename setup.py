"""Builds the CPU's kernels (kernels/cpu/*.cpp) as plain shared libraries, one for each instruction set.

Everything else is in pyproject.toml. A library that cannot be built (no compiler, no OpenMP, another processor) is
left out, and the installation goes on: `normpass kernels` says what there is. A library that was built before, from
the same sources with the same flags, is taken as it is: it carries their fingerprint (kernels/cpu/fingerprint.cpp).
"""

import hashlib
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# No reassociation: only what lets a loop with a square root or a comparison be vectorized. -O3 takes twice as long; it
# makes one source's loops faster.
FLAGS = "-std=c++17 -O2 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden -g0".split()
FLAGS_OF = {"winograd_weight_gradient": ["-O3"]}
INSTRUCTION_SETS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "baseline": [],
}
ON_X86_ONLY = ("avx512", "avx2")
SOURCES = sorted(glob("kernels/cpu/*.cpp"))
HEADERS = sorted(glob("kernels/cpu/*.h") + glob("kernels/include/*.h"))
SLOW = ("cat_norm_act_backward", "norm_act_backward", "norm_act_depthwise_backward", "activate")  # to begin with
COMPILER_VARIABLES = ("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "LDSHARED")


class BuildLibraries(build_ext):
    """Extensions that are loaded with ctypes: no Python symbols, no ABI tag in the name."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extensions(self):
        """All sources of all libraries at once, for one library's would wait for its slowest."""
        missing = [extension for extension in self.extensions if not self.is_built_before(extension)]
        with ThreadPoolExecutor(self.parallel) as pool:
            objects = {
                (extension.name, source): pool.submit(self.compile, extension, source)
                for source in sorted(SOURCES, key=lambda source: Path(source).stem not in SLOW)
                for extension in missing
            }
            for extension in missing:
                self.link(extension, [objects[extension.name, source] for source in SOURCES])

    def is_built_before(self, extension):
        target, digest = self.target_of(extension), fingerprint(extension.extra_compile_args)
        target.parent.mkdir(parents=True, exist_ok=True)
        built = [path for path in (target, in_place(extension)) if not self.force and carries(path, digest)]
        if built and built[0] != target:
            shutil.copy(built[0], target)
        if not built:
            target.unlink(missing_ok=True)  # of other sources
        return bool(built)

    def target_of(self, extension):
        return Path(self.build_lib, self.get_ext_filename(extension.name))

    def compile(self, extension, source):
        flags = [*extension.extra_compile_args, *FLAGS_OF.get(Path(source).stem, ())]
        flags.append(f'-DNORMPASS_FINGERPRINT="{fingerprint(extension.extra_compile_args)}"')
        return self.compiler.compile([source], output_dir=f"{self.build_temp}/{extension.name}", extra_postargs=flags)

    def link(self, extension, objects):
        try:
            files = [file for compiled in objects for file in compiled.result()]
            self.compiler.link_shared_object(
                files, str(self.target_of(extension)), extra_postargs=["-fopenmp"], target_lang="c++"
            )
        except (CCompilerError, BaseError) as error:
            self.warn(f"{extension.name} is left out: {error}")

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            if not self.target_of(extension).exists():
                in_place(extension).unlink(missing_ok=True)  # of other sources
        super().copy_extensions_to_source()


class WheelOfAnyPython(bdist_wheel):
    """The libraries know of no Python: the wheel is a platform's, and any version's."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def in_place(extension):
    """Where the library lies in the source tree, from where an editable installation loads it."""
    return Path(*extension.name.split(".")[1:]).with_suffix(".so")


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
            f"normpass.kernels.cpu._{name}",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if is_x86 or name not in ON_X86_ONLY
    ]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelOfAnyPython})
