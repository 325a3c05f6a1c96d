"""The optimized module: an instance of the model's own class whose forward runs rewritten graphs.

`optimize_in_place(copy, request)` gives the copy a class derived from its own: same attributes, same methods, same
`state_dict`, same children; only `forward` differs. It runs the model's forward through Dynamo, with a backend that
rewrites every graph (`normpass.pipeline`) and runs it under saved-tensor hooks (`normpass.recipe.notes`).

Pickling and copying store the plain structure and what was asked for, and optimize again when loaded. What is made of
the class without being optimized (a slice of a Sequential, `type(model)(…)`) is a plain module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from normpass.capture.dynamo import OTHER_HOOKS, Captured, is_raising, reason_to_run_plain
from normpass.copies.shared_copy import shared_copy
from normpass.errors import NormpassError, StaleChangeError
from normpass.graph.nodes import copy_graph, name_from_root
from normpass.nn import register_with_dynamo
from normpass.nn.norm import BatchNormLike, as_batch_norm, batch_norm_again
from normpass.nn.switchable import decide, switchable_layers
from normpass.pipeline import Request, Rewritten, note_recipes, rewrite
from normpass.recipe.notes import recording

_STATE = "_normpass"
_log = logging.getLogger(__name__)
Observer = Callable[[Rewritten, Sequence[Any]], None]


@dataclass
class State:
    """What an optimized module knows about itself; lives in its `__dict__`, not among its submodules."""

    request: Request
    replaced: dict[str, nn.Module]
    """path -> the layer that a change replaced"""
    call: Captured
    observers: list[Observer] = field(default_factory=list)
    """called with every graph that is rewritten, and its inputs"""
    failures: list[str] = field(default_factory=list)
    """why graphs run as they were captured"""
    plain_calls: list[str] = field(default_factory=list)
    """why calls have run as the plain model, each once"""
    captures: int = 0
    """how many graphs there have been"""
    is_logging: bool = True
    """whether they are logged; a report has them anyway"""

    def needs_capture(self, training: bool) -> bool:
        """Whether the plain forward would not be what was asked for."""
        return any(c.applies_to_graph and (training or c.changes_eval) for c in self.request.changes)


class Optimized:
    """Marks modules made by `normpass.optimize`; `isinstance(m, normpass.Optimized)`."""

    _normpass_plain_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._normpass_plain_class(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = state_of(cast(nn.Module, self))
        return _optimize_again, (plain_copy(cast(nn.Module, self), keep_changes=True), state.request, state.replaced)

    def __deepcopy__(self, memo: dict) -> Any:
        again, arguments = self.__reduce_ex__(
            4
        )  # the plain class may have a `__deepcopy__`: that is for the plain copy
        return again(*copy.deepcopy(arguments, memo))


def is_optimized(module: object) -> bool:
    """Whether `module` was made by `optimize`, and not of an optimized module's class by somebody else."""
    return isinstance(module, Optimized) and _STATE in module.__dict__


def state_of(optimized: nn.Module) -> State:
    """What an optimized module knows about itself."""
    state: State = optimized.__dict__[_STATE]
    return state


def _optimize_again(plain: nn.Module, request: Request, replaced: Mapping[str, nn.Module]) -> nn.Module:
    return optimize_in_place(plain, request, replaced)


@functools.cache
def optimized_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of optimized instances of `plain`, with its name."""

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            _seen_by_compiler()
            state = getattr(self, _STATE, None)
            if state is not None:
                _refuse_stale_change(state, self.training, "somebody else's torch.compile sees it")
            return plain.forward(self, *args, **kwargs)
        state = self.__dict__.get(_STATE)
        if state is None or "_is_replica" in self.__dict__:  # of DataParallel: another one at every call
            _say(state, self, "it is a replica of DataParallel")
            return plain.forward(self, *args, **kwargs)
        return _run(self, state, plain.forward, args, kwargs)

    namespace: dict[str, Any] = {"_normpass_plain_class": plain, "__module__": plain.__module__, "forward": forward}
    if issubclass(plain, fx.GraphModule):
        namespace["recompile"] = _recompile
    return type(plain.__name__, (Optimized, plain), namespace)


def _run(module: nn.Module, state: State, forward: Callable, args: tuple, kwargs: dict) -> Any:
    reason = reason_to_run_plain(args, kwargs)
    needs_capture = state.needs_capture(module.training)
    if needs_capture and state.call.is_off:
        return _run_in_modes(module, state, forward, args, kwargs)
    if reason is None or (reason is OTHER_HOOKS and needs_capture):  # it notes no recipes under them
        result = state.call(module, *args, **kwargs)
        if not state.captures:
            is_off = state.call.is_off
            _say(
                state,
                module,
                "TorchDynamo is switched off" if is_off else "TorchDynamo captures nothing of its forward",
            )
        if needs_capture and (state.failures or state.call.failures):
            _refuse_stale_change(state, module.training, "a part of it cannot be captured")
        return result
    _refuse_stale_change(state, module.training, reason)
    _say(state, module, reason)
    return forward(module, *args, **kwargs)


def _say(state: State | None, module: nn.Module, reason: str) -> None:
    """Log once why calls run as the plain model."""
    if state is None or reason in state.plain_calls:
        return
    state.plain_calls.append(reason)
    if state.is_logging:
        _log.warning("normpass: %s runs as the plain model: %s", type(module).__name__, reason)


def _run_in_modes(module: nn.Module, state: State, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """The changed function without a captured graph, where each change can be made call by call."""
    changes = [change for change in state.request.changes if change.applies_to_graph]
    if not all(hasattr(change, "calls") for change in changes):
        _refuse_stale_change(state, module.training, "TorchDynamo is switched off")
    with contextlib.ExitStack() as stack:
        for change in changes:
            if hasattr(change, "calls"):
                stack.enter_context(change.calls())
        return forward(module, *args, **kwargs)


def _refuse_stale_change(state: State, training: bool, reason: str) -> None:
    if state.needs_capture(training):
        or_eval = "" if state.needs_capture(False) else ", or in eval mode"
        raise StaleChangeError(
            f"this model was optimized with `changes=`, which are made in its captured graph, and {reason}: its plain "
            f"forward would compute something else. Call it as it is{or_eval}"
        )


def _recompile(self: Any) -> Any:
    """`GraphModule.recompile` writes the new forward into the class: into the plain one, which ours calls."""
    optimized, plain = type(self), self._normpass_plain_class
    self.__class__ = plain
    try:
        return plain.recompile(self)
    finally:
        self.__class__ = optimized
        state = self.__dict__.get(_STATE)
        if state is not None:
            state.call = _captured(plain, self, state)


# --- somebody else's compiler -----------------------------------------------------------------------


def _seen_by_compiler() -> bool:
    """Called while somebody's `torch.compile` traces an optimized module, which it sees as the plain one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    if output.export:
        return True
    backend: Any = output.compiler_fn
    backend = getattr(backend, "_torchdynamo_orig_backend", backend)
    name = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", type(backend).__name__)
    if name != "normpass":
        _warn_of_compiler(str(name))
    return True


