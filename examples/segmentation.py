"""Segmentation: find the bright disc in noise. A U-Net's skips and upsampled maps are rebuilt, not kept."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normpass
from normpass.measure import format_bytes, kept_bytes


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels down and up, with the skips concatenated."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(F.max_pool2d(d1, 2))
        u = self.bottom(F.max_pool2d(d2, 2))
        u = self.up2(torch.cat([F.interpolate(u, scale_factor=2), d2], 1))
        return self.head(self.up1(torch.cat([F.interpolate(u, scale_factor=2), d1], 1)))


def discs(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 1, size, size) with a disc each, and where it is."""
    axis = torch.arange(size) / size
    centre, radius = 0.25 + 0.5 * torch.rand(2, batch, 1, 1), 0.1 + 0.15 * torch.rand(batch, 1, 1)
    distance = (axis[:, None] - centre[0]).square() + (axis - centre[1]).square()
    mask = (distance < radius.square()).float()[:, None]
    return mask + 0.5 * torch.randn_like(mask), mask


def main(steps: int = 40, batch_size: int = 8, size: int = 64, width: int = 16) -> list[float]:
    """Train for `steps` batches of images `size` pixels a side; the loss of each step."""
    torch.manual_seed(0)
    plain = UNet(width)
    model = normpass.optimize(plain)
    images, _ = discs(batch_size, size)
    print(f"kept for backward: {format_bytes(kept_bytes(plain, images))} plain, ", end="")
    print(f"{format_bytes(kept_bytes(model, images))} optimized")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        images, masks = discs(batch_size, size)
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
