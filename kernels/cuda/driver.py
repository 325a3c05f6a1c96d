"""One GPU through the CUDA driver: its context, memory of our own, loading and launching kernels.

Nothing here goes through torch: what torch allocates may belong to the pool of a CUDA graph, and torch's stream may be
capturing. What allocates or waits says so to the driver (`outside_capture`) and uses a stream of its own, so that it
may happen while this or another thread captures a graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from normpass.kernels.cuda.calls import bindings, call, cannot_be_called, has_returned

Launch = Callable[..., None]
"""Run a kernel on the current stream with these arguments."""


class Gpu:
    """One GPU, with the context that torch uses there."""

    def __init__(self, index: int) -> None:
        self.api = bindings("driver")
        call(self.api, "cuInit", 0)
        self._context = call(self.api, "cuDevicePrimaryCtxRetain", call(self.api, "cuDeviceGet", index))
        with self.current(), self.outside_capture():
            flags = self.api.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = call(self.api, "cuStreamCreate", int(flags))

    def make_current(self) -> None:
        """Make this GPU's context current in this thread."""
        if int(call(self.api, "cuCtxGetCurrent")) != int(self._context):
            call(self.api, "cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Inside, this GPU's context is current in this thread."""
        before = call(self.api, "cuCtxGetCurrent")
        if int(before) == int(self._context):
            yield
            return
        call(self.api, "cuCtxSetCurrent", self._context)
        try:
            yield
        finally:
            call(self.api, "cuCtxSetCurrent", before)

    @contextlib.contextmanager
    def outside_capture(self) -> Iterator[None]:
        """What allocates may not run in a thread that captures a CUDA graph, or beside one, unless it says so."""
        modes = self.api.CUstreamCaptureMode
        before = call(self.api, "cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            call(self.api, "cuThreadExchangeStreamCaptureMode", before)

    def zeros(self, size: int) -> int:
        """The address of `size` bytes that are 0, for ever ours."""
        with self.current(), self.outside_capture():
            address = call(self.api, "cuMemAlloc", size)
            call(self.api, "cuMemsetD8Async", address, 0, size, self._stream)
            call(self.api, "cuStreamSynchronize", self._stream)
        return int(address)

    def function(self, code: bytes, entry: str) -> Any:
        """The kernel `entry` of machine code, loaded."""
        with self.current(), self.outside_capture():
            function = call(self.api, "cuModuleGetFunction", call(self.api, "cuModuleLoadData", code), entry.encode())
            # Asking for an attribute loads it now: the driver would at its first launch, perhaps within a capture.
            registers = self.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
            call(self.api, "cuFuncGetAttribute", registers, function)
        return function

    def run_apart(self, kernel: Kernel, count: int, *args: float) -> list[float]:
        """Run a kernel on our own stream, wait, and return `count` doubles from the memory that it gets first."""
        result, size = (ctypes.c_double * count)(), 8 * count
        with self.current(), self.outside_capture():
            memory = call(self.api, "cuMemAlloc", size)
            try:
                call(self.api, "cuMemsetD8Async", memory, 255, size, self._stream)
                kernel(self._stream, (int(memory), *args))
                call(self.api, "cuMemcpyDtoHAsync", ctypes.addressof(result), memory, size, self._stream)
                call(self.api, "cuStreamSynchronize", self._stream)
            finally:
                call(self.api, "cuMemFree", memory)
        return list(result)


class Kernel:
    """A loaded kernel with its grid, and the block of memory that its arguments are handed over in."""

    def __init__(self, api: Any, function: Any, arguments: struct.Struct, grid: tuple[int, int], threads: int) -> None:
        self._pack, self._launch = arguments.pack_into, api.cuLaunchKernel
        self._values = ctypes.create_string_buffer(arguments.size)
        first = ctypes.addressof(self._values)
        addresses = range(first, first + arguments.size, 8)
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._address = ctypes.addressof(self._pointers)
        self._shape = (function, *grid, 1, threads, 1, 1, 0)
        self._lock = threading.Lock()  # the driver reads the block while other threads of Python run

    def __call__(self, stream: Any, args: Sequence[float]) -> None:
        with self._lock:
            self._pack(self._values, 0, *args)
            try:
                (code,) = self._launch(*self._shape, stream, self._address, 0)
            except Exception as error:  # as in `call`, which would take as long again
                raise cannot_be_called("cuLaunchKernel", error) from error
        if code != 0:
            raise has_returned("cuLaunchKernel", code)
