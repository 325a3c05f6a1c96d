"""What is not kept for backward, and how it is rebuilt.

A consumer of z = act(norm(x)) (a convolution, a product, a pooling) saves z for its own backward. z is
a cheap function of tensors that are kept anyway, so the saved z is replaced by a *recipe*: the
function and its inputs, kept tensors or other recipes. The first reader in backward rebuilds z, bit
for bit (same op, same inputs), the others get the same tensor, and after the last reader it is freed.

How: `recording()` installs saved-tensor hooks around the forward of an optimised model. `tag(z, …)`
notes a recipe on the tensor object itself; when autograd then saves z, the hook hands it the recipe.
Views and casts of z are other tensor objects and carry no recipe: they are kept as they are.

Rules that keep it right:
  * A tag holds for one version of the tensor: after an in-place change z is kept itself.
  * The kept inputs are compared with the version they had: autograd's own check for changes in place
    is off under hooks, so it is done here.
  * Hooks of somebody else (`torch.utils.checkpoint`, `save_on_cpu`) stay in charge: nothing is
    installed or tagged under them.
  * A tag is only put on a tensor that requires grad: then what it is made from is kept anyway.

Under torch.compile there are neither hooks nor tags: there a partitioner decides what is kept, and what it is to
compute again is annotated while the graph is traced (`rebuilt_when_compiled`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.traceback import annotate, get_current_meta
from torch.utils import _pytree as pytree

from normpass.autocast import autocast_state, same_autocast
from normpass.errors import ModifiedInPlaceError
from normpass.graph import called_on, hooks_of
from normpass.ops.eager import under_other_derivatives

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_graph_task = torch._C._current_graph_task_id

_TAG = "_normpass_recipe"
_ANNOTATION = {"normpass": "rebuilt"}


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


class Kept:
    """A tensor that a recipe reads, with the version it had."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.version = tensor._version

    def read(self) -> Tensor:
        _check_version(self.tensor, self.version)
        return self.tensor


class Recipe:
    """How one tensor is rebuilt: `function(*args, **kwargs)`, with recipes and kept tensors for tensors."""

    __slots__ = (
        "__weakref__",
        "args",
        "autocast",
        "function",
        "kwargs",
        "readers",
        "select",
        "value",
        "version",
        "waiting",
    )

    def __init__(self, function: Callable, args: tuple, kwargs: dict, select: int | None, version: int):
        self.function = function
        self.args = _map_tensors(_note, args)
        self.kwargs = _map_tensors(_note, kwargs)
        self.select = select
        self.version = version
        self.autocast = autocast_state(args)
        self.value: Tensor | None = None
        self.readers = 0  # saved tensors and recipes that will ask for the value in one backward
        self.waiting = 0  # how many of them have not asked yet

    def add_reader(self) -> None:
        """One more will ask for the value. With the first this one will itself ask for what it is made from."""
        self.readers += 1
        self.waiting += 1
        if self.readers == 1:
            for value in (*self.args, *self.kwargs.values()):
                _add_readers(value)

    def read(self) -> Tensor:
        """The tensor, rebuilt at most once per backward."""
        value = self.value  # once: another thread's backward may take it away
        if value is None:
            value = self._build()
        self.waiting -= 1
        if self.waiting <= 0:
            self.value = None
            self.waiting = self.readers
        elif self.value is None and _forget_after_backward(self):
            self.value = value
        return value

    def _build(self) -> Tensor:
        if Rebuilds._active is not None:
            counts = Rebuilds._active.counts
            counts[id(self)] = counts.get(id(self), 0) + 1
        args = _map_noted(self.args)
        kwargs = _map_noted(self.kwargs)
        with _without_grad(), same_autocast(self.autocast):
            value = self.function(*args, **kwargs)
        return value if self.select is None else value[self.select]

    def forget(self) -> None:
        self.value = None
        self.waiting = self.readers


# --- recording ------------------------------------------------------------------------------------


@contextmanager
def recording() -> Iterator[None]:
    """Saved-tensor hooks that replace tagged tensors by their recipes, unless hooks are in place already."""
    taken = _top_hooks(False) is not None or not _hooks_enabled() or under_other_derivatives()
    if taken or not torch.is_grad_enabled():
        yield
        return
    with saved_tensors_hooks(_pack, _unpack):
        yield


def is_recording() -> bool:
    """Whether a tag would be used: grad mode on and the innermost saved-tensor hooks are ours."""
    top = _top_hooks(False)
    return top is not None and top[0] is _pack and torch.is_grad_enabled()


_observers: list[Callable] = []


