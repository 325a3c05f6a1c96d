"""Sparse switchable normalization: every layer learns which of instance, layer and batch norm it is.

    y = weight·(x − Σ p_k·mean_k)/√(Σ q_k·var_k + eps) + bias        k in instance, layer, batch

p and q are SparsestMax of three logits each (initially 1), of radius `radius`, which a `RadiusSchedule` raises
until every layer has chosen one norm for its mean and one for its variance (SSN, Shao et al. 2019, arXiv
1903.03793). The moments are taken once, over the positions of each channel of each sample, and merged to those
of the layer and the batch. All variances are biased, so that a layer that has chosen is exactly that norm (the
authors take the instance variance unbiased, which is NaN for maps of 1×1).

In eval mode the batch's statistics are the running ones. A layer that has `chosen` computes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normpass.nn.norm import (
    BatchNormLike,
    Buffers,
    adopt,
    batch_norm,
    buffers_of,
    check_count,
    dimension_of,
    normalize,
    notes_recipes,
    options_of,
    running_statistics,
    update_running,
    uses_batch,
)
from normpass.ops import instance_moments, merged_moments, sparsest_max
from normpass.ops.layout import statistics_dtype

NORMS = ("instance", "layer", "batch")
"""The norms in the order of the logits."""


class _SparseSwitchableNorm(BatchNormLike):
    mean_logits: nn.Parameter
    var_logits: nn.Parameter
    radius: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.mean_logits = nn.Parameter(torch.ones(len(NORMS), device=device, dtype=wide))
        self.var_logits = nn.Parameter(torch.ones(len(NORMS), device=device, dtype=wide))
        self.register_buffer("radius", torch.zeros((), device=device, dtype=wide))
        self.chosen: tuple[str, str] | None = None
        """the norms of mean and variance, once both are decided; set by `freeze_decided`, on loading, by hand"""

    @property
    def logits(self) -> Tensor:
        """(2, 3): those of the mean, those of the variance; at least float32."""
        return _stacked(self.mean_logits, self.var_logits)

    def ratios(self) -> tuple[Tensor, Tensor]:
        """p and q, each (3,), in the order of `NORMS`."""
        logits = self.logits
        p, q = sparsest_max(logits, self.radius.to(logits.dtype)).unbind(0)
        return p, q

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *) -> the same shape, dtype and layout."""
        self._check_input_dim(x)
        if self.chosen == ("batch", "batch"):
            return batch_norm(self, x)
        if self.chosen == ("instance", "instance"):
            return instance_norm(x, self.weight, self.bias, self.eps)
        if self.chosen == ("layer", "layer"):
            return layer_norm(x, self.weight, self.bias, self.eps)
        tensors = self.weight, self.bias, *buffers_of(self)
        options: Any = (uses_batch(self), self.momentum, self.eps)
        if self.chosen is not None:
            return mixed_norm(x, *self.chosen, *tensors, *options)
        return switchable_norm(x, self.mean_logits, self.var_logits, self.radius, *tensors, *options)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}mean_logits" in state_dict:
            decide([self])
            freeze([self])

    def extra_repr(self) -> str:
        chosen = "" if self.chosen is None else f", chosen={self.chosen}"
        return super().extra_repr() + chosen


# What the layers call: the nodes of a captured graph.


