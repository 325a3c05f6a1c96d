"""What a DenseNet keeps for backward, plain and optimised, and what was done to each of its norms.

A DenseNet concatenates all earlier features before each norm. Plain, every concatenation and every
activation is kept; optimised, only the convolutions' outputs are.
"""

import torch
from torchvision.models import DenseNet

import normpass
from normpass.measure import format_bytes, kept_bytes, peak_bytes


def main(blocks: tuple[int, ...] = (6, 12, 24, 16), batch_size: int = 2, size: int = 224) -> dict[str, tuple[int, int]]:
    """Measure a DenseNet with `blocks` layers in its blocks: (plain, optimised) bytes by what they are."""
    plain = DenseNet(block_config=blocks)
    images = torch.randn(batch_size, 3, size, size)
    optimised = normpass.optimize(plain)
    print(normpass.explain(plain))

    found = {}
    for what, measured in (("kept for backward", kept_bytes), ("peak over a step", peak_bytes)):
        before, after = measured(plain, images), measured(optimised, images)
        found[what] = (before, after)
        print(f"{what}: {format_bytes(before)} plain, {format_bytes(after)} optimised ({after / before:.2f})")
    return found


if __name__ == "__main__":
    main()
