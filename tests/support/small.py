"""Small networks, each for one thing that capture and the rewrites must get right."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(channels_in: int, channels: int, act: nn.Module | None = None) -> nn.Sequential:
    """conv3x3 -> BatchNorm -> activation (ReLU unless given)."""
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), act or nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two levels; the skips are concatenated, so a normalized tensor is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_norm(3, 8)
        self.down2 = conv_norm(8, 16)
        self.bottom = conv_norm(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2 = conv_norm(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join1 = conv_norm(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(F.max_pool2d(d1, 2))
        u = self.bottom(F.max_pool2d(d2, 2))
        u = self.join2(torch.cat([self.up2(u), d2], 1))
        u = self.join1(torch.cat([self.up1(u), d1], 1))
        return self.head(u)


def conv1d() -> nn.Module:
    """A net for signals: BatchNorm1d over (N, C, L), without affine and without running statistics too."""
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.LeakyReLU(0.1),
        nn.Conv1d(8, 16, 5, stride=2, padding=2),
        nn.BatchNorm1d(16, affine=False),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3),
        nn.BatchNorm1d(16, track_running_stats=False),
        nn.ELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def mlp() -> nn.Module:
    """BatchNorm1d over (N, C), with `momentum=None`, dropout, and a plain BatchNorm at the end."""
    return nn.Sequential(
        nn.Linear(12, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(32, 16, bias=False),
        nn.BatchNorm1d(16, momentum=None, eps=1e-3),
        nn.Tanh(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5),
    )


def decoder() -> nn.Module:
    """Transposed convolutions, as in the generator of a GAN."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2, True),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(8, 3, 3, padding=1),
        nn.Tanh(),
    )


# CELU's alpha is a power of two: torch's own backward rounds 1 / alpha to fp32, and is off by 4e-8 for 1.3.
ACTIVATIONS = (
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.01), nn.LeakyReLU(0.2, inplace=True),
    nn.ELU(), nn.ELU(0.5, inplace=True), nn.SELU(), nn.CELU(0.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
    nn.SiLU(inplace=True), nn.Mish(), nn.Hardswish(), nn.Hardswish(inplace=True), nn.Hardsigmoid(),
    nn.Hardtanh(), nn.Hardtanh(-2.0, 0.5, inplace=True), nn.Sigmoid(), nn.Tanh(), nn.Softplus(2.0),
    nn.Softsign(), nn.LogSigmoid(), nn.Hardshrink(0.1), nn.Softshrink(0.1), nn.Tanhshrink(),
    nn.Threshold(0.1, 0.0), nn.RReLU(), nn.PReLU(), nn.PReLU(6), nn.GLU(1), nn.Softmax(1), nn.Identity(),
)  # fmt: skip


class EveryActivation(nn.Module):
    """conv -> norm -> activation -> conv, side by side, for every activation that torch.nn has."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(self._branch(act) for act in ACTIVATIONS)

    @staticmethod
    def _branch(act: nn.Module) -> nn.Module:
        channels = 3 if isinstance(act, nn.GLU) else 6
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), copy.deepcopy(act), nn.Conv2d(channels, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).tanh().mean((3, 4))


class Functional(nn.Module):
    """The functional and method spellings, in place and not, of norms and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=i % 2 == 0) for i in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(8))
        self.weight = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.convs, self.norms
        x = F.relu(norm[0](conv[0](x)))
        x = F.relu(norm[1](conv[1](x)), inplace=True)
        x = torch.relu(norm[2](conv[2](x)))
        x = norm[3](conv[3](x)).relu_()
        x = F.leaky_relu_(norm[4](conv[4](x)), 0.1)
        y = norm[5](conv[5](x))
        y += x
        x = torch.relu_(y)
        x = conv[6](x)
        x = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training, 0.2, 1e-4)
        x = F.silu(x)
        x = F.hardswish(norm[6](conv[7](x))) * norm[7](conv[8](x)).sigmoid()
        return F.adaptive_avg_pool2d(x.clamp(min=0), 2).flatten(1)


def grouped() -> nn.Module:
    """Grouped, depthwise, dilated, strided and reflecting convolutions, and a norm that keeps three axes."""
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=2, dilation=2, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1, groups=4),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 24, (1, 5), stride=(2, 1), padding=(0, 2), padding_mode="reflect"),
        nn.BatchNorm2d(24),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(24, 8, 3),
    )


class ControlFlow(nn.Module):
    """A root that no symbolic trace gets through; its blocks are traceable one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.blocks = nn.ModuleList(nn.Sequential(conv_norm(8, 8), conv_norm(8, 8, nn.SiLU())) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if float(y.detach().mean()) > 0 else x - y
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """norm -> ReLU -> conv, where the sum that feeds a norm is also the residual."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm1 = nn.BatchNorm2d(channels)
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(F.relu(self.norm1(x)))
            return x + self.conv2(F.relu(self.norm2(y)))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(PreActivation.Block(8) for _ in range(4)))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """What must be left alone or handled with care: a norm called twice, tied weights, a norm's input and
    output both read elsewhere, a view of a normalized tensor, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tied = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tied.weight = self.conv.weight
        self.twice = nn.BatchNorm2d(8)
        self.read = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        y = F.relu(self.twice(self.conv(x)))
        z = self.tied(F.relu(self.twice(self.tied(y))))
        n = self.read(z)
        parts = F.relu(n).chunk(2, 1)
        return {"features": z * 0.5 + n, "parts": parts[0] - parts[1].flip(1)}


def frozen() -> nn.Module:
    """Norms in eval mode inside a model in train mode, with and without gradients for gamma and beta."""
    net = nn.Sequential(*(conv_norm(3 if i == 0 else 8, 8) for i in range(4)), nn.Conv2d(8, 4, 1))
    net[1][1].eval()
    net[2][1].eval().requires_grad_(False)
    net[0].requires_grad_(False)
    return net


def group_norms() -> nn.Module:
    """Norms over the sample: GroupNorm, InstanceNorm with and without statistics, LayerNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.LayerNorm(8),
        nn.Conv2d(8, 4, 1),
    )


def conv3d() -> nn.Module:
    """BatchNorm3d over (N, C, D, H, W)."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0)),
        nn.BatchNorm3d(8),
        nn.Softplus(),
        nn.Conv3d(8, 2, 1),
    )
