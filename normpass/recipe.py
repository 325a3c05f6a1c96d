"""What is not kept for backward, and how it is made again.

A consumer of z = act(norm(x)) (a convolution, a product, a pooling) saves z for its own backward. z is a cheap
function of tensors that are kept anyway, so the saved z is replaced by a *recipe*: the function and its inputs, kept
tensors or other recipes. The first reader in backward makes z again, bit for bit (same function, same inputs), the
others get the same tensor, and after the last reader it is freed.

How: `recording()` installs saved-tensor hooks around the forward of one captured graph, with a `Notes` that lives as
long as that forward. `tag(z, …)` notes a recipe for the *storage* of z as it is now; when autograd then saves z, or
any view of it, the hook hands it the recipe and the view's geometry. What an operator saves of its own result before
that could be noted (a ReLU, an operator in place) is exchanged as soon as the operator has run. Nothing is written on
tensor objects, so what somebody else holds of a tensor after forward holds that tensor and no chain.

Rules that keep it right:
  * A note holds for one version of a storage: what is written to afterwards is kept itself, or has a note of its own.
  * Storages are told apart by weak references: an address is not used twice while its note stands.
  * What recipes read is compared with the version it had: autograd's own check is off under hooks, so it is done here,
    with autograd's words. Vectors of a few thousand numbers that autograd would not keep are copied instead.
  * A recipe has tensors and functions of them, never a module: no hook runs again, no parameter is looked up again.
  * Hooks of somebody else (`torch.utils.checkpoint`, `save_on_cpu`) stay in charge: nothing is noted under them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from normpass.autocast import autocast_state, same_autocast
from normpass.ops.eager import under_other_derivatives
from normpass.ops.vectors import Vectors, changed_in_place

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_graph_task = torch._C._current_graph_task_id


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
            raise RuntimeError(changed_in_place(tensor, self.version))
        return tensor

    def add_reader(self) -> None:
        pass

    def exchange(self, source: Recipe | View) -> None:
        """Keep no tensor any more: `source` makes it."""
        source.add_reader()
        self.source, self.tensor = source, None


class Copied:
    """A small tensor as it was in forward."""

    __slots__ = ("geometry", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = _clone(tensor.detach())
        self.geometry = _geometry(tensor)

    def read(self) -> Tensor:
        return self.tensor

    def add_reader(self) -> None:
        pass


class Unread(Copied):
    """A tensor that is handed to a backward which does not read it, as it is by then."""

    __slots__ = ()

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.geometry = _geometry(tensor)


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
        "kwargs",
        "made",
        "readers",
        "select",
        "waiting",
        "written",
    )

    def __init__(self, notes: Notes, tensor: Tensor, function: Callable, args: tuple, kwargs: dict, select: int | None):
        self.function = function
        self.args = tuple([a if type(a) in _CONSTANTS else _map_tensors(notes.source, a) for a in args])
        self.kwargs = _map_tensors(notes.source, kwargs) if kwargs else kwargs
        self.select = select
        self.geometry = _geometry(tensor)
        self.written: Recipe | None = None
        """of a function in place: what makes the storage that it writes to"""
        self.autocast = autocast_state(args)
        self.made: tuple[Tensor, int | None] | None = None
        """the value, and the CUDA stream that it was made on; together, for another thread may look at any time"""
        self.readers = 0  # saved tensors and recipes that will ask for the value in one backward
        self.waiting = 0  # how many of them have not asked yet

    def add_reader(self) -> None:
        """One more will ask for the value. With the first this one will itself ask for what it is made from."""
        self.readers += 1
        self.waiting += 1
        if self.readers > 1:
            return
        for value in (*self.args, *self.kwargs.values()):
            if type(value) not in _CONSTANTS:
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
        elif found is None and _forget_after_backward(self):
            self.made = value, _stream_of(value)
        return value

    def _build(self) -> Tensor:
        if Rebuilds._active is not None:
            counts = Rebuilds._active.counts
            counts[id(self)] = counts.get(id(self), 0) + 1
        if self.written is not None:
            return self._write(self.written)
        with _without_grad(), same_autocast(self.autocast):
            value = self.function(*materialised(self.args), **materialised(self.kwargs))
        return _like(value if self.select is None else value[self.select], self.geometry)

    def _write(self, source: Recipe) -> Tensor:
        """The function in place, on a tensor that nobody else reads."""
        base = source.read()
        if source.made is not None or torch.is_grad_enabled():  # others will read it as it is
            base = base.clone(memory_format=torch.preserve_format)
            base = _like(base, source.geometry)
        with _without_grad(), same_autocast(self.autocast):
            self.function(base, *materialised(self.args), **materialised(self.kwargs))
        return base

    def forget(self) -> None:
        self.made = None
        self.waiting = self.readers


# --- noting ---------------------------------------------------------------------------------------


class Copier:
    """Whoever has a saved-tensor hook as a method and is told which vectors are kept as copies."""

    __slots__ = ()

    def copy(self, tensor: Tensor) -> None:
        """Who keeps `tensor` from now on keeps a copy of it as it is: until `forget`."""
        raise NotImplementedError

    def ignore(self, tensor: Tensor) -> None:
        """Who keeps `tensor` from now on does not read it: until `forget`."""
        raise NotImplementedError

    def forget(self, tensor: Tensor) -> None:
        """The storage of `tensor` is kept from now on."""
        raise NotImplementedError


class Notes(Copier):
    """The recipes of one forward of one captured graph, by storage."""

    __slots__ = ("_entries", "_recent")

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, int, Any]] = {}  # the last keeps the address from being used again
        self._recent: dict[int, list[Kept]] = {}
        """what the running operator saved, by storage"""

    def pack(self, tensor: Tensor) -> Any:
        """The hook: what autograd keeps in the place of `tensor`."""
        if tensor.layout is not torch.strided:
            return Kept(tensor)
        key = tensor.untyped_storage()._cdata
        if key in self._entries:
            source = self._find(tensor, key)
            if source is not None:
                source.add_reader()
                return source
        kept = Kept(tensor)
        self._recent.setdefault(key, []).append(kept)
        return kept

    def _find(self, tensor: Tensor, key: int) -> Recipe | View | None:
        entry = self._entries.get(key)
        if entry is None or entry[1] != tensor._version or tensor.is_neg() or tensor.is_conj():
            return None
        recipe, geometry = entry[0], _geometry(tensor)
        if geometry == recipe.geometry:
            return recipe
        if isinstance(recipe, Copied) or geometry[3] is not recipe.geometry[3]:
            return None
        return View(recipe, geometry[:3])

    def source(self, tensor: Tensor) -> Any:
        """What a recipe holds of one of its arguments."""
        found = self._find(tensor, tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        return Kept(tensor) if found is None else found

    def note(self, tensor: Tensor, recipe: Recipe) -> None:
        """From now on `recipe` makes the storage of `tensor`, as long as that is not written to."""
        key, version = self._keep_as(recipe, tensor)
        for kept in self._recent.get(key, ()):
            held = kept.tensor
            if held is not None and kept.version == version:
                source = self._find(held, key)
                if source is not None:
                    kept.exchange(source)

    def copy(self, tensor: Tensor) -> None:
        self._keep_as(Copied(tensor), tensor)

    def ignore(self, tensor: Tensor) -> None:
        self._keep_as(Unread(tensor), tensor)

    def _keep_as(self, source: Any, tensor: Tensor) -> tuple[int, int]:
        """Whoever saves `tensor` as it is now saves `source`; the key of its storage, and its version."""
        storage = tensor.untyped_storage()
        key, version = storage._cdata, tensor._version
        self._entries[key] = source, version, _Reference(storage)
        return key, version

    def forget(self, tensor: Tensor) -> None:
        self._entries.pop(tensor.untyped_storage()._cdata, None)

    def recipe_of(self, tensor: Tensor) -> Recipe | None:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        found = entry[0] if entry is not None and entry[1] == tensor._version else None
        return found if type(found) is Recipe else None

    def close(self) -> None:
        """Forward is over: what autograd keeps has its recipes, and nobody else needs them."""
        self._entries.clear()
        self._recent.clear()

    def begin(self) -> None:
        """An operator is about to run: what was saved before is none of its own."""
        self._recent.clear()


class _Reference:
    """A weak reference to a storage: while it is there its address belongs to nobody else."""

    __slots__ = ("_pointer",)

    def __init__(self, storage: torch.UntypedStorage):
        self._pointer = storage._weak_ref()

    def __del__(self, free: Callable = torch.UntypedStorage._free_weak_ref) -> None:
        free(self._pointer)


@contextmanager
def recording() -> Iterator[None]:
    """Saved-tensor hooks that replace noted tensors by their recipes, unless hooks are in place already."""
    taken = _top_hooks(False) is not None or not _hooks_enabled() or under_other_derivatives()
    if taken or not torch.is_grad_enabled():
        yield
        return
    notes = Notes()
    try:
        with saved_tensors_hooks(notes.pack, _unpack):
            yield
    finally:
        notes.close()


def notes_now() -> Notes | None:
    """Where recipes are noted: those of the forward that is running, if its hooks are the innermost ones."""
    notes = _owner_of_hooks()
    return notes if type(notes) is Notes else None


def _owner_of_hooks() -> Any:
    top = _top_hooks(False)
    return None if top is None else getattr(top[0], "__self__", None)


def is_recording() -> bool:
    """Whether a tag would be used."""
    return notes_now() is not None


_observers: list[Callable] = []


@contextmanager
def observed_tags(observer: Callable) -> Iterator[None]:
    """Inside, `observer(function, args, kwargs)` is called for every recipe that is noted."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def tag(tensor: Tensor, function: Callable, args: tuple, kwargs: dict | None = None, select: int | None = None) -> None:
    """Note that `function(*args, **kwargs)` (item `select` of it) makes `tensor` again, bit for bit.

    An argument may be a `Copied` or `Kept` already.
    """
    notes = notes_now()
    if notes is None:
        return
    if _observers:
        _observers[-1](function, args, kwargs or {})
    notes.note(tensor, Recipe(notes, tensor, function, args, kwargs or {}, select))


