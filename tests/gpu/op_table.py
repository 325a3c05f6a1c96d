"""Each op beside a copy of as many bytes, and a norm with its activation beside ATen's, cuDNN's and Inductor's.

python op_table.py op:256x256x56x56 layer:bn_relu:256x256x56x56 …
"""

from __future__ import annotations

import sys
from typing import Any

import rows
import torch

from normpass.bench.layers import Case, bench_layer
from normpass.bench.ops import bench_kernels

DEVICE = torch.device("cuda")
ROUNDS = 10


def measured(item: str) -> dict[str, Any]:
    """Microseconds and the share of the copy's speed of each op or contender; of an op also its call's from Python."""
    kind, *layer, shape = item.split(":")
    case = Case(
        layer[0] if layer else "bn_relu",
        tuple(int(size) for size in shape.split("x")),
        torch.bfloat16,
        "channels_last",
        DEVICE,
    )
    if kind == "op":
        return {row.kernel: [*us(row), round(row.call_microseconds, 1)] for row in bench_kernels(case, ROUNDS)}
    return {
        row.contender: row.error or {name: us(phase) for name, phase in row.phases.items()}
        for row in bench_layer(case, ROUNDS)
    }


def us(row: Any) -> list[float]:
    return [round(1e6 * row.seconds, 1), round(row.of_copy, 2)]


if __name__ == "__main__":
    sys.exit(rows.run_items("op table", sys.argv[1:], measured))
