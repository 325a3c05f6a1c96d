"""One of two processes, of which one leaves before a collective of a SyncBatchNorm, or never comes to it.

`run_processes("sync_death.py", 2, …, "leaves" or "hangs", "forward" or "backward")`
"""

from __future__ import annotations

import os
import time

import torch
from processes import begin
from torch import nn

import normpass

TIMEOUT = 3.0
"""seconds, of the process group"""


def main() -> None:
    rank, _, (how, where) = begin(timeout=TIMEOUT)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.ReLU()).double()
    model, x = normpass.optimize(model), torch.ones(2, 3, 4, 4, dtype=torch.float64)
    model(x).sum().backward()  # captured, and everybody is there
    y = None if where == "forward" else model(x).sum()
    if rank == 1 and how == "leaves":
        os._exit(1)
    if rank == 1:
        time.sleep(3 * TIMEOUT)
        os._exit(1)
    start = time.monotonic()
    try:
        model(x) if y is None else y.backward()
    except RuntimeError as error:
        assert time.monotonic() - start < 2 * TIMEOUT
        print(f"raised {error}", flush=True)
        os._exit(0)
    raise AssertionError("the collective came to an end")


if __name__ == "__main__":
    main()
