"""The functions that the layers of this package call: each call is one node of a captured graph.

What a layer computes is not looked into, since the gradient of its statistics goes ways that no rewrite of a batch
norm knows. Its result is `shift_scale` of x and small statistics, and the function itself notes that as the recipe:
x is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch

from normpass.capture import sync_norm
from normpass.capture.cumulative_norm import cumulative_batch_norm
from normpass.nn.kalman import kalman_norm
from normpass.nn.switchable import instance_norm, layer_norm, mixed_norm, switchable_norm

NORM_NODES: MappingProxyType[Callable, str] = MappingProxyType(
    {
        kalman_norm: (
            "its statistics come from the norm before it too, or are passed on to Kalman norms: they have a gradient"
        ),
        switchable_norm: "it has not chosen yet: it computes all three norms",
        mixed_norm: "it has chosen the mean of one norm and the variance of another",
        instance_norm: "it has chosen instance norm",
        layer_norm: "it has chosen layer norm",
    }
)
"""Function -> why no rewrite of a batch norm takes it. What it returns is rebuilt from its first argument; of
`kalman_norm` called `with_estimate` that is item 0 of two, beside the small `Estimate`. `kalman_norm` without a
prediction, an estimate and micro-batches is an ordinary batch norm, and notes nothing."""


def register_with_dynamo() -> None:
    """Let TorchDynamo take each of these functions as one node. Without it, it traces through them."""
    # Here, since an import of torch._dynamo takes as long as one of torch.
    for function in (*NORM_NODES, cumulative_batch_norm):
        torch.compiler.allow_in_graph(function)
    sync_norm.register()
