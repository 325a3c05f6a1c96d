"""conv → norm → ReLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

C = 4


def block(inputs: int = 3, outputs: int = C, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace))


class Functional(nn.Module):
    """The same, its activation a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))
