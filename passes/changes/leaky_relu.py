"""ReLU  ⇒  leaky ReLU with slope 0.01  (changes the model)

    max(y, 0)  ⇒  max(y, 0.01·y)

What the in-place ABN paper (arXiv 1712.02616) does to make the activation invertible. Only by name:
`changes=("leaky_relu",)`. Layers (`nn.ReLU`) are replaced in the optimized model, so that whoever looks at it sees
them; functional spellings are replaced in every captured graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from normpass.errors import InvalidInputError
from normpass.graph.nodes import hooks_of, is_in_place_call, name_of, replace_layers

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_RELU_METHODS = ("relu", "relu_")


@dataclass(frozen=True)
class LeakyReLU:
    """Option object of `changes=`."""

    negative_slope: float = 0.01
    """slope for negative input, > 0"""

    replaces: ClassVar[str] = "ReLUs"
    applies_to_graph: ClassVar[bool] = True
    changes_eval: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.negative_slope, Real) or not 0 < self.negative_slope < math.inf:
            raise InvalidInputError(f"`negative_slope` must be a number above 0, it is {self.negative_slope!r}")

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Replace every `nn.ReLU` of `model`; returns path -> the layer that stood there."""

        def new(layer: nn.Module) -> nn.Module | None:
            if type(layer) is not nn.ReLU or any(hooks_of(layer)):
                return None  # with hooks it stays, and is replaced in the graph
            return nn.LeakyReLU(self.negative_slope, layer.inplace).train(layer.training)

        return replace_layers(model, new)

    def change_graph(self, graph: fx.Graph) -> None:
        """Replace every functional ReLU of `graph`."""
        for node in graph.nodes:
            if not _is_functional_relu(node):
                continue
            in_place = name_of(node.target).endswith("_") or is_in_place_call(node)
            node.args = (node.all_input_nodes[0], self.negative_slope, in_place)
            node.op, node.target, node.kwargs = "call_function", F.leaky_relu, {}

    def calls(self) -> TorchFunctionMode:
        """A mode in which every functional ReLU is leaky, for who runs forward without a captured graph."""
        return _LeakyCalls(self.negative_slope)


class _LeakyCalls(TorchFunctionMode):
    def __init__(self, negative_slope: float):
        super().__init__()
        self._slope = negative_slope

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in (*_RELU_FUNCTIONS, Tensor.relu, Tensor.relu_):
            return func(*args, **kwargs)
        in_place = func.__name__.endswith("_") or kwargs.get("inplace", args[1] if len(args) > 1 else False)
        return F.leaky_relu(args[0] if args else kwargs["input"], self._slope, in_place)


def _is_functional_relu(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in _RELU_METHODS