def switchable_norm(
    x: Tensor,
    mean_logits: Tensor,
    var_logits: Tensor,
    radius: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    use_batch: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """The norm that has not chosen yet. With `use_batch` the running statistics move, else they are the batch's."""
    mean, var = instance_moments(x)
    buffers = Buffers(running_mean, running_var, num_batches_tracked)
    batch = _batch_moments(x, mean, var, buffers, use_batch, momentum)
    means, variances = zip((mean, var), merged_moments(mean, var, 1), batch, strict=True)
    logits = _stacked(mean_logits, var_logits)
    p, q = sparsest_max(logits, radius.to(logits.dtype)).to(statistics_dtype(x)).unbind(0)
    return normalize(x, _weighted(p, means), _weighted(q, variances), weight, bias, eps)


def mixed_norm(
    x: Tensor,
    mean_of: str,
    var_of: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    use_batch: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """The mean of one norm and the variance of one, from one pass over x; keeps x alone."""
    mean, var = instance_moments(x)
    found = {"instance": (mean, var)}
    if "layer" in (mean_of, var_of):
        found["layer"] = merged_moments(mean, var, 1)
    if "batch" in (mean_of, var_of):
        buffers = Buffers(running_mean, running_var, num_batches_tracked)
        found["batch"] = _batch_moments(x, mean, var, buffers, use_batch, momentum)
    chosen_mean, chosen_var, _ = torch.broadcast_tensors(found[mean_of][0], found[var_of][1], mean)
    return normalize(x, chosen_mean, chosen_var, weight, bias, eps)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A layer that has chosen instance norm twice; in an optimized model it keeps x alone."""
    if notes_recipes():
        return mixed_norm(x, "instance", "instance", weight, bias, None, None, None, False, None, eps)
    wide = x.unsqueeze(-1) if x.dim() == 2 else x
    y = torch.instance_norm(wide, weight, bias, None, None, True, 0.0, eps, False)
    return y.reshape(x.shape)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A layer that has chosen layer norm twice; in an optimized model it keeps x alone."""
    if notes_recipes():
        return mixed_norm(x, "layer", "layer", weight, bias, None, None, None, False, None, eps)
    return torch.group_norm(x, 1, weight, bias, eps)


def _batch_moments(
    x: Tensor, mean: Tensor, var: Tensor, buffers: Buffers, use_batch: bool, momentum: float | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance (1, C) of the batch from those of its instances, or the running ones."""
    if not use_batch:
        return running_statistics(buffers, x)
    count = x.numel() // x.shape[1]
    check_count("SparseSwitchableNorm", x, count)
    batch_mean, batch_var = merged_moments(mean, var, 0)
    update_running(buffers, momentum, batch_mean[0], batch_var[0], count)
    return batch_mean, batch_var


def _stacked(mean_logits: Tensor, var_logits: Tensor) -> Tensor:
    """(2, 3), at least float32."""
    logits = torch.stack((mean_logits, var_logits))
    return logits if logits.dtype == torch.float64 else logits.float()


def _weighted(ratios: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    instance, layer, batch = parts
    return ratios[0] * instance + ratios[1] * layer + ratios[2] * batch


class SparseSwitchableNorm1d(_SparseSwitchableNorm):
    """Sparse switchable norm of (N, C) or (N, C, L). Arguments are those of `nn.BatchNorm1d`."""

    dims = (2, 3)


class SparseSwitchableNorm2d(_SparseSwitchableNorm):
    """Sparse switchable norm of (N, C, H, W). Arguments are those of `nn.BatchNorm2d`."""

    dims = (4,)


class SparseSwitchableNorm3d(_SparseSwitchableNorm):
    """Sparse switchable norm of (N, C, D, H, W). Arguments are those of `nn.BatchNorm3d`."""

    dims = (5,)


SWITCHABLE_NORMS = (SparseSwitchableNorm1d, SparseSwitchableNorm2d, SparseSwitchableNorm3d)


def switchable_from(norm: nn.Module) -> _SparseSwitchableNorm:
    """The undecided layer that has a BatchNorm's very parameters and buffers, in its mode."""
    dimension = dimension_of(norm)
    if dimension is None:
        raise TypeError(f"`norm` must be an nn.BatchNorm1d, 2d or 3d, it is a {type(norm).__name__}")
    layer: _SparseSwitchableNorm = adopt(SWITCHABLE_NORMS[dimension - 1](**options_of(norm)), norm)
    return layer


def switchable_layers(model: nn.Module) -> dict[str, _SparseSwitchableNorm]:
    """Dotted path -> layer."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _SparseSwitchableNorm)}


def decide(layers: Sequence[_SparseSwitchableNorm]) -> None:
    """Set `chosen` of each layer from its logits and radius: the norms where both ratios are one-hot, else None.

    All decisions are read from the device at once. Parameters are not touched.
    """
    layers = [layer for layer in layers if not layer.mean_logits.is_meta]  # those have no values yet
    if not layers:
        return
    device = layers[0].mean_logits.device
    with torch.no_grad():
        logits = torch.stack([layer.logits.double().to(device) for layer in layers])
        radius = torch.stack([layer.radius.double().to(device) for layer in layers])[:, None]
        ratios = sparsest_max(logits, radius)
        decisions = torch.where(ratios.amax(-1) == 1, ratios.argmax(-1), -1).tolist()
    for layer, (mean_of, var_of) in zip(layers, decisions, strict=True):
        layer.chosen = None if -1 in (mean_of, var_of) else (NORMS[mean_of], NORMS[var_of])


def freeze(layers: Sequence[_SparseSwitchableNorm]) -> None:
    """Freeze the logits of the layers that have chosen, and let the others learn.

    A frozen parameter has no gradient: with one of zero an optimizer's momentum would move it on.
    """
    for layer in layers:
        for logits in (layer.mean_logits, layer.var_logits):
            logits.requires_grad_(layer.chosen is None)
            if layer.chosen is not None:
                logits.grad = None


def freeze_decided(model: nn.Module) -> list[str]:
    """Freeze every layer whose ratios are both one-hot by now; returns the paths of all that are decided.

    What is decided stays so: a larger radius leaves a one-hot result as it is. One read from the device for the
    whole model, none where all layers are decided.
    """
    layers = switchable_layers(model)
    undecided = [layer for layer in layers.values() if layer.chosen is None]
    decide(undecided)
    freeze([layer for layer in undecided if layer.chosen is not None])
    return [path for path, layer in layers.items() if layer.chosen is not None]


def usage(model: nn.Module) -> dict[str, dict[str, float]]:
    """For the mean and the variance: the share of each norm, averaged over the layers; for plots and logs."""
    layers = list(switchable_layers(model).values())
    if not layers:
        return {}
    with torch.no_grad():
        ratios = torch.stack([torch.stack(layer.ratios()).double() for layer in layers]).mean(0).tolist()
    return {name: dict(zip(NORMS, values, strict=True)) for name, values in zip(("mean", "var"), ratios, strict=True)}
