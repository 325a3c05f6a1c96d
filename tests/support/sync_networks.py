"""One of some processes with a network of SyncBatchNorms: `run_processes("sync_networks.py", …, NAME, SIZES)`."""

from __future__ import annotations

import torch
from networks import network
from processes import begin, end
from sync_training import check, optimized
from torch import nn

import normpass
from normpass.capture.dynamo import raising
from normpass.measure import kept_bytes


def main() -> None:
    rank, _, (name, given) = begin(timeout=240)
    sizes = [int(size) for size in given.split(",")]
    torch.manual_seed(0)
    model = network(name).build().double().train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    x = torch.randn(sum(sizes), 3, 64, 64, dtype=torch.float64)
    with raising():
        check(model, x, sizes, rank)
        kept = [kept_bytes(m, x[: max(sizes)]) for m in (optimized(model), normpass.optimize(model))]
    ratio = kept[0] / kept[1]
    assert ratio <= 1.01, f"{kept[0]} bytes kept, with BatchNorm {kept[1]}"
    print(f"{name} {given}: kept {ratio:.4f} of BatchNorm's")
    end()


if __name__ == "__main__":
    main()
