"""batch norm  ⇒  group norm  (changes the model)

    statistics of a channel over the batch  ⇒  statistics of a group of channels over one sample

What mini-batch serialization (arXiv 1810.00307) does, since batch norm needs the whole batch before it normalizes a
single sample, and group norm (arXiv 1803.08494) needs the one sample only. By name: `changes=("group_norm",)`. Every
BatchNorm1d, 2d and 3d becomes an `nn.GroupNorm` with its very weight and bias and its eps; running statistics have
no meaning any more and are not in `state_dict`. `normpass.restore` gives the BatchNorms back, with the weight and
bias of now and the running statistics of then.

Refuses (leaves as it is): norms of another class, with hooks or a parametrisation, and functional ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from normpass.errors import InvalidInputError
from normpass.graph.nodes import replace_layers
from normpass.nn.norm import is_replaceable, options_of


@dataclass(frozen=True)
class GroupNorm:
    """Option object of `changes=`."""

    num_groups: int = 32
    """groups of channels; where they do not divide a norm's channels, the largest divisor below. A group has two
    channels at least (of a norm over one channel: one), or on a 1×1 map it would be one value, its own mean"""

    replaces: ClassVar[str] = "batch norms"
    applies_to_graph: ClassVar[bool] = False
    changes_eval: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.num_groups, bool) or not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise InvalidInputError(f"`num_groups` must be an integer of at least 1, it is {self.num_groups!r}")

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Replace every BatchNorm of `model`; returns path -> the layer that stood there."""

        def new(layer: nn.Module) -> nn.Module | None:
            if not is_replaceable(layer):
                return None
            return group_norm_from(layer, self.num_groups)

        return replace_layers(model, new)

    def change_graph(self, graph: fx.Graph) -> None:
        """Nothing: the layers are called as the norms were."""


def group_norm_from(norm: nn.Module, num_groups: int) -> nn.GroupNorm:
    """The group norm with the very weight and bias of a BatchNorm, its eps and its mode."""
    options = options_of(norm)
    channels = options["num_features"]
    allowed = range(1, min(num_groups, max(1, channels // 2)) + 1)
    groups = max(g for g in allowed if channels % g == 0)
    keep = {name: options[name] for name in ("eps", "affine", "device", "dtype")}
    layer = nn.GroupNorm(groups, channels, **keep)
    for name in ("weight", "bias"):
        layer._parameters[name] = norm._parameters[name]
    return layer.train(norm.training)
