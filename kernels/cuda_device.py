"""The GPUs as `CudaKernels` sees them: machine code is loaded and launched through `cuda.core`.

A launch goes to torch's current stream of the GPU at hand and waits for nothing. Nothing is done at import.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normpass.kernels.cuda_compiler import Variant, cubin

Launch = Callable[..., None]
"""Run a kernel with these arguments: ints (64 bits: pointers and sizes) and floats (double)."""


class Gpus:
    """All GPUs that torch sees."""

    def __init__(self) -> None:
        self._core: Any = importlib.import_module("cuda.core")
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._kernels: dict[tuple[Variant, str, int], Any] = {}
        self._streams: dict[int, Any] = {0: self._core.LEGACY_DEFAULT_STREAM}
        self._arrivals: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()

    def multiprocessors(self, index: int) -> int:
        count: int = torch.cuda.get_device_properties(index).multi_processor_count
        return count

    def kernel(self, variant: Variant, entry: str, grid: tuple[int, int], threads: int, index: int) -> Launch:
        """What launches `entry` of `variant` on GPU `index`, compiled at the first call."""
        with self._current(index):
            kernel = self._loaded(variant, entry, index)
        config = self._core.LaunchConfig(grid=grid, block=threads)
        launch = self._core.launch

        def run(*args: float) -> None:
            if torch.cuda.current_device() == index and getattr(self._thread, "ready", False):
                launch(self._stream(index), config, kernel, *args)
                return
            with self._current(index):
                launch(self._stream(index), config, kernel, *args)

        return run

    def arrivals(self, like: Tensor, count: int) -> Tensor:
        """`count` counters that are 0 for the next kernel of the current stream, which leaves them so.

        Each stream has its own. A CUDA graph gets its own too, which it clears in every replay: it may run beside
        the stream that it was captured on.
        """
        index = like.device.index
        with self._current(index):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(count, dtype=torch.int32, device=like.device)
            key = index, torch._C._cuda_getCurrentRawStream(index)
            found = self._arrivals.get(key)
            if found is None or found.numel() < count:
                found = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
                self._arrivals[key] = found
            return found

    def _stream(self, index: int) -> Any:
        handle = torch._C._cuda_getCurrentRawStream(index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = self._core.Stream.from_handle(handle)
        return stream

    @contextlib.contextmanager
    def _current(self, index: int) -> Iterator[None]:
        """With GPU `index` current in this thread; a thread that has called no CUDA yet has no context."""
        with torch.cuda.device(index):
            if not getattr(self._thread, "ready", False):
                self._core.Device(index).set_current()
                self._thread.ready = True
            yield

    def _loaded(self, variant: Variant, entry: str, index: int) -> Any:
        key = variant, entry, index
        with self._lock:
            if key not in self._kernels:
                major, minor = torch.cuda.get_device_capability(index)
                code = self._core.ObjectCode.from_cubin(cubin(variant, f"sm_{major}{minor}"), name=variant.source)
                with self._outside_capture():
                    kernel = code.get_kernel(entry)
                    self._driver.cuKernelGetFunction(kernel.handle)  # the driver would load it at its first launch
                self._kernels[key] = kernel
            return self._kernels[key]

    @contextlib.contextmanager
    def _outside_capture(self) -> Iterator[None]:
        """Loading code allocates, which a thread that captures a CUDA graph may not do, unless it says so."""
        exchange, modes = self._driver.cuThreadExchangeStreamCaptureMode, self._driver.CUstreamCaptureMode
        _, before = exchange(modes.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            exchange(before)
