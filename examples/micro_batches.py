"""Batch, group, Kalman and sparse switchable norm at 32, 4 and 2 samples a batch, on scikit-learn's digits.

    python examples/micro_batches.py --json examples/results/micro_batches.json

trains a small residual network once for every norm, batch size and seed, prints the mean error on held-out
images with its spread over the seeds, records everything and draws it. With --seeds, --batch-sizes and --norms
a part of it is run and joined to what the file has already.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normpass
from normpass import digits
from normpass.nn import RadiusSchedule, freeze_decided, parameter_groups, usage
from normpass.passes import Kalman

TRAINED = 1200
"""of the 1797 images; the others are held out"""
LEARNING_RATE = 0.1
"""at 32 samples a batch, and in proportion at other sizes"""


class Block(nn.Module):
    """conv, norm, ReLU, conv, norm, and a shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three blocks on 8×8 images: 8×8, 4×4 and 2×2 maps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def with_group_norm(model: nn.Module) -> nn.Module:
    """The same network with 4 groups wherever there is a BatchNorm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(4, child.num_features))
    return model


def build(norm: str, batch_size: int, width: int) -> nn.Module:
    model = SmallResNet(width)
    if norm == "group":
        return with_group_norm(model)
    if norm == "kalman":
        weight = 0.9 if batch_size < 8 else 0.05  # as the authors do
        return normpass.optimize(model, changes=(Kalman(prediction_weight=weight),))
    if norm == "switchable":
        return normpass.optimize(model, changes=("sparse_switchable",))
    return model


def train(norm: str, batch_size: int, seed: int, epochs: int = 4, width: int = 16, trained: int = TRAINED) -> dict:
    """One run: its error on the held-out images, in per cent, and for switchable norm its usage over training."""
    images, labels = digits._load()
    torch.manual_seed(seed)
    model = build(norm, batch_size, width)
    groups = parameter_groups(model, LEARNING_RATE * batch_size / 32, weight_decay=1e-4)
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, momentum=0.9)
    steps = epochs * (trained // batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    radius = RadiusSchedule(model, steps // 2) if norm == "switchable" else None
    used = []
    for step, chosen in enumerate(drawn(trained, batch_size, epochs, seed)):
        if radius is not None and step % max(steps // 40, 1) == 0:
            used.append({"step": step, "radius": radius.radius, **usage(model)})
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        decay.step()
        if radius is not None:
            radius.step()
    model.eval()
    with torch.no_grad():
        wrong = model(images[trained:]).argmax(1) != labels[trained:]
    run = {"norm": norm, "batch_size": batch_size, "seed": seed, "epochs": epochs, "error": 100 * float(wrong.float().mean())}
    if radius is not None:
        run["usage"] = [*used, {"step": steps, "radius": radius.radius, **usage(model)}]
        run["decided"] = len(freeze_decided(model))
    return run


def drawn(trained: int, batch_size: int, epochs: int, seed: int) -> Any:
    """Indices of every batch; the order differs from epoch to epoch and seed to seed, not from norm to norm."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(trained, generator=generator).split(batch_size):
            if len(chosen) == batch_size:
                yield chosen
