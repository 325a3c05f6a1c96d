"""Functions of one tensor that backward runs again, to be differentiated: nothing but the tensor is kept.

For what keeps something beside its argument and result: the indices of a max pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normpass.autocast import autocast_state, same_autocast
from normpass.graph import called_on, hooks_of
from normpass.recipe import is_recording, rebuilt_when_compiled, tag


def replayed(function: Callable, x: Tensor, *args: Any, is_rebuilt: bool = False, **kwargs: Any) -> Tensor:
    """Call a `function` of one tensor so that backward runs it again: it keeps x and nothing else.

    With `is_rebuilt` the result is tagged like that of `derived`. Under torch.compile it always is: what finds the
    indices again makes the result as well.
    """
    call = functools.partial(_with_arguments, function, args, kwargs)
    hooked = isinstance(function, nn.Module) and any(hooks_of(function))
    if torch.compiler.is_compiling():
        result: Tensor = rebuilt_when_compiled(function, x, *args, **kwargs)
        return result
    if not is_recording() or not x.requires_grad or hooked:
        return call(x)
    result = _Replay.apply(call, x)
    if is_rebuilt:
        tag(result, call, (x,))
    return result


def _with_arguments(function: Callable, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    result: Tensor = function(x, *args, **kwargs)
    return result


def replayed_function(function: Any) -> Callable:
    """`replayed` with its first argument fixed."""
    return called_on(replayed, function)


class _Replay(torch.autograd.Function):
    """A function of one tensor that is run once more to be differentiated."""

    @staticmethod
    def forward(ctx: Any, function: Callable, x: Tensor) -> Tensor:
        ctx.function, ctx.autocast = function, autocast_state((x,))
        ctx.save_for_backward(x)
        result: Tensor = function(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        twice = torch.is_grad_enabled()  # then x stays where it is in the graph
        (x,) = ctx.saved_tensors
        x = x if twice else x.detach().requires_grad_()
        with torch.enable_grad(), same_autocast(ctx.autocast):
            result = ctx.function(x)
        return None, *torch.autograd.grad(result, x, grads, create_graph=twice)
