"""The kernels: C++ for the CPU, CUDA C++ for the GPU, behind one interface.

    contract.py         what the kernels of a device are
    include/            what both share in C++: the activations, the merge of moments
    cpu/<op>.cpp        built when the package is installed, loaded by `cpu/library.py`
    cuda/<op>.cu        compiled at run time by NVRTC, loaded by `cuda/library.py`
    plain.py            the same formulas in torch, for a single CUDA kernel that cannot be compiled or launched

A device without kernels (no compiler at installation, no GPU, no NVRTC) has None here, and the reference of each op
runs instead. `status()` says what there is and why; `normpass kernels` prints it. Nothing is loaded at import: the
kernels of a device are, by the first op that runs there.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from normpass.errors import InvalidInputError
from normpass.kernels.contract import Kernels


class Status(NamedTuple):
    """What there is for one device: whether its kernels can run, and in words what they are or why not."""

    device: str
    available: bool
    words: str


DEVICES = ("cpu", "cuda")
"""The device types that kernels are written for."""

_lock = threading.RLock()
_loaded: dict[str, tuple[Kernels | None, str]] = {}
_disabled = {"all": 0, "winograd": 0}


def kernels_for(device: str) -> Kernels | None:
    """The kernels of a device type, loaded at the first call; None where there are none, and inside `disabled()`."""
    if _disabled["all"]:
        return None
    found = _loaded.get(device)
    return (_load(device) if found is None else found)[0]


@contextmanager
def disabled(name: str = "all") -> Iterator[None]:
    """Run the references instead of the kernels while this is entered: for comparison, and to find a fault.

    `name`: `"all"`, or `"winograd"` for the 3×3 convolutions alone, which the vendor's compute then.

    It holds for the whole process, because backward may run in other threads than forward. Put whole steps inside:
    a backward that runs other code than its forward did rebuilds z only to rounding.
    """
    if name not in _disabled:
        raise InvalidInputError(
            f'normpass.kernels.disabled: `name` is "{name}", it must be one of {", ".join(_disabled)}'
        )
    with _lock:
        _disabled[name] += 1
    try:
        yield
    finally:
        with _lock:
            _disabled[name] -= 1


def is_disabled(name: str) -> bool:
    """Whether `disabled(name)` is entered."""
    return _disabled[name] > 0


@contextmanager
def replaced(device: str, kernels: Kernels) -> Iterator[None]:
    """Run other kernels on a device type while this is entered: ones that count, or check what they are given.

    It holds for the whole process; see `disabled`.
    """
    with _lock:
        before = _loaded.get(device)
        _loaded[device] = kernels, type(kernels).__name__
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del _loaded[device]
            else:
                _loaded[device] = before


def status() -> list[Status]:
    """What there is for each device in `DEVICES`; loads what was not loaded yet."""
    found = [(device, *_load(device)) for device in DEVICES]
    return [
        Status(device, kernels is not None, "; ".join([words, *(kernels.failures if kernels else ())]))
        for device, kernels, words in found
    ]


def _load(device: str) -> tuple[Kernels | None, str]:
    with _lock:
        if device not in _loaded:
            _loaded[device] = _library(device)
        return _loaded[device]


def _library(device: str) -> tuple[Kernels | None, str]:
    if device not in DEVICES:
        return None, f"there are no kernels for {device}; the references run there"
    name = f"normpass.kernels.{device}.library"
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None, f"this installation has no {name}; the references run on {device}"
    found: tuple[Kernels | None, str] = library.load()
    return found