def copied(tensor: Tensor | None) -> Any:
    """A vector that a recipe reads and autograd does not keep: what it is now, whatever happens to it later."""
    return None if tensor is None else Copied(tensor)


class copying:
    """Inside, who keeps these vectors keeps copies: for what plain layers do not keep, so that it may change later."""

    __slots__ = ("_copier", "_tensors")

    def __init__(self, *tensors: Tensor | None):
        self._tensors = [t for t in tensors if t is not None]
        owner = _owner_of_hooks() if self._tensors else None
        self._copier = owner if isinstance(owner, Copier) else None

    def __enter__(self) -> None:
        if self._copier is not None:
            for tensor in self._tensors:
                self._tell(self._copier, tensor)

    def __exit__(self, *exc: object) -> None:
        if self._copier is not None:
            for tensor in self._tensors:
                self._copier.forget(tensor)

    def _tell(self, copier: Copier, tensor: Tensor) -> None:
        copier.copy(tensor)


class unread(copying):
    """Inside, who keeps these tensors does not read them: they may change."""

    __slots__ = ()

    def _tell(self, copier: Copier, tensor: Tensor) -> None:
        copier.ignore(tensor)


Copies = tuple[tuple[Any, Any], ...]
"""Which arguments are copied, since autograd does not keep them: position or name, and the index in a list or None."""


