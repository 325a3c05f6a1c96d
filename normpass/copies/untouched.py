"""Run something with a model and leave the model bit for bit as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from normpass.errors import InvalidModelError


@contextlib.contextmanager
def untouched(model: nn.Module, *values: object) -> Iterator[None]:
    """Whatever runs inside, afterwards the model is as before, bit for bit.

    That is: buffers, training flags, random number generators (CPU and CUDA), and `.grad` of the
    parameters and of the leaf tensors among `values`. Inside, every `.grad` starts as None. Parameters are
    not copied: what writes to them (an optimizer) has to undo that itself.
    """
    check_initialized(model)
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    # Those of a scripted module are TorchScript's: nobody can register others there.
    registered = [(m, dict(m._buffers)) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    buffers = _copies(model.buffers())
    grads = [(leaf, leaf.grad) for leaf in leaves_of(model, values)]
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    for leaf, _ in grads:
        leaf.grad = None
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for module, names in registered:
            module._buffers.update(names)
        _put_back(buffers)
        for leaf, grad in grads:
            leaf.grad = grad
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def undone(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Parameters and state of the optimizer are afterwards as before."""
    if optimizer is None:
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    copies = _copies([*parameters, *tensors_in(list(state.values()))])
    try:
        yield
    finally:
        _put_back(copies)
        optimizer.state.clear()
        optimizer.state.update(state)


def check_initialized(model: nn.Module) -> None:
    """InvalidModelError for a model with lazy layers that have not seen an input: nothing can be put back there."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if lazy is not None:
        raise InvalidModelError(
            f"`{lazy}` of this {type(model).__name__} has no shape yet: a lazy layer gets it at its first call, so "
            "call the model once first"
        )


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors in a nest of dicts, tuples, lists, dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in(vars(leaf))
    return found


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def function_of(tensor: Tensor) -> Any:
    """`tensor.grad_fn`; None too for a part of `unbind` and the like whose base was written to, which has none left."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def leaves_of(model: nn.Module, values: object) -> list[Tensor]:
    """What backward accumulates a gradient into."""
    given = [tensor for tensor in tensors_in(values) if tensor.is_leaf and tensor.requires_grad]
    return list({id(leaf): leaf for leaf in [*model.parameters(), *given]}.values())


def _copies(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
    """Distinct storages and their copies: bytes, so strides, shared views and NaNs need no care."""
    storages = {storage_key(tensor): tensor.untyped_storage() for tensor in tensors}
    return [(storage, storage.clone()) for storage in storages.values()]


def _put_back(copies: Iterable[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
    for storage, copy in copies:
        storage.copy_(copy)
