"""What `optimize` must not change: a model's names, their order, its values and its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """The names a model gives its state, in order."""

    state_dict: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        parameters = tuple(f"{name}, requires_grad={p.requires_grad}" for name, p in model.named_parameters())
        return cls(tuple(model.state_dict()), parameters, tuple(name for name, _ in model.named_buffers()))

    def differences(self, other: Layout) -> list[str]:
        failures = []
        for what in ("state_dict", "parameters", "buffers"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours == theirs:
                continue
            odd = sorted(set(ours) ^ set(theirs))
            reason = f"not in both models: {odd}" if odd else "the same names in another order"
            failures.append(f"{what}: {reason}")
        return failures


@dataclass(frozen=True)
class Identity:
    """All of a model that `optimize` could have changed."""

    layout: Layout
    state: Mapping[str, bytes]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Identity:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        state = {name: _bytes(tensor) for name, tensor in tensors}
        modules = {
            name: f"{type(module).__qualname__}, training={module.training}" for name, module in model.named_modules()
        }
        return cls(Layout.of(model), state, modules)

    def changes(self, after: Identity, what: str) -> list[str]:
        failures = [f"{what} changed: {text}" for text in self.layout.differences(after.layout)]
        for name in self.state.keys() & after.state.keys():
            if self.state[name] != after.state[name]:
                failures.append(f"{what} changed: the value of `{name}`")
        for name in sorted(self.modules.keys() | after.modules.keys()):
            old, new = self.modules.get(name), after.modules.get(name)
            if old != new:
                failures.append(f"{what} changed: module `{name}` was {old}, is {new}")
        return failures


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().numpy().tobytes()
