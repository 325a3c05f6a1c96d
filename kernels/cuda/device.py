"""The GPUs as `CudaKernels` sees them: machine code is compiled, loaded and launched when it is first needed.

A launch goes to torch's current stream of the GPU at hand and waits for nothing. Nothing is done at import. What
cannot be compiled, loaded or launched is a `CudaError`; it is not tried again, except for a launch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.compiler import machine_code, target_for
from normpass.kernels.cuda.counters import Counters
from normpass.kernels.cuda.driver import Gpu, Kernel, Launch
from normpass.kernels.cuda.variant import Variant, packer

PROBE = Variant("probe")
_PROBE_SCALE, _PROBE_COUNT = 0.75, 100


class _Ready(NamedTuple):
    """A GPU that has run the probe."""

    gpu: Gpu
    target: str
    counters: Counters


class Gpus:
    """All GPUs that torch sees."""

    def __init__(self) -> None:
        self._ready: dict[int, _Ready | CudaError] = {}
        self._functions: dict[tuple[Variant, str, int], Any] = {}
        self._lock = threading.RLock()
        self._thread = threading.local()

    def multiprocessors(self, index: int) -> int:
        count: int = torch.cuda.get_device_properties(index).multi_processor_count
        return count

    def prepare(self, index: int) -> _Ready:
        """The GPU, once it has compiled and run a kernel and the result was right."""
        with self._lock:
            if index not in self._ready:
                self._ready[index] = _or_error(lambda: _probed(index))
        found: _Ready = _unless_error(self._ready[index])
        return found

    def kernel(self, variant: Variant, entry: str, grid: tuple[int, int], threads: int, index: int) -> Launch:
        """What launches `entry` of `variant` on GPU `index`, compiled at the first call."""
        with self._lock, self._current(index) as ready:
            function = self._function(variant, entry, index, ready)
        kernel = Kernel(ready.gpu.api, function, packer(variant, entry), grid, threads)

        def run(*args: float) -> None:
            if self._is_current(index):
                try:
                    kernel(torch._C._cuda_getCurrentRawStream(index), args)
                except CudaError:
                    pass  # a second try: another library may have left its own context here
                else:
                    return
            with self._current(index):
                kernel(torch._C._cuda_getCurrentRawStream(index), args)

        return run

    def arrivals(self, index: int, count: int) -> int:
        """The address of `count` counters, 0 for the next kernel of the current stream, which leaves them so."""
        ready = self._ready.get(index)
        if isinstance(ready, _Ready) and self._is_current(index):
            return _counters_now(ready, index, count)
        with self._current(index) as ready:
            return _counters_now(ready, index, count)

    def _is_current(self, index: int) -> bool:
        return torch.cuda.current_device() == index and getattr(self._thread, "ready", False)

    @contextlib.contextmanager
    def _current(self, index: int) -> Iterator[_Ready]:
        """With GPU `index` current in this thread; a thread that has called no CUDA yet has no context."""
        with torch.cuda.device(index):
            ready = self.prepare(index)
            ready.gpu.make_current()
            self._thread.ready = True
            yield ready

    def _function(self, variant: Variant, entry: str, index: int, ready: _Ready) -> Any:
        key = variant, entry, index
        if key not in self._functions:
            self._functions[key] = _or_error(lambda: _loaded(ready, variant, entry))
        return _unless_error(self._functions[key])


def _counters_now(ready: _Ready, index: int, count: int) -> int:
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing():
        return ready.counters.of_capture(stream, count)
    return ready.counters.of_stream(stream, count)


def _loaded(ready: _Ready, variant: Variant, entry: str) -> Any:
    code = machine_code(variant, ready.target)
    try:
        return ready.gpu.function(code, entry)
    except CudaError as error:
        raise CudaError(f"{variant} for {ready.target}: {error}") from None


def _probed(index: int) -> _Ready:
    """The GPU after a kernel that was compiled for it has given what it should."""
    gpu, target = Gpu(index), target_for(torch.cuda.get_device_capability(index))
    kernel = Kernel(gpu.api, gpu.function(machine_code(PROBE, target), "probe"), packer(PROBE, "probe"), (1, 1), 128)
    found = gpu.run_apart(kernel, _PROBE_COUNT, _PROBE_SCALE, _PROBE_COUNT)
    for i, value in enumerate(found):
        if value != _PROBE_SCALE * i:
            raise CudaError(f"the probe, a kernel that is to compute {_PROBE_SCALE}·{i}, gave {value}")
    return _Ready(gpu, target, Counters(gpu))


def _or_error(make: Callable[[], Any]) -> Any:
    """What is made, or the error: so that neither is made twice."""
    try:
        return make()
    except CudaError as error:
        return error
    except Exception as error:  # a source file that is gone, a GPU that torch cannot describe: no op may fail for it
        return CudaError(f"{type(error).__name__}: {error}")


def _unless_error(found: Any) -> Any:
    if isinstance(found, CudaError):
        raise CudaError(str(found))  # a new one: a traceback holds what its frames hold
    return found