def call_rebuilt(function: Callable, copies: Copies, *args: Any, **kwargs: Any) -> Any:
    """Call a cheap `function` and note how what it returns is made again."""
    notes = notes_now()
    if notes is None:
        return function(*args, **kwargs)
    noted, named = _with_copies(copies, args, kwargs)
    notes.begin()
    result = function(*args, **kwargs)
    if isinstance(result, Tensor):
        tag(result, function, noted, named)
    elif isinstance(result, (tuple, list)):
        for index, item in enumerate(result):
            if isinstance(item, Tensor):
                tag(item, function, noted, named, select=index)
    return result


def _with_copies(copies: Copies, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if not copies:
        return args, kwargs
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for key, index in copies:
        if index is None:
            given[key] = _copied(given[key])
        else:
            given[key] = [_copied(item) if i == index else item for i, item in enumerate(given[key])]
    return tuple([given.pop(i) for i in range(len(args))]), given


def _copied(value: Any) -> Any:
    return Copied(value) if isinstance(value, Tensor) else value


def call_rebuilt_in_place(function: Callable, position: int, copies: Copies, *args: Any, **kwargs: Any) -> Any:
    """Call a cheap `function` that writes to its argument at `position`, and note how that is made again."""
    notes = notes_now()
    if notes is None:
        return function(*args, **kwargs)
    target = args[position]
    source = notes.recipe_of(target)
    if source is None:
        return function(*args, **kwargs)
    noted, named = _with_copies(copies, args, kwargs)
    write = _Write(function, position, _geometry(target))
    recipe = Recipe(notes, target, write, (*noted[:position], *noted[position + 1 :]), named, None)
    recipe.written, recipe.geometry = source, source.geometry
    if _observers:
        _observers[-1](function, args, kwargs)
    notes.begin()
    result = function(*args, **kwargs)
    notes.note(target, recipe)
    return result


def call_kept(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a `function` that notes recipes itself, and keep its result all the same."""
    result = function(*args, **kwargs)
    notes = notes_now()
    if notes is not None:
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                notes.forget(item)
    return result


class _Write:
    """A function in place, on the part of a storage that it wrote to in forward."""

    __slots__ = ("function", "geometry", "position")

    def __init__(self, function: Callable, position: int, geometry: tuple):
        self.function, self.position, self.geometry = function, position, geometry

    def __call__(self, base: Tensor, *others: Any, **kwargs: Any) -> None:
        same = self.geometry == _geometry(base)
        target = base if same else base.as_strided(*self.geometry[:3])
        self.function(*others[: self.position], target, *others[self.position :], **kwargs)


# --- details --------------------------------------------------------------------------------------


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.read()
    return tensor


def _geometry(tensor: Tensor) -> tuple:
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


_CONSTANTS = frozenset({type(None), bool, int, float, str})
"""Types of most arguments, which hold no tensor: they need not be looked at any closer."""
_SOURCES = frozenset({Kept, Copied, Unread, Vectors, View, Recipe})


def _map_tensors(function: Callable, value: Any) -> Any:
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_map_tensors(function, item) for item in value])
    if isinstance(value, (tuple, list)) and type(value) is not torch.Size:
        return tuple([_map_tensors(function, item) for item in value])
    if isinstance(value, slice):
        return value
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    return value


def _add_readers(value: Any) -> None:
    if type(value) in _SOURCES:
        value.add_reader()
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _add_readers(item)


def materialised(value: Any) -> Any:
    """`value` with tensors for the sources in it."""
    if type(value) in _CONSTANTS:
        return value
    if type(value) in _SOURCES:
        return value.read()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[materialised(item) for item in value])
    if type(value) is tuple:
        return tuple([materialised(item) for item in value])
    if isinstance(value, dict):
        return {key: materialised(item) for key, item in value.items()}
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
