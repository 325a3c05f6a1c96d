"""One training step of a model as it is measured: what it may run on, what is there before it, forward, loss, backward.

Nothing here changes the model: see `normpass.copies.untouched`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normpass.copies.untouched import leaves_of, tensors_in, undone, untouched
from normpass.errors import InvalidInputError, InvalidModelError

Loss = Callable[..., Tensor]

FORWARD_END = "normpass: forward end"
"""what the profiler calls the moment at which the loss begins"""


def checked_device(model: nn.Module, *values: object) -> torch.device:
    """The device to measure on: CUDA where anything is on it, else the CPU."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"`model` must be a torch.nn.Module, it is a {type(model).__name__}")
    if not torch.is_grad_enabled():
        raise InvalidInputError("gradients are off, so nothing is kept for backward: measure outside `no_grad`")
    devices = sorted({tensor.device for tensor in [*model.parameters(), *tensors_in(values)]}, key=str)
    for device in devices:
        if device.type not in ("cpu", "cuda"):
            raise InvalidInputError(f"only `cpu` and `cuda` are measured: move model and inputs there from `{device}`")
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def existing(model: nn.Module, *values: object) -> list[Tensor]:
    """Every tensor that is there before the call: in the model, as an attribute too, and in its arguments."""
    attributes = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    return [leaf for leaf in attributes if isinstance(leaf, Tensor)] + tensors_in(values)


def forward_of(model: nn.Module, inputs: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """One call, with the weights that autocast caches dropped before and after, as leaving autocast does."""
    torch.clear_autocast_cache()
    output = model(*inputs, **kwargs)
    torch.clear_autocast_cache()
    return output


def mean_square(output: object) -> Tensor:
    """The loss where none is given: the mean square, summed over the floating tensors of the output.

    Raises:
        InvalidInputError: there is none.
    """
    parts = [t.float().square().mean() for t in tensors_in(output) if t.is_floating_point()]
    if not parts:
        raise InvalidInputError("the output holds no floating tensor to make a loss of: pass `loss`")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def warm_up(output: object) -> None:
    """Run a backward for compiled code's sake, where there is one."""
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if outputs:
        mean_square(outputs).backward()


def run_step(forward: Callable[[], object], loss: Loss | None, optimizer: torch.optim.Optimizer | None = None) -> None:
    output = forward()
    with torch.profiler.record_function(FORWARD_END):
        value = (loss or mean_square)(output)
    del output
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"`loss` must return one number in a tensor, not {_what(value)}")
    if not value.requires_grad:
        raise InvalidInputError("the loss depends on nothing that requires a gradient: is the model frozen?")
    value.backward()
    if optimizer is not None:
        optimizer.step()


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextlib.contextmanager
def warm_step(
    model: nn.Module,
    inputs: Sequence[object],
    kwargs: Mapping[str, object],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
) -> Iterator[Callable[[], None]]:
    """A step whose lasting results are there already: compiled code, gradients, the optimizer's state."""
    step = partial(run_step, partial(forward_of, model, inputs, kwargs), loss, optimizer)
    with untouched(model, inputs, kwargs), undone(optimizer):
        step()
        for leaf in leaves_of(model, (inputs, kwargs)):
            leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
        gc.collect()
        yield step
