"""What a DenseNet keeps for backward, plain and optimized, and what was done to each of its norms.

A DenseNet concatenates all earlier features before each norm. Plain, every concatenation and every
activation is kept; optimized, only the convolutions' outputs are.
"""

import torch
from torchvision.models import DenseNet

import normpass


def main(blocks: tuple[int, ...] = (6, 12, 24, 16), batch_size: int = 2, size: int = 224) -> dict[str, tuple[int, int]]:
    """Measure a DenseNet with `blocks` layers in its blocks: (plain, optimized) bytes by what they are."""
    plain = DenseNet(block_config=blocks)
    images = torch.randn(batch_size, 3, size, size)
    report = normpass.explain(plain, images)
    print(report)
    memory = report.memory
    return {
        "kept for backward": (memory.kept_before, memory.kept_after),
        "peak over a step": (memory.peak_before, memory.peak_after),
    }


if __name__ == "__main__":
    main()
