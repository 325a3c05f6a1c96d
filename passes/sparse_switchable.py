"""batch norm  ⇒  sparse switchable norm  (changes the model)

    weight·(x − mean)/√(var + eps) + bias  ⇒  the same with Σ p_k·mean_k and Σ q_k·var_k, k in instance, layer, batch

SSN (arXiv 1903.03793), only by name: `changes=("sparse_switchable",)`. Every BatchNorm becomes a
`normpass.nn.SparseSwitchableNorm` with its very parameters and buffers; a `normpass.nn.RadiusSchedule` makes the
layers choose while the model trains. The new parameters (two times three logits a layer) are in `state_dict`
behind the norm's own.

Refuses (leaves as it is): norms of another class, with hooks or a parametrisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from normpass.capture import reason_to_keep_whole
from normpass.graph import replace_layers
from normpass.nn.norm import dimension_of
from normpass.nn.switchable import switchable_from


@dataclass(frozen=True)
class SparseSwitchable:
    """Option object of `changes=`."""

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Replace every BatchNorm of `model`; returns path -> the layer that stood there."""

        def new(layer: nn.Module) -> nn.Module | None:
            if dimension_of(layer) is None or reason_to_keep_whole(layer) is not None:
                return None
            return switchable_from(layer)

        return replace_layers(model, new)

    def change_graph(self, graph: fx.Graph, root: nn.Module) -> None:
        """Nothing: the layers are called as the norms were."""
