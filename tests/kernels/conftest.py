"""The helpers that lie here, and the CUDA kernels' sources as programs of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from cuda_emulated import EmulatedDevice


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDevice:
    return EmulatedDevice(tmp_path_factory.mktemp("cuda_on_cpu"))
