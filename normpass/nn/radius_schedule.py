"""The radius of SparsestMax over training, and the optimizer's parameter groups.

    schedule = RadiusSchedule(model, steps=len(loader) * epochs)
    for batch in loader:
        ...
        optimizer.step()
        schedule.step()

The radius rises linearly, from 0 to 1 by default (arXiv 1903.03793). It is a buffer of every layer, so a model's
`state_dict` has it; the schedule's own `state_dict` has the step it is at.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn

from normpass.errors import InvalidInputError
from normpass.nn.switchable import freeze_decided, switchable_layers


class RadiusSchedule:
    """Raises the radius of every switchable layer of a model, and freezes the layers that have chosen.

    Args:
        model: with layers of `SparseSwitchableNorm`, optimized or not.
        steps: iterations until `end` is reached; it stays there afterwards.
        start, end: the radius before the first and after the last step, in [0, 1]. From √6/3 = 0.8165 every layer
            is decided, unless two of its logits are equal to the last bit.
        freeze: whether `step` freezes decided layers, for which it reads one small tensor back from the device.

    Raises:
        InvalidInputError: `steps` is below 1, a radius is outside [0, 1], or no layer is switchable.
    """

    def __init__(
        self, model: nn.Module, steps: int, *, start: float = 0.0, end: float = 1.0, freeze: bool = True
    ) -> None:
        numbers: dict[str, Any] = {"steps": steps, "start": start, "end": end}
        for name, value in numbers.items():
            if not isinstance(value, Real):
                raise InvalidInputError(f"`{name}` must be a number, it is {value!r}")
        if not steps >= 1:
            raise InvalidInputError(f"`steps` must be at least 1, it is {steps}")
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise InvalidInputError(f"`{name}` must be in [0, 1], it is {value}")
        if not switchable_layers(model):
            raise InvalidInputError(
                f"no layer of this {type(model).__name__} is a switchable norm, so there is no radius to raise: "
                'optimize it with changes=("sparse_switchable",) first'
            )
        self.model = model
        self.steps, self.start, self.end, self.freeze = int(steps), float(start), float(end), bool(freeze)
        self.done = 0
        self._apply()

    @property
    def radius(self) -> float:
        return self.start + (self.end - self.start) * min(self.done / self.steps, 1.0)

    def step(self) -> None:
        """One iteration further."""
        self.done += 1
        self._apply()

    def _apply(self) -> None:
        radius = self.radius
        with torch.no_grad():
            for layer in switchable_layers(self.model).values():
                layer.radius.fill_(radius)
        if self.freeze:
            freeze_decided(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "steps": self.steps, "start": self.start, "end": self.end, "freeze": self.freeze}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule was, with its options; the model's own `state_dict` is loaded before."""
        self.done, self.steps = int(state["done"]), int(state["steps"])
        self.start, self.end, self.freeze = float(state["start"]), float(state["end"]), bool(state["freeze"])
        self._apply()


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, logits_factor: float = 0.1
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: everything else at `lr`, and the logits at a tenth of it without weight decay."""
    logits = [p for layer in switchable_layers(model).values() for p in (layer.mean_logits, layer.var_logits)]
    known = {id(p) for p in logits}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": logits, "lr": lr * logits_factor, "weight_decay": 0.0},
    ]
