"""What networks without BatchNorm keep for backward, plain and optimized: an nnU-Net's and a diffusion model's blocks.

nnU-Net is 3-d convolutions, InstanceNorm and LeakyReLU; a diffusion U-Net is residual blocks of GroupNorm and SiLU.
Norm and activation are one op there too: the norm's input is kept, and the rest is made again.
"""

import torch
from torch import Tensor, nn

import normpass


def nnunet_stage(channels: int, count: int = 4) -> nn.Sequential:
    """(conv3d → InstanceNorm3d → LeakyReLU) `count` times, as nnU-Net has them."""
    layers: list[nn.Module] = []
    for index in range(count):
        conv = nn.Conv3d(channels if index else 1, channels, 3, padding=1)
        layers += [conv, nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*layers)


class DiffusionBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), as a diffusion U-Net has it."""

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.silu = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.silu(self.norm1(x)))
        return x + self.conv2(self.silu(self.norm2(y)))


def main(channels: int = 32, size: int = 32) -> dict[str, tuple[int, int]]:
    """Explain both networks: (plain, optimized) bytes that are kept, by network."""
    found = {}
    diffusion = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *(DiffusionBlock(channels) for _ in range(4)))
    networks = {
        "nnU-Net": (nnunet_stage(channels), torch.randn(1, 1, size, size, size)),
        "diffusion": (diffusion, torch.randn(2, 3, 2 * size, 2 * size)),
    }
    for name, (model, x) in networks.items():
        report = normpass.explain(model, x)
        print(name, report, sep="\n")
        assert report.memory is not None
        found[name] = report.memory.kept_before, report.memory.kept_after
    return found


if __name__ == "__main__":
    main()
