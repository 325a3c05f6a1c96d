"""batch norm  ⇒  sparse switchable norm  (changes the model)

    weight·(x − mean)/√(var + eps) + bias  ⇒  the same with Σ p_k·mean_k and Σ q_k·var_k, k in instance, layer, batch

SSN (arXiv 1903.03793), only by name: `changes=("sparse_switchable",)`. Every BatchNorm becomes a
`normpass.nn.SparseSwitchableNorm` with its very parameters and buffers; a `normpass.nn.RadiusSchedule` makes the
layers choose while the model trains. The new parameters (two times three logits a layer) are in `state_dict`
behind the norm's own. A layer that has chosen is called as the norm that it chose: twice batch norm is an ordinary
batch norm for every rewrite. Behind every other layer x is all that is kept.

Refuses (leaves as it is): norms of another class, with hooks or a parametrisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from normpass.graph.nodes import replace_layers
from normpass.nn.norm import is_replaceable
from normpass.nn.switchable import switchable_from


@dataclass(frozen=True)
class SparseSwitchable:
    """Option object of `changes=`."""

    replaces: ClassVar[str] = "batch norms"
    applies_to_graph: ClassVar[bool] = False
    changes_eval: ClassVar[bool] = False

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Replace every BatchNorm of `model`; returns path -> the layer that stood there."""

        def new(layer: nn.Module) -> nn.Module | None:
            if not is_replaceable(layer):
                return None
            return switchable_from(layer)

        return replace_layers(model, new)

    def change_graph(self, graph: fx.Graph) -> None:
        """Nothing: the layers are called as the norms were."""
