"""The models and bars of the memory figures, for the quick tests and for `make test-nets`."""

import torch
from torch import nn


def ten_blocks(activation) -> nn.Module:
    """Ten conv → BN → activation at 32 × 112², then pooling and a classifier."""
    layers: list[nn.Module] = []
    for index in range(10):
        stride, inputs = (2, 3) if index == 0 else (1, 32)
        layers += [nn.Conv2d(inputs, 32, 3, stride, 1, bias=False), nn.BatchNorm2d(32), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


TEN_BLOCKS = {
    "leaky_relu": (lambda: nn.LeakyReLU(0.01, inplace=True), 0.52),
    "relu": (lambda: nn.ReLU(inplace=True), 0.52),
    "silu": (nn.SiLU, 0.37),
}

# network -> (kept, peak), as fractions of eager with in-place activations, at 2×3×224², fp32
BARS = {
    "resnet50": (0.56, 0.70),
    "densenet121": (0.25, 0.45),
    "mobilenet_v2": (0.38, 1.0),
    "efficientnet_b0": (0.36, 1.0),
}


def image(size: int = 224) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
