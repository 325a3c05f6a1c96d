"""Which nodes of a graph compute every sample of a batch by itself, so that a part of the batch gives a part of it.

Only what is known to, by name: convolutions, linear layers, activations, pooling, padding, sums, products,
concatenation of channels, norms over one sample or with running statistics. What draws random numbers or writes to
a buffer does not, whatever its name (`normpass.analysis.facts` has seen it).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from normpass.analysis.facts import Step
from normpass.graph.nodes import bound
from normpass.graph.nodes import name_of as name_of_target
from normpass.graph.operators import KINDS

_MODULES = frozenset({"torch", "torch.nn.functional", "torch._C._nn", "_operator", "normpass.graph.nodes"})


_ELEMENTWISE = frozenset({"one bit", "activation", "sum", "product", "elementwise"})


def name_of(node: fx.Node) -> str:
    """The name of an operation of torch, the same in place or as `normal_form` writes that; "" for anything else."""
    is_known = node.op == "call_method" or getattr(node.target, "__module__", None) in _MODULES
    return name_of_target(node.target).removeprefix("as_first_").removesuffix("_") if is_known else ""


def kind_of(node: fx.Node) -> str:
    """What `normpass.graph.operators.KINDS` has for it; "" for nothing."""
    return KINDS.get(name_of(node), "")


def reason_not_per_sample(step: Step, results: Any, storages: Any, variable: Collection[fx.Node]) -> str | None:
    """Why the value of the step's node may not be made sample by sample; None where it may.

    Args:
        results, storages: of every node, from `normpass.analysis.facts`.
        variable: the nodes that depend on an input.
    """
    node = step.node
    value, sources = results.get(node), node.all_input_nodes
    operands: list[Any] = [results.get(s) for s in sources if s in variable]
    constants = [results.get(s) for s in sources if s not in variable]
    if not all(isinstance(v, Tensor) for v in (value, *operands)):
        return "it handles something other than one tensor"
    if not all(isinstance(c, (Tensor, int, float)) for c in constants):
        return "it reads something other than tensors and numbers"
    if not operands or value.dim() == 0 or any(v.dim() == 0 or v.shape[0] != value.shape[0] for v in operands):
        return "its result does not have the batch first, as its input has"
    if step.is_random:
        return "it draws random numbers"
    if name_of(node) == "batch_norm" and (bound(F.batch_norm, node) or {}).get("training") is not False:
        return "it normalizes with the statistics of the whole batch"
    own = {storage for s in sources if s in variable for storage in storages[s]}
    if not own.issuperset(step.writes):
        return "what it writes to, running statistics say, moves with the whole batch"
    if _is_known(node, value, operands, constants, variable):
        return None
    return f"{name_of_target(node.target)} is not known to compute every sample by itself as it is called here"


def _is_known(node: fx.Node, value: Tensor, operands: list, constants: list, variable: Collection[fx.Node]) -> bool:
    name, kind, dims = name_of(node), kind_of(node), operands[0].dim()
    if not kind:
        return False
    if kind in _ELEMENTWISE:
        return all(v.dim() == value.dim() for v in operands) and all(_has_no_batch(c, value.dim()) for c in constants)
    if kind == "cat":
        dim = _argument(node, 1, "dim", 0)
        return not constants and isinstance(dim, int) and dim % dims != 0
    if _argument(node, 0, "input", None) not in variable or _reads(node, variable) != 1:
        return False  # the weight, too, may be a value of the network
    if name.startswith("conv") or "_pool" in name:
        return bool(dims == int(name[-2]) + 2)
    if name in ("softmax", "log_softmax", "glu"):
        dim = _argument(node, 1, "dim", None)
        return isinstance(dim, int) and dim % dims != 0
    if name in ("flatten", "mean", "permute"):
        return _leaves_the_batch(node, name, dims)
    if name in ("layer_norm", "pad"):
        per_dim = 1 if name == "layer_norm" else 2
        sizes = _argument(node, 1, "normalized_shape" if name == "layer_norm" else "pad", ())
        return isinstance(sizes, (tuple, list)) and len(sizes) < per_dim * dims
    return bool(dims >= _LEAST_DIMS.get(name, 3))


_LEAST_DIMS = {"linear": 2, "group_norm": 2, "batch_norm": 2, "prelu": 2, "pixel_shuffle": 4, "pixel_unshuffle": 4}
"""With fewer the first is no batch; 3 where none is given."""


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _reads(node: fx.Node, variable: Collection[fx.Node]) -> int:
    """How many arguments depend on an input."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda source: found.append(source) or source)  # type: ignore[func-returns-value]
    return sum(source in variable for source in found)


def _leaves_the_batch(node: fx.Node, name: str, dims: int) -> bool:
    rest: list[Any] = list(node.args[1:])
    if name == "flatten":
        start = _argument(node, 1, "start_dim", 0)
        return isinstance(start, int) and start % dims != 0
    named = node.kwargs.get("dim", node.kwargs.get("dims", 0))
    given: Any = rest[0] if len(rest) == 1 or (rest and name == "mean") else (rest or named)
    axes = [given] if isinstance(given, int) else list(given or (0,))
    if not all(isinstance(axis, int) for axis in axes):
        return False
    return axes[0] % dims == 0 if name == "permute" else all(axis % dims != 0 for axis in axes)


def _has_no_batch(constant: Any, dims: int) -> bool:
    """Whether a constant operand is the same for every sample."""
    return not isinstance(constant, Tensor) or constant.dim() < dims or constant.shape[0] == 1
