"""The installed `cuda.bindings` with a stub of the driver: names, numbers of results, codes and what is missing.

To be run with every version that is meant: `pip install --target FOLDER --no-deps cuda-bindings==12.8.0`, and FOLDER
first in PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings, as torch for CUDA brings it")

from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.compiler import machine_code
from normpass.kernels.cuda.device import PROBE

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ for the stub of the driver")

CALLED = (
    *("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamCreate"),
    *("cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute"),
    *("cuMemAlloc", "cuMemsetD8Async", "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuMemFree", "cuLaunchKernel"),
)
"""In loading."""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A folder with the stub, and the probe's code in a cache: NVRTC asks a driver that it finds for more than ours."""
    folder = tmp_path_factory.mktemp("libcuda")
    library = str(folder / "libcuda.so.1")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", str(HERE / "stub_libcuda.cpp"), "-o", library], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        try:
            machine_code(PROBE, "sm_90")
        except CudaError as error:
            pytest.skip(f"NVRTC does not run here: {error}")
    return folder


def loaded_with(stub: Path, *names: str, **more: str) -> dict:
    paths = f"{stub}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = {**os.environ, "LD_LIBRARY_PATH": paths, "XDG_CACHE_HOME": str(stub), **more}
    command = [sys.executable, str(HERE / "load_with_stub.py"), *names]
    return json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])


def test_every_code_is_looked_at(stub):
    found = loaded_with(stub, *CALLED)
    answers = found["answers"]
    assert answers.pop("") == "loaded" and found["counters"]
    wrong = {name: words for name, words in answers.items() if f"{name} returned CUDA_ERROR_UNKNOWN" not in words}
    assert not wrong and len(answers) == len(CALLED)


def test_a_driver_that_lacks_a_function(stub):
    words = loaded_with(stub, NORMPASS_STUB_LACKS="cuFuncGetAttribute")["answers"][""]
    assert "cuFuncGetAttribute cannot be called" in words


def test_a_driver_without_user_objects(stub):
    found = loaded_with(stub, NORMPASS_STUB_LACKS="cuUserObjectCreate")
    assert found["answers"][""] == "loaded"
