"""For test_cuda_bindings.py: load the kernels with the bindings that are installed and the stub driver.

NORMPASS_STUB_LACKS is in the environment or not; NORMPASS_STUB_FAILS goes through the names that are given. Prints what
`load` answers for each, as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys

import torch

from normpass.kernels.cuda import library as cuda_library
from normpass.kernels.cuda.device import Gpus


@contextlib.contextmanager
def nothing(index: int):
    yield


def answers(names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        os.environ["NORMPASS_STUB_FAILS"] = name
        kernels, words = cuda_library.load()
        found[name] = "loaded" if kernels is not None else words
    os.environ["NORMPASS_STUB_FAILS"] = ""
    return found


def counters_come_back() -> bool:
    """The block of a capture is free again when the driver says that its graph is gone."""
    counters = Gpus().prepare(0).counters
    counters.of_capture(7, 10)
    if "NORMPASS_STUB_LACKS" in os.environ:
        return False
    ctypes.CDLL("libcuda.so.1").stub_end_graph()
    counters._collect()
    return not counters._of_capture


if __name__ == "__main__":
    torch.version.cuda = "13.0"
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    torch.cuda.get_device_capability, torch.cuda.device = lambda index: (9, 0), nothing
    result = {"answers": answers(["", *sys.argv[1:]])}
    if result["answers"][""] == "loaded":
        result["counters"] = counters_come_back()
    print(json.dumps(result))
