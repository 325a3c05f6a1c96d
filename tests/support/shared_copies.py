"""A copy that shares tensors, checked for what holds for every model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normpass.copies.shared_copy import shared_copy


class Net(nn.Module):
    """A convolution and a norm; tests put more on it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(0)).double()


def snapshot(model: nn.Module) -> list[Any]:
    """All that a copy might disturb, by identity."""
    return [
        (type(m), vars(type(m)).get("forward"), m.training, [(n, id(v), contents(v)) for n, v in vars(m).items()])
        for m in model.modules()
    ]


def contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [(id(key), id(item)) for key, item in dict.items(value)]
    return [id(item) for item in list.__iter__(value)] if isinstance(value, list) else None


def checked_copy(model: nn.Module) -> Any:
    """The copy, with what holds for every model."""
    before = snapshot(model)
    copied = shared_copy(model)
    assert snapshot(model) == before
    pairs = list(zip(model.named_modules(), copied.named_modules(), strict=True))
    for (name, old), (same_name, new) in pairs:
        assert name == same_name and new is not old and old.training == new.training
        assert type(new).__name__ == type(old).__name__ and isinstance(new, type(old).__mro__[1])
        assert list(vars(new)) == [key for key in vars(old) if key != "_compiled_call_impl"]
        for key in vars(nn.Module()):
            if isinstance(vars(old).get(key), (dict, set)):
                assert vars(new)[key] is not vars(old)[key] and type(vars(new)[key]) is type(vars(old)[key])
                assert len(vars(new)[key]) == len(vars(old)[key])
    expected, found = model.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    olds, news = [*model.parameters(), *model.buffers()], [*copied.parameters(), *copied.buffers()]
    assert all(a is b for a, b in zip(olds, news, strict=True))
    return copied


def numbers(model: nn.Module, *inputs: Any) -> list[Any]:
    """One step of a plain model: results, gradients; buffers as they were before it are put back."""
    buffers = [b.clone() for b in model.buffers()]
    model.zero_grad()
    torch.manual_seed(0)
    outputs = torch.utils._pytree.tree_leaves(model(*inputs))
    sum(t.square().sum() for t in outputs if t.requires_grad).backward()
    after = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return [*outputs, *(p.grad for p in model.parameters()), *after]


def assert_same_numbers(model: nn.Module, copied: nn.Module, *inputs: Any) -> None:
    torch.testing.assert_close(numbers(copied, *inputs), numbers(model, *inputs), rtol=0, atol=0)


def assert_independent(model: nn.Module, copied: nn.Module) -> None:
    """Flags, hooks, children and buffers of the copy are its own."""
    before = snapshot(model)
    copied.train(not model.training)
    for module in list(copied.modules()):
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
        module.register_buffer("another", torch.zeros(1), persistent=False)
        module.add_module("child", nn.ReLU())
    assert snapshot(model) == before
