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

from normpass.capture import join, reason_to_keep_whole
from normpass.nn.norm import dimension_of
from normpass.nn.switchable import switchable_from


@dataclass(frozen=True)
class SparseSwitchable:
    """Option object of `changes=`."""

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Replace every BatchNorm of `model`; returns path -> the layer that stood there."""
        replaced: dict[str, nn.Module] = {}
        new: dict[int, nn.Module] = {}  # a norm that stands in two places stays one
        for path, parent in list(model.named_modules()):
            for name, child in list(parent._modules.items()):
                if child is None or dimension_of(child) is None or reason_to_keep_whole(child) is not None:
                    continue
                if id(child) not in new:
                    new[id(child)] = switchable_from(child)
                parent._modules[name] = new[id(child)]
                replaced[join(path, name)] = child
        return replaced

    def change_graph(self, graph: fx.Graph, root: nn.Module) -> None:
        """Nothing: the layers are called as the norms were."""
