"""The plain layers that Kalman and decided switchable norms have become: for folding, export and other tools."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from normpass.errors import InvalidModelError
from normpass.graph.nodes import replace_layers
from normpass.nn.kalman import KALMAN_NORMS
from normpass.nn.norm import BatchNormLike, as_batch_norm, options_of
from normpass.nn.switchable import SWITCHABLE_NORMS, decide, switchable_layers

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def as_plain_norms(model: nn.Module) -> nn.Module:
    """A copy of `model`, with its very parameters and buffers, in which norms are layers of torch where they can be.

    A Kalman norm becomes an `nn.BatchNorm` (the same function in eval mode); a switchable norm that has chosen one
    norm twice becomes an `nn.BatchNorm`, `nn.InstanceNorm` or `nn.GroupNorm(1, …)`. One that has chosen two norms,
    or none yet, stays. `model` is not touched. Of an optimized model give `normpass.restore(model, keep_changes=True)`.
    """
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"`model` must be a torch.nn.Module, it is a {type(model).__name__}")
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if isinstance(t, Tensor)}
    plain = copy.deepcopy(model, shared)
    decide(list(switchable_layers(plain).values()))
    replace_layers(plain, lambda layer: _plain(layer) if isinstance(layer, BatchNormLike) else None)
    return _plain(plain) if isinstance(plain, BatchNormLike) else plain


def _plain(norm: Any) -> nn.Module:
    if isinstance(norm, KALMAN_NORMS):
        return as_batch_norm(norm)
    if not isinstance(norm, SWITCHABLE_NORMS) or norm.chosen is None or len(set(norm.chosen)) > 1:
        return norm
    if norm.chosen[0] == "batch":
        return as_batch_norm(norm)
    options = options_of(norm)
    kept = {name: options[name] for name in ("eps", "affine", "device", "dtype")}
    if norm.chosen[0] == "layer":
        layer: nn.Module = nn.GroupNorm(1, norm.num_features, **kept)
    elif 2 in norm.dims:
        return norm  # an nn.InstanceNorm1d takes (N, C) for one sample without a batch
    else:
        layer = _INSTANCE_NORMS[norm.dims[0] - 3](norm.num_features, **kept)
    for name in ("weight", "bias"):
        layer._parameters[name] = norm._parameters[name]
    return layer.train(norm.training)
