"""Switchable layers that have made their choice."""

from __future__ import annotations

import torch
from torch import nn

from normpass.nn.switchable import NORMS


def choose(layer: nn.Module, mean_of: str, var_of: str) -> None:
    """Let the logits of a switchable layer say so at the full radius; nothing is frozen yet."""
    with torch.no_grad():
        layer.radius.fill_(1.0)
        layer.mean_logits[NORMS.index(mean_of)] += 1
        layer.var_logits[NORMS.index(var_of)] += 1
