"""Bindings without a GPU: a driver that runs kernels by the emulation, a compiler whose code is a variant's name.

Any of their functions can be told to fail: to return a code, or to raise as the bindings do where a library lacks it.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from cuda_emulated import EmulatedDevice

from normpass.kernels.cuda import compiler as cuda_compiler
from normpass.kernels.cuda.variant import Variant, signature


class Code(enum.IntEnum):
    SUCCESS = 0
    OUT_OF_MEMORY = 2
    NO_BINARY_FOR_GPU = 209


class Bindings:
    """The functions of one module of the bindings. `fails`: name -> after how many calls, how, and whether for ever."""

    def __init__(self) -> None:
        self.fails: dict[str, tuple[int, Code | Exception, bool]] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith(("cu", "nvrtc")):
            return found

        def checked(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            after, failure, lasts = self.fails.get(name, (-1, Code.SUCCESS, False))
            self.fails[name] = after - 1, failure, lasts
            fails_now = after == 0 or (lasts and after < 0)
            if fails_now and isinstance(failure, Exception):
                raise failure
            if fails_now:
                return (failure, *[None] * (len(found(*args)) if name.endswith("Info") else 0))
            return (Code.SUCCESS, *found(*args))

        return checked


class StubDriver(Bindings):
    """Memory is the CPU's. Streams are numbers, and graphs say whether they are gone."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS=4)
    CUuserObject_flags = SimpleNamespace(CU_USER_OBJECT_NO_DESTRUCTOR_SYNC=1)
    CUuserObjectRetain_flags = SimpleNamespace(CU_GRAPH_USER_OBJECT_MOVE=1)

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.context, self.mode = 0, "global"
        self.memory: dict[int, Any] = {}
        self.capture = 0
        self.watchers: dict[int, list[Callable[[], None]]] = {}
        self._objects: dict[int, Callable[[], None]] = {}

    def end_graph(self, capture: int) -> None:
        """All that was made of this graph is gone."""
        for release in self.watchers.pop(capture, []):
            release()

    def cuInit(self, flags: int) -> tuple[()]:
        return ()

    def cuDeviceGet(self, index: int) -> tuple[int]:
        return (0,)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int]:
        return (77,)

    def cuCtxGetCurrent(self) -> tuple[int]:
        return (self.context,)

    def cuCtxSetCurrent(self, context: int) -> tuple[()]:
        self.context = context
        return ()

    def cuThreadExchangeStreamCaptureMode(self, mode: str) -> tuple[str]:
        before, self.mode = self.mode, mode
        return (before,)

    def cuStreamCreate(self, flags: int) -> tuple[int]:
        return (99,)

    def cuStreamSynchronize(self, stream: int) -> tuple[()]:
        return ()

    def cuMemAlloc(self, size: int) -> tuple[int]:
        assert self.mode == "relaxed" and self.context == 77
        memory = ctypes.create_string_buffer(b"\xaa" * size, size)
        self.memory[ctypes.addressof(memory)] = memory
        return (ctypes.addressof(memory),)

    def cuMemFree(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[()]:
        assert stream == 99, "torch's stream may be capturing"
        ctypes.memset(address, value, size)
        return ()

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[()]:
        ctypes.memmove(target, source, size)
        return ()

    def cuModuleLoadData(self, code: bytes) -> tuple[Variant]:
        assert self.mode == "relaxed" and self.context == 77
        return (pickle.loads(code),)

    def cuModuleGetFunction(self, module: Variant, entry: bytes) -> tuple[tuple[Variant, str]]:
        return ((module, entry.decode()),)

    def cuFuncGetAttribute(self, attribute: int, function: Any) -> tuple[int]:
        return (32,)

    def cuLaunchKernel(self, function: tuple[Variant, str], *args: int) -> tuple[()]:
        assert self.context == 77
        x, y, _, threads, *_, address, _ = args
        letters = signature(*function)
        pointers = (ctypes.c_void_p * len(letters)).from_address(address)
        types = {"q": ctypes.c_int64, "d": ctypes.c_double}
        values = [types[t].from_address(p or 0).value for t, p in zip(letters, pointers, strict=True)]
        self.device.kernel(*function, (x, y), threads, 0)(*values)
        return ()

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        return "active", self.capture, self.capture, None, [], 0

    def cuUserObjectCreate(self, data: int, destroy: int, count: int, flags: int) -> tuple[int]:
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(destroy)
        self._objects[data] = lambda: function(data)
        return (data,)

    def cuGraphRetainUserObject(self, graph: int, watcher: int, count: int, flags: int) -> tuple[()]:
        self.watchers.setdefault(graph, []).append(self._objects[watcher])
        return ()


class StubNvrtc(Bindings):
    """Code for `sm_90` and older is the variant, pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[bytes] = []

    def nvrtcVersion(self) -> tuple[int, int]:
        return 13, 0

    def nvrtcGetSupportedArchs(self) -> tuple[list[int]]:
        return ([75, 80, 90],)

    def nvrtcCreateProgram(self, source: bytes, name: bytes, *headers: Any) -> tuple[str]:
        return (name.decode().removesuffix(".cu"),)

    def nvrtcCompileProgram(self, program: str, count: int, options: list[bytes]) -> tuple[()]:
        self.options = options
        macros = [o.decode().split("=", 2)[1:] for o in options if o.startswith(b"--define-macro=")]
        self.code = pickle.dumps(Variant(program, tuple((name, value) for name, value in macros)))
        return ()

    def nvrtcGetCUBINSize(self, program: str) -> tuple[int]:
        return (len(self.code),)

    def nvrtcGetCUBIN(self, program: str, content: bytes) -> tuple[()]:
        ctypes.memmove(content, self.code, len(self.code))
        return ()

    nvrtcGetPTXSize, nvrtcGetPTX = nvrtcGetCUBINSize, nvrtcGetCUBIN

    def nvrtcGetProgramLogSize(self, program: str) -> tuple[int]:
        return (6,)

    def nvrtcGetProgramLog(self, program: str, content: bytes) -> tuple[()]:
        ctypes.memmove(content, b"a log\0", 6)
        return ()

    def nvrtcDestroyProgram(self, program: str) -> tuple[()]:
        return ()


class Stubs:
    """Both libraries, and what torch.cuda would say. `install` puts them in place."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.driver, self.nvrtc = StubDriver(device), StubNvrtc()
        self.capability = (9, 0)
        self.stream = 5
        self.capturing = False
        self.device = device

    def install(self, monkeypatch: Any, folder: Any) -> None:
        of_name = {"driver": self.driver, "nvrtc": self.nvrtc}
        for module in ("driver", "compiler"):
            monkeypatch.setattr(f"normpass.kernels.cuda.{module}.bindings", of_name.__getitem__)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        for cached in (cuda_compiler.nvrtc_version, cuda_compiler.supported_architectures):
            monkeypatch.setattr(cuda_compiler, cached.__name__, cached.__wrapped__)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        properties = SimpleNamespace(multi_processor_count=self.device.multiprocessors(0))
        torch_says: dict[str, Any] = {
            "is_available": lambda: True,
            "current_device": lambda: None,
            "device": _nothing,
            "get_device_properties": lambda index: properties,
            "get_device_capability": lambda index: self.capability,
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, value in torch_says.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)

    def fail(self, name: str, failure: Code | Exception, after: int = 0, lasts: bool = False) -> None:
        """Let `name` fail on the call after `after` more of them, and with `lasts` on each one then."""
        self.of(name).fails[name] = after, failure, lasts

    def forget(self) -> None:
        """No more failures, and a thread that has called nothing yet."""
        self.driver.fails.clear()
        self.nvrtc.fails.clear()
        self.driver.context, self.driver.mode = 0, "global"

    def counts(self) -> dict[str, int]:
        """How often each function was called."""
        calls = sorted([*self.driver.calls, *self.nvrtc.calls])
        return {name: len(list(group)) for name, group in itertools.groupby(calls)}

    def of(self, name: str) -> Bindings:
        return self.nvrtc if name.startswith("nvrtc") else self.driver


@contextmanager
def _nothing(index: Any) -> Any:
    yield
