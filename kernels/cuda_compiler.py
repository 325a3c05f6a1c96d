"""CUDA C++ to machine code with NVRTC, kept on disk between runs.

A variant of a kernel is its source file and the values of its macros. A cache entry is named by the hash of all that
decides its content (sources, macros, options, GPU architecture, NVRTC's version) and carries the hash of its content,
so that a damaged one is compiled again. A folder that cannot be read or written costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent

OPTIONS: dict[str, Any] = {"std": "c++17", "prec_div": False, "prec_sqrt": False}
"""float32 divisions are rounded to 2 ulp: their exact rounding would cost more than the memory they wait for."""


class Variant(NamedTuple):
    """One instantiation: `cuda/<source>.cu` compiled with `macros`, (name, value) each."""

    source: str
    macros: tuple[tuple[str, str], ...]


def cache_folder() -> Path:
    """Where machine code is kept: `normpass` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "normpass"


def cubin(variant: Variant, architecture: str) -> bytes:
    """The machine code of `variant` for a GPU architecture such as "sm_90", from the cache or compiled now."""
    try:
        path = cache_folder() / f"{_key(variant, architecture)}.cubin"
    except RuntimeError:  # a user without a home
        return compile_variant(variant, architecture)[0]
    code = _read(path)
    if code is None:
        code, _ = compile_variant(variant, architecture)
        _write(path, code)
    return code


def compile_variant(variant: Variant, architecture: str, **options: Any) -> tuple[bytes, str]:
    """Machine code and compiler's log, past the cache; `options` are added to those of `cuda.core`."""
    core: Any = importlib.import_module("cuda.core")
    settings = core.ProgramOptions(
        name=f"{variant.source}.cu",
        arch=architecture,
        include_path=[str(FOLDER / "cuda"), str(FOLDER / "include")],
        define_macro=list(variant.macros),
        **OPTIONS,
        **options,
    )
    log = io.StringIO()
    program = core.Program((FOLDER / "cuda" / f"{variant.source}.cu").read_text(), "c++", settings)
    code: bytes = program.compile("cubin", logs=log).code
    return code, log.getvalue()


@functools.lru_cache(maxsize=1)
def _sources() -> bytes:
    """The hash of every file that a kernel may include."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("cuda/*.cu*"), *FOLDER.glob("include/*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC that compiles. RuntimeError where its library cannot be loaded."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _key(variant: Variant, architecture: str) -> str:
    what = repr((variant, architecture, sorted(OPTIONS.items()), nvrtc_version()))
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
