"""CUDA C++ to machine code with NVRTC, kept on disk between runs.

A cache entry is named by the hash of all that decides its content (sources, macros, options, the target, NVRTC's
version) and carries the hash of its content, so that a damaged one is compiled again. A folder that cannot be read or
written costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from normpass.kernels.cuda.calls import CudaError, bindings, call
from normpass.kernels.cuda.variant import Variant

FOLDER = Path(__file__).parents[1]

OPTIONS = ("--std=c++17", "--prec-div=false", "--prec-sqrt=false")
"""float32 divisions are rounded to 2 ulp: their exact rounding would cost more than the memory they wait for."""

FLUSHING = ("--ftz=true",)
"""Where `_may_flush`."""


def cache_folder() -> Path:
    """Where machine code is kept: `normpass` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "normpass"


def target_for(capability: tuple[int, int]) -> str:
    """What to compile for on a GPU of this compute capability: `sm_90`, or `compute_121` for the driver to finish.

    A GPU newer than the compiler gets PTX for the newest one that the compiler knows.
    """
    own, known = 10 * capability[0] + capability[1], supported_architectures()
    if own in known:
        return f"sm_{own}"
    older = [architecture for architecture in known if architecture < own]
    if not older:
        raise CudaError(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} compiles for compute capability "
            f"{min(known) // 10}.{min(known) % 10} and newer, and this GPU has {capability[0]}.{capability[1]}"
        )
    return f"compute_{max(older)}"


def machine_code(variant: Variant, target: str) -> bytes:
    """The code of `variant` for `target`, such as "sm_90" (cubin) or "compute_90" (PTX), from the cache or compiled."""
    try:
        path = cache_folder() / f"{_key(variant, target)}.{'cubin' if target.startswith('sm_') else 'ptx'}"
    except RuntimeError as error:
        if isinstance(error, CudaError):
            raise
        return compile_variant(variant, target)[0]  # a user without a home
    code = _read(path)
    if code is None:
        code, _ = compile_variant(variant, target)
        _write(path, code)
    return code


def compile_variant(variant: Variant, target: str, *more: str) -> tuple[bytes, str]:
    """Code and compiler's log, past the cache; `more` are further options."""
    nvrtc = bindings("nvrtc")
    source = (FOLDER / "cuda" / f"{variant.source}.cu").read_bytes()
    options = [option.encode() for option in (*_options(variant, target), *_include_paths(), *more)]
    program = call(nvrtc, "nvrtcCreateProgram", source, f"{variant.source}.cu".encode(), 0, [], [])
    try:
        try:
            call(nvrtc, "nvrtcCompileProgram", program, len(options), options)
        except CudaError as error:
            raise CudaError(f"{variant} for {target}: {error}; {_first_line(_log(nvrtc, program))}") from None
        return _content(nvrtc, "CUBIN" if target.startswith("sm_") else "PTX", program), _log(nvrtc, program)
    finally:
        call(nvrtc, "nvrtcDestroyProgram", program)


def _options(variant: Variant, target: str) -> list[str]:
    macros = [f"--define-macro={name}={value}" for name, value in variant.macros]
    return [f"--gpu-architecture={target}", *OPTIONS, *(FLUSHING if _may_flush(variant) else ()), *macros]


def _may_flush(variant: Variant) -> bool:
    """16-bit SiLU: its exponential and division take a quarter fewer instructions without numbers below 1e-38."""
    macros = dict(variant.macros)
    return "NORMPASS_NARROW" in macros and macros.get("NORMPASS_ACTIVATION") == "Silu"


def _include_paths() -> list[str]:
    """Not in the cache's key, whose sources count by content."""
    return [f"--include-path={FOLDER / name}" for name in ("cuda", "include")]


def _log(nvrtc: Any, program: Any) -> str:
    return _content(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0")


def _content(nvrtc: Any, kind: str, program: Any) -> bytes:
    content = bytes(call(nvrtc, f"nvrtcGet{kind}Size", program))  # as many zeros
    call(nvrtc, f"nvrtcGet{kind}", program, content)  # writes into them
    return content


def _first_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a message")


@functools.lru_cache(maxsize=1)
def _sources() -> bytes:
    """The hash of every file that a kernel may include."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("cuda/*.cu*"), *FOLDER.glob("include/*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC that compiles."""
    major, minor = call(bindings("nvrtc"), "nvrtcVersion")
    return major, minor


@functools.lru_cache(maxsize=1)
def supported_architectures() -> tuple[int, ...]:
    """The compute capabilities that NVRTC compiles for, 90 for 9.0."""
    return tuple(call(bindings("nvrtc"), "nvrtcGetSupportedArchs"))


def _key(variant: Variant, target: str) -> str:
    what = repr((variant.source, _options(variant, target), nvrtc_version()))
    return hashlib.sha256(_sources() + what.encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Whole or not at all: other processes may be reading, and writing the same."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
