"""SyncBatchNorm in several processes, over gloo: what one process with the whole batch and BatchNorm computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
TWO = (
    "networks dimensions dtypes modes groups collectives alone budget around options converted_later ddp twice compiled"
)
THREE = "networks dimensions collectives"


@pytest.mark.parametrize(("world", "checks"), [(2, TWO), (3, THREE)], ids=["3 + 2", "4 + 1 + 0"])
def test_in_several_processes(world: int, checks: str, tmp_path: Path) -> None:
    for output in run_processes("sync_worker.py", world, tmp_path, *checks.split(), timeout=600):
        assert [line for line in output.splitlines() if line.endswith(" ok")] == [f"{c} ok" for c in checks.split()]


@pytest.mark.parametrize(("how", "where"), [("leaves", "forward"), ("hangs", "backward")])
def test_a_process_that_does_not_come(how: str, where: str, tmp_path: Path) -> None:
    """The error of torch.distributed, within the group's timeout."""
    output = run_processes("sync_death.py", 2, tmp_path, how, where, dies=(1,))[0]
    assert output.count("raised") == 1 and "gloo" in output, output
