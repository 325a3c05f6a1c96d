"""When an op may be run without the dispatcher: everything is plain eager PyTorch and nobody is looking on.

A call through the dispatcher and `torch.library.register_autograd` takes 100 to 200 µs from Python, more than a
small kernel. What the dispatcher serves (torch.compile, `torch.func`, modes, tracing, tensor subclasses, other
devices) is recognized here by what it leaves behind; where there is none of it, the autograd functions next to the
ops do the same from Python in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normpass.onlookers import is_plain_eager

_keys_of = torch._C._dispatch_keys

_PLAIN_KEYS = ("ADInplaceOrView", "AutogradCPU", "AutocastCPU", "AutogradCUDA", "AutocastCUDA")
_DEVICES = {"CPU": "cpu", "CUDA": "cuda"}
_device_of_keys: dict[int, str | None] = {}


def eager_device(x: Tensor, *others: Tensor | None) -> str | None:
    """The device type on which an op of these tensors may be run without the dispatcher; None if it may not."""
    return plain_device(x, *others) if is_plain_eager() else None


def plain_device(x: Tensor, *others: Tensor | None) -> str | None:
    """The device type of `x`, if all are ordinary dense tensors there; None if not."""
    if not (type(x) is Tensor or type(x) is Parameter):
        return None
    keys = _keys_of(x)
    device = _device(keys)
    for t in others:
        if t is not None and (not (type(t) is Tensor or type(t) is Parameter) or _device(_keys_of(t)) != device):
            return None
    return device


def _device(keys: Any) -> str | None:
    """The device type of dense tensors with these dispatch keys; None for any other, a fake or batched one, say."""
    raw = keys.raw_repr()
    if raw not in _device_of_keys:
        names = str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
        backends = [_DEVICES.get(name) for name in names if name not in _PLAIN_KEYS]
        _device_of_keys[raw] = backends[0] if len(backends) == 1 else None
    return _device_of_keys[raw]


def no_gradients(ctx: Any) -> tuple[None, ...]:
    """What a backward gives that no gradient reaches: none, as torch's own do, where zeros would move an optimizer.

    A function of the user's may return None; who says `ctx.set_materialize_grads(False)` gets that, and no zeros.
    """
    return (None,) * len(ctx.needs_input_grad)


def gradients_of(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    grad: Tensor,
    needs: Sequence[bool],
    allow_unused: bool = False,
) -> list[Tensor | None]:
    """What a backward gives by differentiating `function(*inputs)`, where gradients are on with a graph of their own.

    None for what is no tensor or is not needed.
    """
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        roots = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        is_source = [needed and isinstance(t, Tensor) for t, needed in zip(roots, needs, strict=True)]
        sources = [t for t, wanted in zip(roots, is_source, strict=True) if wanted]
        result = function(*roots)
        found = iter(torch.autograd.grad(result, sources, grad, create_graph=keeps_graph, allow_unused=allow_unused))
    return [next(found) if wanted else None for wanted in is_source]
