"""Models whose memory is known in closed form."""

import torch
from torch import nn

B, IN, H = 16, 8, 64
HIDDEN = B * H * 4  # bytes of one hidden activation in fp32


def linear_chain(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, H), activation, nn.Linear(H, 4))


def conv_chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    )


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def rows() -> torch.Tensor:
    return torch.randn(B, IN)


class Lambda(nn.Module):
    """A layer with one weight, whose forward is a function of (module, x)."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(IN, H)

    def forward(self, x):
        return self.function(self, x)
