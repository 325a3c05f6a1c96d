"""Functions of one tensor that backward runs again, to be differentiated: nothing but the tensor is kept.

For what keeps something beside its argument and result: the indices of a max pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normpass.ops.eager import no_gradients
from normpass.recipe.autocast import autocast_state, same_autocast
from normpass.recipe.notes import is_recording, tag


def call_replayed(function: Callable, x: Tensor, *args: Any, is_rebuilt: bool = False, **kwargs: Any) -> Tensor:
    """Call a `function` of one tensor so that backward runs it again: it keeps x and nothing else.

    With `is_rebuilt` it is noted how the result is made again.
    """
    call = functools.partial(_with_arguments, function, args, kwargs)
    if not is_recording() or not x.requires_grad or not torch.is_grad_enabled():
        return call(x)
    result: Tensor = _Replay.apply(call, x)
    if is_rebuilt:
        tag(result, call, (x,))
    return result


def _with_arguments(function: Callable, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    result: Tensor = function(x, *args, **kwargs)
    return result


class _Replay(torch.autograd.Function):
    """A function of one tensor that is run once more to be differentiated."""

    @staticmethod
    def forward(ctx: Any, function: Callable, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.autocast = function, autocast_state((x,))
        ctx.save_for_backward(x)
        result: Tensor = function(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return no_gradients(ctx)
        twice = torch.is_grad_enabled()  # then x stays where it is in the graph
        (x,) = ctx.saved_tensors
        x = x if twice else x.detach().requires_grad_()
        with torch.enable_grad(), same_autocast(ctx.autocast):
            result = ctx.function(x)
        return None, *torch.autograd.grad(result, x, grad, create_graph=twice)
