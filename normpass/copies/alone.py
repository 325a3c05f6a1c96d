"""`nn.SyncBatchNorm` in a trial: it takes the moments of its own process and asks no other, which may not be there.

A trial (`explain`, `plan`, checking inputs) tells shapes and bytes, not numbers, and may run on one process alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SyncBatchNormAlone(nn.SyncBatchNorm):
    """An `nn.SyncBatchNorm` that computes what `nn.BatchNorm` does."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.modules.batchnorm._BatchNorm.forward(self, input)


SyncBatchNormAlone.__name__ = SyncBatchNormAlone.__qualname__ = "SyncBatchNorm"  # as reports call it


def leave_alone(model: nn.Module) -> nn.Module:
    """Turn each `nn.SyncBatchNorm` of `model`, which is a copy, into one that asks no other process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = SyncBatchNormAlone
    return model
