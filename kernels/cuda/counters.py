"""Counters that are 0 for the next kernel of a stream, which leaves them so: `cuda/reduce.cuh` counts blocks there.

They live as long as the process, in memory of the driver's: torch's may lie in the pool of a CUDA graph, from which
nothing may survive a warm-up. Two kernels must never count in one block of counters at a time, so

  * each stream has a block, for what is launched there: kernels of one stream run one after another;
  * each stream of each capture has another one: the graph may be replayed beside the stream that it was captured on,
    and beside graphs that were captured there before. Such a block goes to another capture only when the graph and
    all that was made of it are gone, which the driver tells by a *user object* of the graph.

The driver calls what a user object names from a thread of its own, where neither CUDA nor Python may be called: here
C's `sem_post`, on a semaphore that is asked when the next capture needs a block.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, NamedTuple, Protocol

from normpass.kernels.cuda.calls import CudaError, call

SMALLEST_BLOCK = 4096
"""Counters; one more for each tile of a grid, and few tensors have more tiles."""
_SLAB_BLOCKS = 16
_PER_THREAD_STREAM = 2
"""The driver's name for another stream in each thread."""


class Memory(Protocol):
    """What a `Gpu` gives for counters."""

    api: Any

    def zeros(self, size: int) -> int: ...


class Block(NamedTuple):
    """`size` counters at `address`; `gone` is the semaphore that tells that their graph is."""

    address: int
    size: int
    gone: int = 0


class Counters:
    """The counters of one GPU."""

    def __init__(self, gpu: Memory) -> None:
        self._gpu = gpu
        self._of_stream: dict[tuple[int, int], Block] = {}
        self._of_capture: dict[tuple[int, int], list[Block]] = {}
        self._free: list[Block] = []
        self._lock = threading.Lock()

    def of_stream(self, stream: int, count: int) -> int:
        """The address of at least `count` counters for what is launched on `stream`."""
        key = stream, threading.get_ident() if stream == _PER_THREAD_STREAM else 0
        found = self._of_stream.get(key)
        if found is not None and found.size >= count:
            return found.address
        with self._lock:  # a smaller block before it may still be counted in: it is not given to anybody else
            block = self._of_stream[key] = self._new(count)
        return block.address

    def of_capture(self, stream: int, count: int) -> int:
        """The same for what `stream`, which is capturing, adds to its graph."""
        api = self._gpu.api
        _, number, graph, *_ = call(api, "cuStreamGetCaptureInfo", stream)
        key = int(number), stream
        with self._lock:
            blocks = self._of_capture.get(key, [])
            for block in blocks:
                if block.size >= count:
                    return block.address
            self._collect()
            block = self._watched(self._new(count), graph)
            self._of_capture.setdefault(key, []).append(block)
        return block.address

    def _new(self, count: int) -> Block:
        for block in reversed(self._free):
            if block.size >= count:
                self._free.remove(block)
                return block
        size = max(SMALLEST_BLOCK, 1 << (count - 1).bit_length())
        blocks = _SLAB_BLOCKS if size == SMALLEST_BLOCK else 1
        address = self._gpu.zeros(4 * size * blocks)
        first, *others = [Block(address + 4 * size * i, size) for i in range(blocks)]
        self._free += others
        return first

    def _watched(self, block: Block, graph: Any) -> Block:
        """The block with a semaphore that is posted when `graph` is gone; without one it is never used again."""
        api, semaphore = self._gpu.api, _semaphore()
        if not semaphore:
            return block
        try:
            flag = api.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
            watcher = call(api, "cuUserObjectCreate", semaphore, _address_of("sem_post"), 1, int(flag))
        except CudaError:
            return block
        try:
            move = api.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
            call(api, "cuGraphRetainUserObject", graph, watcher, 1, int(move))
        except CudaError:
            return block  # and the object stays ours, so that nothing is ever posted
        return block._replace(gone=semaphore)

    def _collect(self) -> None:
        """Take back the blocks of graphs that are gone."""
        for key, blocks in list(self._of_capture.items()):
            free = [block for block in blocks if block.gone and _C.sem_trywait(ctypes.c_void_p(block.gone)) == 0]
            self._free += [block._replace(gone=0) for block in free]
            left = [block for block in blocks if block not in free]
            if left:
                self._of_capture[key] = left
            else:
                del self._of_capture[key]


_C = ctypes.CDLL(None)


def _address_of(function: str) -> int:
    return ctypes.cast(getattr(_C, function), ctypes.c_void_p).value or 0


def _semaphore() -> int:
    """One that nobody has posted, in C's memory: it may be posted while Python shuts down. 0 where there is none."""
    if not all(hasattr(_C, name) for name in ("calloc", "sem_init", "sem_post", "sem_trywait")):
        return 0
    allocate = _C.calloc
    allocate.restype = ctypes.c_void_p
    semaphore: int = allocate(ctypes.c_size_t(1), ctypes.c_size_t(64)) or 0
    ready = semaphore and _C.sem_init(ctypes.c_void_p(semaphore), 0, 0) == 0
    return semaphore if ready else 0
