"""Networks with SyncBatchNorm on unequal parts of a batch are the network with BatchNorm on all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes

pytestmark = [
    pytest.mark.nets,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]


@pytest.mark.parametrize("sizes", ["3,2", "4,1,0"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "deeplabv3_resnet50"])
def test_as_one_process(name: str, sizes: str, tmp_path: Path) -> None:
    output = run_processes("sync_networks.py", sizes.count(",") + 1, tmp_path, name, sizes, timeout=900)
    print(output[0])
