"""Calls of NVRTC and of the CUDA driver through `cuda.bindings`, which torch's CUDA wheels bring along.

Every return code is checked. Whatever goes wrong is a `CudaError`: a library that cannot be found, a function that
this version of the bindings or of the driver does not have, an error code.
"""

from __future__ import annotations

import importlib
from typing import Any


class CudaError(RuntimeError):
    """A call failed: which one and how, in one line."""


def bindings(name: str) -> Any:
    """`cuda.bindings.<name>`."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except Exception as error:  # an import may fail in any way: a missing package, a library, its symbols
        raise CudaError(f"cuda.bindings.{name} cannot be imported ({_words(error)})") from error


def call(api: Any, name: str, *args: Any) -> Any:
    """What `name` of a bindings module returns behind its code: nothing, one thing, or a list."""
    try:
        code, *results = getattr(api, name)(*args)
    except Exception as error:  # the bindings raise, each version other types, where a library has no such function
        raise cannot_be_called(name, error) from error
    if int(code) != 0:
        raise has_returned(name, code)
    return results if len(results) > 1 else (results[0] if results else None)


def cannot_be_called(name: str, error: Exception) -> CudaError:
    return CudaError(f"{name} cannot be called ({_words(error)})")


def has_returned(name: str, code: Any) -> CudaError:
    return CudaError(f"{name} returned {getattr(code, 'name', code)}")


def _words(error: BaseException) -> str:
    """Type and message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
