"""The GPU tests share their formulas with those of the emulated kernels, and multiply in full float32."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """No TF32, which has ten bits; what Inductor says of that is no error."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"))
