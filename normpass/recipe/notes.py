"""Where recipes are noted, and how they take the place of tensors.

`recording()` installs saved-tensor hooks around the forward of one captured graph, with a `Notes` that lives as long as
that forward. `tag(z, …)` notes a recipe for the *storage* of z as it is now; when autograd then saves z, or any view of
it, the hook hands it the recipe and the view's geometry. What an operator saves of its own result before that could be
noted (a ReLU, an operator in place) is exchanged as soon as the operator has run. Nothing is written on tensor objects,
so what somebody else holds of a tensor after forward holds that tensor and no chain.

  * A note holds for one version of a storage: what is written to afterwards is kept itself, or has a note of its own.
  * Storages are told apart by weak references: an address is not used twice while its note stands.
  * Hooks of somebody else (`torch.utils.checkpoint`, `save_on_cpu`) stay in charge: nothing is noted under them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from normpass.onlookers import under_other_derivatives
from normpass.ops.moves import Watched
from normpass.recipe.recipes import Copied, Kept, Moving, Recipe, Unread, View, geometry_of

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


class Copier:
    """Whoever has a saved-tensor hook as a method and is told which vectors are kept as copies."""

    __slots__ = ()

    def copy(self, tensor: Tensor) -> None:
        """Who keeps `tensor` from now on keeps a copy of it as it is: until `forget`."""
        raise NotImplementedError

    def ignore(self, tensor: Tensor) -> None:
        """Who keeps `tensor`, which norms move, from now on does not read it: until `forget`."""
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
        recipe, geometry = entry[0], geometry_of(tensor)
        if geometry == recipe.geometry:
            return recipe
        if type(recipe) is not Recipe or geometry[3] is not recipe.geometry[3]:
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

    def watch(self, tensor: Tensor, *running: Tensor) -> None:
        """Who keeps `tensor` gets it back as long as nobody but norms writes to the running statistics."""
        if not any([t.is_inference() for t in running]):
            self._keep_as(Moving(tensor, tuple([Watched(t) for t in running])), tensor)

    def watched_with(self, tensor: Tensor) -> tuple[Watched, ...]:
        """What is watched for whoever keeps `tensor`."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry[0].watched if entry is not None and type(entry[0]) is Moving else ()

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
    notes.note(tensor, Recipe(notes.source, tensor, function, args, kwargs or {}, select))


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
    write = _Write(function, position, geometry_of(target))
    recipe = Recipe(notes.source, target, write, (*noted[:position], *noted[position + 1 :]), named, None)
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


def call_released(function: Callable, made_apart: bool, lets_go: bool, *args: Any, **kwargs: Any) -> Any:
    """Call a `function` that notes recipes itself, and say when in backward what they make and need is freed."""
    result = function(*args, **kwargs)
    notes = notes_now()
    if notes is not None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        for recipe in {notes.recipe_of(t) for t in results if isinstance(t, Tensor)} - {None}:
            assert recipe is not None
            recipe.lets_go = lets_go
            if made_apart:
                recipe.make_apart()
    return result


class _Write:
    """A function in place, on the part of a storage that it wrote to in forward."""

    __slots__ = ("function", "geometry", "position")

    def __init__(self, function: Callable, position: int, geometry: tuple):
        self.function, self.position, self.geometry = function, position, geometry

    def __call__(self, base: Tensor, *others: Any, **kwargs: Any) -> None:
        same = self.geometry == geometry_of(base)
        target = base if same else base.as_strided(*self.geometry[:3])
        self.function(*others[: self.position], target, *others[self.position :], **kwargs)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.read()
    return tensor