@contextmanager
def observed_tags(observer: Callable) -> Iterator[None]:
    """Inside, `observer(function, args, kwargs)` is called for every tag that is put on a tensor."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def tag(tensor: Tensor, function: Callable, args: tuple, kwargs: dict | None = None, select: int | None = None):
    """Note on `tensor` that `function(*args, **kwargs)` (item `select` of it) rebuilds it bit for bit."""
    if tensor.requires_grad and is_recording():
        if _observers:
            _observers[-1](function, args, kwargs or {})
        setattr(tensor, _TAG, Recipe(function, args, kwargs or {}, select, tensor._version))


def derived(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a cheap `function` (concatenation, product, pooling, view, …) and tag what it returns."""
    if torch.compiler.is_compiling():
        return rebuilt_when_compiled(function, *args, **kwargs)
    result = function(*args, **kwargs)
    if not is_recording():
        return result
    layers = _layers_in(function, args)
    if any([any(hooks_of(layer)) for layer in layers]):
        return result
    parameters = tuple(p for layer in layers for p in layer.parameters())
    if parameters:  # noted as well, so that one that changes before backward is found out
        function, args = _call_beside, (parameters, function, *args)
    if isinstance(result, Tensor):
        tag(result, function, args, kwargs)
    elif isinstance(result, (tuple, list)):
        for index, item in enumerate(result):
            tag(item, function, args, kwargs, select=index)
    return result


def derived_function(function: Any) -> Callable:
    """`derived` with its first argument fixed."""
    return called_on(derived, function)


def _layers_in(function: Callable, args: tuple) -> list[nn.Module]:
    return [f for f in (function, *args) if isinstance(f, nn.Module)]


def _call_beside(parameters: tuple, function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def pass_on(tensor: Tensor, alias: Tensor) -> None:
    """Give `alias`, the same values in the same memory, the recipe of `tensor`, if that has one."""
    recipe = recipe_of(tensor)
    if recipe is not None and alias._version == recipe.version:
        setattr(alias, _TAG, recipe)


def untag(tree: Any) -> None:
    """Take the tags off the tensors in `tree`, which leave the optimised model."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and hasattr(leaf, _TAG):
            delattr(leaf, _TAG)


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tagged tensor whose content has not changed since; None for any other."""
    recipe = getattr(tensor, _TAG, None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def rebuilt_when_compiled(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `function` while torch.compile traces: whatever it computes is computed again in backward.

    Not for what moves running statistics or draws random numbers, nor for a layer with hooks that do.
    """
    if any([any(hooks_of(layer)) for layer in _layers_in(function, args)]):
        return function(*args, **kwargs)
    with annotate(_ANNOTATION):
        return function(*args, **kwargs)


def is_annotated() -> bool:
    """Whether the operator that is traced now comes from a `rebuilt_when_compiled`."""
    return bool(get_current_meta().get("custom", {}).get("normpass") == "rebuilt")


@functools.cache
def method_function(name: str) -> Callable:
    """The tensor method `name` as a function of the tensor and its arguments."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    call.__name__ = name
    return call


# --- the hooks ------------------------------------------------------------------------------------


def _pack(tensor: Tensor) -> Any:
    recipe = recipe_of(tensor)
    if recipe is None:
        # Detached: an output that its own node saves would otherwise hold itself through its grad_fn.
        return tensor.detach(), tensor._version
    recipe.add_reader()
    return recipe


def _unpack(packed: Any) -> Tensor:
    if type(packed) is Recipe:
        return packed.read()
    tensor, version = packed
    _check_version(tensor, version)
    return tensor


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version == version:
        return
    raise ModifiedInPlaceError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}. "
        "Make the operation out of place, or run it before the tensor is used."
    )


# --- details --------------------------------------------------------------------------------------


_CONSTANTS = frozenset({type(None), bool, int, float, str})
"""Types of most arguments, which hold no tensor: they need not be looked at any closer."""


def _map_tensors(function: Callable, value: Any) -> Any:
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return tuple([_map_tensors(function, item) for item in value])
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    return value


def _note(tensor: Tensor) -> Kept | Recipe:
    recipe = recipe_of(tensor)
    return Kept(tensor) if recipe is None else recipe


def _add_readers(value: Any) -> None:
    if type(value) is Recipe:
        value.add_reader()
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _add_readers(item)


def _map_noted(value: Any) -> Any:
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, (Kept, Recipe)):
        return value.read()
    if isinstance(value, tuple):
        return tuple([_map_noted(item) for item in value])
    if isinstance(value, dict):
        return {key: _map_noted(item) for key, item in value.items()}
    return value


def _without_grad():
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
