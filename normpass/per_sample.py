"""Which nodes of a graph compute every sample of a batch by itself, so that a part of the batch gives a part of it.

Only what is known to: convolutions, linear layers, activations, pooling, padding, sums, products, concatenation of
channels, norms over one sample or with running statistics. `reason_not_per_sample` is asked when the graph is
rewritten, `reason_not_now` before every call, since a norm may be put into train mode and a layer may get a hook.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.functional import product_as_first, sum_as_first
from normpass.graph import bound, module_of
from normpass.nn.norm import BATCH_NORMS
from normpass.sites import activation_of, activation_of_module

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITH_TENSORS = (
    *CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.GroupNorm, nn.LayerNorm, *INSTANCE_NORMS, *BATCH_NORMS, nn.PReLU,
)  # fmt: skip
"""Layers with parameters or buffers; `normpass.serialised` can run each on given tensors."""

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MODULES_OF_TORCH = tuple(f"torch.nn.modules.{name}" for name in ("pooling", "padding", "upsampling", "pixelshuffle"))
_ELEMENTWISE = frozenset(
    {operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv}
    | {operator.neg, torch.add, torch.sub, torch.mul, torch.div, torch.neg, sum_as_first, product_as_first}
    | {torch.clamp, torch.exp, torch.square, torch.sqrt, torch.abs}
)
_WITH_WEIGHT = frozenset(
    {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.group_norm, F.layer_norm}
)
_POOLS = frozenset(
    getattr(F, f"{prefix}{name}_pool{d}d") for prefix in ("", "adaptive_") for name in ("max", "avg") for d in (1, 2, 3)
) | {F.interpolate}
_METHODS = frozenset("add add_ sub mul mul_ div neg contiguous clamp exp square sqrt abs".split())
_CONCATENATIONS = (torch.cat, torch.concat)


def reason_not_per_sample(node: fx.Node, root: nn.Module, shapes: Mapping[fx.Node, Any], variable: set) -> str | None:
    """Why the value of `node` may not be made sample by sample; None where it may.

    Args:
        shapes: what every node returns, as tensors.
        variable: the nodes that depend on an input.
    """
    value = shapes.get(node)
    operands: list[Any] = [shapes.get(s) for s in node.all_input_nodes if s in variable]
    if not isinstance(value, Tensor) or not all(isinstance(v, Tensor) for v in operands):
        return "it handles something other than one tensor"
    if not operands or value.dim() == 0 or any(v.dim() == 0 or v.shape[0] != value.shape[0] for v in operands):
        return "its result does not have the batch first, as its input has"
    module = module_of(node, root)
    if module is not None:
        return _reason_of_layer(module, value, operands[0]) or reason_not_now(module)
    if activation_of(node, root) is not None or _is_known(node, value, operands, shapes, variable):
        return None
    return f"it is not known to compute every sample by itself: {getattr(node.target, '__name__', node.target)}"


def reason_not_now(layer: nn.Module) -> str | None:
    """Why a layer may not run on a part of the batch as it is now; None where it may."""
    whole = reason_to_keep_whole(layer)
    if whole is not None:
        return whole
    if isinstance(layer, BATCH_NORMS) and (layer.training or layer.running_mean is None):
        return "it normalises with the statistics of the whole batch"
    if isinstance(layer, INSTANCE_NORMS) and layer.training and layer.track_running_stats:
        return "its running statistics move with the whole batch"
    if isinstance(layer, (*_DROPOUTS, nn.RReLU)) and layer.training and getattr(layer, "p", 1) > 0:
        return "it draws random numbers"
    return None


def _reason_of_layer(module: nn.Module, value: Tensor, x: Tensor) -> str | None:
    kind = type(module)
    if isinstance(module, _DROPOUTS):  # also in eval mode: in train mode the whole region would gain nothing
        return "it draws random numbers" if module.p > 0 else None
    if isinstance(module, CONVOLUTIONS + TRANSPOSED) and x.dim() != module.weight.dim():
        return "its input has no batch"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) >= x.dim():
        return "it normalises over the batch"
    if isinstance(module, INSTANCE_NORMS) and x.dim() < 3:
        return "its input has no batch"
    if isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.GLU)):
        return None if module.dim is not None and module.dim % x.dim() != 0 else "it works along the batch"
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return "it draws random numbers"
    if isinstance(module, nn.Flatten):
        return None if module.start_dim % x.dim() != 0 else "it flattens the batch"
    known = kind in WITH_TENSORS or activation_of_module(module) is not None or kind is nn.ChannelShuffle
    if known or (kind.__module__ in _MODULES_OF_TORCH and not getattr(module, "return_indices", False)):
        return None
    return f"{kind.__name__} is not known to compute every sample by itself"


def _is_known(node: fx.Node, value: Tensor, operands: list, shapes: Mapping[fx.Node, Any], variable: set) -> bool:
    target, dims = node.target, operands[0].dim()
    constants = [shapes.get(s) for s in node.all_input_nodes if s not in variable]
    if target in _ELEMENTWISE or (node.op == "call_method" and target in _METHODS):
        aligned = all(v.dim() == value.dim() for v in operands)
        return aligned and all(_has_no_batch(c, value.dim()) for c in constants)
    if node.op == "call_method" and target in ("flatten", "mean", "permute"):
        return _is_known_method(node, dims)
    if node.op != "call_function":
        return False
    if target in _WITH_WEIGHT:
        return _reads_once(node, variable) and dims >= 2 and _normalises_below(node, dims)
    if target in _CONCATENATIONS:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return isinstance(dim, int) and dim % dims != 0
    if target in _POOLS:
        return not node.kwargs.get("return_indices", False) and dims > 2
    if target is F.dropout:
        arguments = bound(F.dropout, node)
        return arguments is not None and (arguments["training"] is False or arguments["p"] == 0)
    if target is F.pad:
        pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        return isinstance(pad, (tuple, list)) and len(pad) < 2 * dims
    return target in (torch.flatten, torch.mean, torch.permute) and _is_known_method(node, dims)


def _is_known_method(node: fx.Node, dims: int) -> bool:
    """`flatten`, `mean` and `permute`, as functions or methods, where they leave the batch alone."""
    name = getattr(node.target, "__name__", node.target)
    rest: list[Any] = list(node.args[1:])
    if name == "flatten":
        start = rest[0] if rest else node.kwargs.get("start_dim", 0)
        return isinstance(start, int) and start % dims != 0
    given: Any = rest[0] if len(rest) == 1 or (rest and name == "mean") else (rest or node.kwargs.get("dim", 0))
    axes = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(axis, int) for axis in axes):
        return False
    return axes[0] % dims == 0 if name == "permute" else all(axis % dims != 0 for axis in axes)


def _reads_once(node: fx.Node, variable: set) -> bool:
    """Whether one argument depends on an input: the weight, too, may be a value of the network."""
    read: list[fx.Node] = []

    def note(source: fx.Node) -> fx.Node:
        read.append(source)
        return source

    fx.map_arg((node.args, node.kwargs), note)
    return sum(source in variable for source in read) == 1


def _has_no_batch(constant: Any, dims: int) -> bool:
    """Whether a constant operand is the same for every sample."""
    return isinstance(constant, Tensor) and (constant.dim() < dims or constant.shape[0] == 1)


def _normalises_below(node: fx.Node, dims: int) -> bool:
    if node.target is not F.layer_norm:
        return True
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape", ())
    return isinstance(shape, (tuple, list)) and len(shape) < dims
