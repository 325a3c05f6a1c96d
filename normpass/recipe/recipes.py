"""What is not kept for backward, and how it is made again.

A consumer of z = act(norm(x)) (a convolution, a product, a pooling) saves z for its own backward. z is a cheap
function of tensors that are kept anyway, so the saved z is replaced by a *recipe*: the function and its inputs, kept
tensors or other recipes. The first reader in backward makes z again, bit for bit (same function, same inputs), the
others get the same tensor, and after the last reader it is freed; where the readers are far from each other each may
make its own. `normpass.recipe.notes` puts them in place.

Rules that keep it right:
  * What recipes read is compared with the version it had: autograd's own check is off under hooks, so it is done here,
    with autograd's words. Vectors of a few thousand numbers that autograd would not keep are copied instead.
  * A recipe has tensors and functions of them, never a module: no hook runs again, no parameter is looked up again.
  * A recipe may let go of what it is made from when the last reader of a backward that keeps no graph has it. Autograd
    frees the reader's saved tensors only when its node is done, with the gradients and copies that the node makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from normpass.ops.moves import Watched, refuse_changed
from normpass.ops.vectors import Vectors
from normpass.recipe.autocast import autocast_state, same_autocast

_graph_task = torch._C._current_graph_task_id
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # type: ignore[attr-defined]


class Rebuilds:
    """Counts rebuilds while it is entered (for tests and reports): `counts[recipe]` and `total`."""

    _active: Rebuilds | None = None

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def most(self) -> int:
        """The largest number of rebuilds of one tensor."""
        return max(self.counts.values(), default=0)

    def __enter__(self) -> Rebuilds:
        Rebuilds._active = self
        return self

    def __exit__(self, *exc: object) -> None:
        Rebuilds._active = None


# --- what backward gets ---------------------------------------------------------------------------


class Kept:
    """A tensor that is kept, with the version it had; or, once its recipe is known, that."""

    __slots__ = ("source", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # Detached: an output that its own node saves would otherwise hold itself through its grad_fn.
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.source: Recipe | View | None = None

    def read(self) -> Tensor:
        tensor = self.tensor
        if tensor is None:
            assert self.source is not None
            return self.source.read()
        if tensor._version != self.version:
            refuse_changed(tensor, self.version)
        return tensor

    def add_reader(self) -> None:
        pass

    def exchange(self, source: Recipe | View) -> None:
        """Keep no tensor any more: `source` makes it."""
        source.add_reader()
        self.source, self.tensor = source, None


class Moving(Kept):
    """What a batch has moved running statistics by: kept, and handed out as long as nobody else writes to those."""

    __slots__ = ("geometry", "watched")

    def __init__(self, tensor: Tensor, watched: tuple[Watched, ...]):
        super().__init__(tensor)
        self.geometry, self.watched = geometry_of(tensor), watched

    def read(self) -> Tensor:
        for running in self.watched:
            running.check()
        return super().read()


class Copied:
    """A small tensor as it was in forward."""

    __slots__ = ("geometry", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = _clone(tensor.detach())
        self.geometry = geometry_of(tensor)

    def read(self) -> Tensor:
        return self.tensor

    def add_reader(self) -> None:
        pass


class Unread(Copied):
    """Running statistics that are handed to a backward which does not read them, as norms have moved them by then."""

    __slots__ = ("watched",)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.geometry = geometry_of(tensor)
        self.watched = Watched(self.tensor)

    def read(self) -> Tensor:
        self.watched.check()
        return self.tensor


class View:
    """What a recipe makes, seen with another shape."""

    __slots__ = ("geometry", "recipe")

    def __init__(self, recipe: Recipe, geometry: tuple):
        self.recipe, self.geometry = recipe, geometry

    def add_reader(self) -> None:
        self.recipe.add_reader()

    def read(self) -> Tensor:
        return self.recipe.read().as_strided(*self.geometry)


class Recipe:
    """How the content of one storage is made again: `function(*args, **kwargs)`, with sources for tensors."""

    __slots__ = (
        "__weakref__",
        "args",
        "autocast",
        "function",
        "geometry",
        "is_made_apart",
        "kwargs",
        "lets_go",
        "made",
        "readers",
        "select",
        "waiting",
        "written",
    )

    def __init__(
        self, source: Callable, tensor: Tensor, function: Callable, args: tuple, kwargs: dict, select: int | None
    ):
        # source: what stands for an argument, a tensor
        self.function = function
        self.args = tuple([a if type(a) in CONSTANTS else map_tensors(source, a) for a in args])
        self.kwargs = map_tensors(source, kwargs) if kwargs else kwargs
        self.select = select
        self.geometry = geometry_of(tensor)
        self.written: Recipe | None = None
        """of a function in place: what makes the storage that it writes to"""
        self.autocast = autocast_state(args)
        self.made: tuple[Tensor, int | None] | None = None
        """the value, and the CUDA stream that it was made on; together, for another thread may look at any time"""
        self.readers = 0  # saved tensors and recipes that will ask for the value in one backward
        self.waiting = 0  # how many of them have not asked yet
        self.is_made_apart = False
        """whether each reader makes its own"""
        self.lets_go = False
        """whether all readers ask once, so that after the last one nothing is needed any more"""

    def make_apart(self) -> None:
        """Each reader, of those that there are and that come, makes its own."""
        for _ in range(1, self.readers):
            self._ask_for_sources()
        self.is_made_apart = True

    def add_reader(self) -> None:
        """One more will ask for the value. Whoever makes it will itself ask for what it is made from."""
        self.readers += 1
        self.waiting += 1
        if self.readers == 1 or self.is_made_apart:
            self._ask_for_sources()

    def _ask_for_sources(self) -> None:
        for value in (*self.args, *self.kwargs.values()):
            if type(value) not in CONSTANTS:
                _add_readers(value)
        if self.written is not None:
            self.written.add_reader()

    def read(self) -> Tensor:
        """The tensor, made at most once per backward, or once for each CUDA stream: nothing waits for another one."""
        made = self.made  # once: another thread's backward may take it away
        found = None if made is None or (made[1] is not None and made[1] != _stream_of(made[0])) else made[0]
        value = self._build() if found is None else found
        self.waiting -= 1
        if self.waiting <= 0:
            self.made = None
            self.waiting = self.readers
            if self.lets_go and not _keeps_graph():
                self._let_go()
        elif found is None and _forget_after_backward(self):
            self.made = None if self.is_made_apart else (value, _stream_of(value))
        elif found is None:
            self.waiting += 1  # outside of a backward: it is not one of the readers
        return value

    def _let_go(self) -> None:
        """The backward that had them all frees its graph: nobody will ask again."""
        self.function, self.args, self.kwargs, self.written = _freed, (), {}, None

    def _build(self) -> Tensor:
        if Rebuilds._active is not None:
            counts = Rebuilds._active.counts
            counts[id(self)] = counts.get(id(self), 0) + 1
        if self.written is not None:
            return self._write(self.written)
        with _without_grad(), same_autocast(self.autocast):
            value = self.function(*materialized(self.args), **materialized(self.kwargs))
        return _like(value if self.select is None else value[self.select], self.geometry)

    def _write(self, source: Recipe) -> Tensor:
        """The function in place, on a tensor that nobody else reads."""
        base = source.read()
        if source.made is not None or torch.is_grad_enabled():  # others will read it as it is
            base = base.clone(memory_format=torch.preserve_format)
            base = _like(base, source.geometry)
        with _without_grad(), same_autocast(self.autocast):
            self.function(base, *materialized(self.args), **materialized(self.kwargs))
        return base

    def forget(self) -> None:
        self.made = None
        self.waiting = self.readers


# --- details --------------------------------------------------------------------------------------


def _freed(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError(
        "Trying to backward through the graph a second time, or a tensor that it saved was read more than once: what "
        "that is made from has been freed. Specify retain_graph=True if you need to access saved tensors after "
        "calling backward."
    )


def geometry_of(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _clone(tensor: Tensor) -> Tensor:
    """A copy; of one that is expanded, a copy of what is there once."""
    if 0 not in tensor.stride() or tensor.numel() == 0:
        return tensor.clone()
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    return tensor[tuple(once)].clone().expand(tensor.shape)


def _like(value: Tensor, geometry: tuple) -> Tensor:
    """`value` laid out as forward had it."""
    if value.stride() == geometry[1] and value.storage_offset() == geometry[2]:
        return value
    shape, stride, offset, dtype = geometry
    extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if value.numel() else offset
    base = torch.empty(extent, dtype=dtype, device=value.device)
    return base.as_strided(shape, stride, offset).copy_(value)


CONSTANTS = frozenset({type(None), bool, int, float, str})
"""Types of most arguments, which hold no tensor: they need not be looked at any closer."""
_SOURCES = frozenset({Kept, Moving, Copied, Unread, Vectors, View, Recipe})


def map_tensors(function: Callable, value: Any) -> Any:
    if type(value) in CONSTANTS:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[map_tensors(function, item) for item in value])
    if isinstance(value, (tuple, list)) and type(value) is not torch.Size:
        return tuple([map_tensors(function, item) for item in value])
    if isinstance(value, slice):
        return value
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def _add_readers(value: Any) -> None:
    if type(value) in _SOURCES:
        value.add_reader()
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _add_readers(item)


def materialized(value: Any) -> Any:
    """`value` with tensors for the sources in it."""
    if type(value) in CONSTANTS:
        return value
    if type(value) in _SOURCES:
        return value.read()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[materialized(item) for item in value])
    if type(value) is tuple:
        return tuple([materialized(item) for item in value])
    if isinstance(value, dict):
        return {key: materialized(item) for key, item in value.items()}
    return value


def _stream_of(tensor: Tensor) -> int | None:
    """The CUDA stream that works on `tensor` now; None on other devices."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device())) if tensor.is_cuda else None


def _without_grad() -> Any:
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


_unfinished: dict[int, list[weakref.ref[Recipe]]] = {}


def _forget_after_backward(recipe: Recipe) -> bool:
    """Drop `recipe`'s value when the running backward ends; False outside a backward."""
    task = _graph_task()
    if task < 0:
        return False
    if task not in _unfinished:
        _clear_failed()
        _unfinished[task] = []
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _finish(task))
    _unfinished[task].append(weakref.ref(recipe))
    return True


def _clear_failed() -> None:
    """Drop what backwards that raised left: those run no callback when they end."""
    for task, references in list(_unfinished.items()):
        if all(reference() is None for reference in references):
            _unfinished.pop(task, None)


def _finish(task: int) -> None:
    for reference in _unfinished.pop(task, ()):
        recipe = reference()
        if recipe is not None:
            recipe.forget()