@functools.cache
def _warn_of_compiler(name: str) -> None:
    """Once in a process, however many graphs there are."""
    warnings.warn(
        f"normpass: an optimized model is compiled by `{name}`, which sees the plain model and decides itself what "
        'is kept for backward; compile the plain model with torch.compile(model, backend="normpass") instead',
        stacklevel=3,
    )


# What `torch.compiler.assume_constant_result` does, which would import Dynamo, for seconds, wherever nobody compiles.
_seen_by_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- making and unmaking ----------------------------------------------------------------------------


def optimize_in_place(model: nn.Module, request: Request, replaced: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Turn `model` (a copy that nobody else holds) into its optimized form.

    `replaced` has the layers that changes have replaced in it already.
    """
    _register()
    replaced = dict(replaced or {})
    for change in request.changes:
        replaced.update(change.change_modules(model))
    decide(list(switchable_layers(model).values()))  # what has chosen is rewritten as what it chose
    plain = type(model)
    state = State(request, replaced, None)  # type: ignore[arg-type]
    state.call = _captured(plain, model, state)
    model.__class__ = optimized_class(plain)  # type: ignore[assignment, arg-type]
    model.__dict__[_STATE] = state
    return model


def _captured(plain: type[nn.Module], model: nn.Module, state: State) -> Captured:
    backend = functools.partial(_compile, state, weakref.ref(model))
    backend.compiler_name = "normpass"  # type: ignore[attr-defined]
    return Captured(plain.forward, backend)


def plain_copy(optimized: nn.Module, keep_changes: bool = False) -> nn.Module:
    """The original structure of an optimized module, sharing its parameters and buffers.

    With `keep_changes` the layers that changes put in stay.
    """
    cls, state = type(optimized), optimized.__dict__.pop(_STATE)
    optimized.__class__ = optimized._normpass_plain_class  # type: ignore[assignment]
    try:
        plain = shared_copy(optimized)
    finally:
        optimized.__class__ = cls
        optimized.__dict__[_STATE] = state
    for path, layer in state.replaced.items() if not keep_changes else ():
        parent, _, name = path.rpartition(".")
        owner = plain.get_submodule(parent)
        current = getattr(owner, name, None)
        if type(current) is nn.LeakyReLU:
            setattr(owner, name, copy.deepcopy(layer).train(current.training))
        elif isinstance(current, BatchNormLike):
            setattr(owner, name, as_batch_norm(current))
        elif type(current) is nn.GroupNorm:
            setattr(owner, name, batch_norm_again(layer, current))
    return plain


# --- the backend of eager mode ----------------------------------------------------------------------


def _compile(
    state: State, model: weakref.ref[nn.Module], graph_module: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """What Dynamo is to run in the place of one graph."""
    state.captures += 1
    name_from_root(graph_module.graph, model())
    plain = copy_graph(graph_module)
    try:
        rewritten = rewrite(graph_module, inputs, state.request)
        note_recipes(rewritten, state.request)
    except NormpassError:
        raise
    except Exception as error:
        if is_raising():
            raise
        state.failures.append(f"{type(error).__name__}: {error}")
        _log.warning("normpass: a graph of %d nodes runs as it is: %s", len(plain.graph.nodes), state.failures[-1])
        return plain.forward
    for observer in state.observers:
        observer(rewritten, inputs)
    return with_recipes(rewritten.runs) if rewritten.keeps_gradients else rewritten.runs.forward


def with_recipes(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function that runs under the saved-tensor hooks."""
    forward = graph_module.forward

    def run(*inputs: Any) -> Any:
        with recording():
            return forward(*inputs)

    return run


_register = functools.cache(register_with_dynamo)

__all__ = [
    "Optimized",
    "State",
    "is_optimized",
    "optimize_in_place",
    "plain_copy",
    "state_of",
    "with_recipes",
]
