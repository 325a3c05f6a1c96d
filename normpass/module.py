"""The optimised module: an instance of the model's own class whose forward runs rewritten programs.

`optimise_in_place(clone, options)` gives the clone, and each part of it that is rewritten, a class
derived from its own: same attributes, same methods, same `state_dict`; only `forward` differs. It picks
the program whose guard holds (one per combination of training flags that forward reads, of arguments
given, …) and traces a new one where none does. What cannot be traced runs as the plain model would.

Pickling and copying store the plain structure and the options, and optimise again when loaded.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from normpass import passes, recipe
from normpass.apply import Passes, Program, apply_plan
from normpass.capture import (
    Capture,
    CaptureError,
    capture,
    described,
    find_parts,
    parameters_of,
    required_arguments,
    tensors_of,
)
from normpass.errors import InvalidModelError, StaleChangeError
from normpass.graph import global_hooks, join
from normpass.nn.norm import BatchNormLike, as_batch_norm, batch_norm_again
from normpass.nn.switchable import decide, switchable_layers
from normpass.planner import DEFAULT, Decisions, make_plan
from normpass.sites import find_sites

_STATE = "_normpass"
_MOST_PROGRAMS = 16


@dataclass(frozen=True)
class Options:
    """What `optimize` was asked for; enough to do it again."""

    changes: tuple[Any, ...] = ()
    allow_lossy: bool = False
    decisions: Decisions = DEFAULT
    serialize: Any = None
    """a `SerializeMinibatch`, for the part that is the whole model"""
    inputs: tuple[Tensor, ...] = ()
    """what it is planned for: a tensor on `meta` for each argument"""


PASSES = Passes(passes.ORDER, passes.AFTER_SITES, passes.CONVOLUTIONS, passes.REGIONS, passes.JOINS)


@dataclass
class Part:
    """What an optimised module knows about itself; lives in its `__dict__`, not among its submodules."""

    options: Options
    is_root: bool
    names: list[str] | None
    """parameter names of the plain forward; None where it is never traced"""
    defaults: list[Any] = field(default_factory=list)
    positional: int = 0
    """how many of the parameters may be given by position"""
    path: str = ""
    """dotted, of the part in the model"""
    programs: list[tuple[tuple, Program]] = field(default_factory=list)
    """(arguments' key, program), the last used first"""
    failures: list[tuple[tuple, bool, bool]] = field(default_factory=list)
    """(arguments' key, training, with gradients) of calls that could not be traced"""
    is_exhausted: bool = False
    """whether it was traced as often as it may be"""
    untraceable: dict[str, str] = field(default_factory=dict)
    """for the root: path -> why that module's own forward is left as it is"""
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    """for the root: path -> the layer that a change replaced"""
    parts: tuple[str, ...] = ()
    """for the root: paths of the rewritten parts"""


class Optimized:
    """Marks modules made by `normpass.optimize`; `isinstance(m, normpass.Optimized)`."""

    _normpass_plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        part: Part = self.__dict__[_STATE]
        plain = plain_copy(cast(nn.Module, self), keep_changes=True)
        return (_optimise_again, (plain, part.options, part.replaced)) if part.is_root else (_identity, (plain,))


def part_of(optimised: nn.Module) -> Part:
    """What an optimised module knows about itself."""
    return optimised.__dict__[_STATE]


def _identity(module: nn.Module) -> nn.Module:
    return module


def _optimise_again(plain: nn.Module, options: Options, replaced: Mapping[str, nn.Module] | None = None) -> nn.Module:
    return optimise_in_place(plain, options, replaced)


@functools.cache
def optimized_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of optimised instances of `plain`, with its name."""

    @functools.wraps(plain.forward)
    def forward(self, *args, **kwargs):
        return run(self, args, kwargs)

    namespace = {"forward": forward, "_normpass_plain_class": plain, "__module__": plain.__module__}
    return type(plain.__name__, (Optimized, plain), namespace)


# --- making and unmaking --------------------------------------------------------------------------


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module structure that shares every parameter, buffer and tensor attribute."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
        shared.update((id(t), t) for t in tensors if isinstance(t, Tensor))
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise InvalidModelError(
            f"this {type(model).__name__} cannot be copied with copy.deepcopy ({type(error).__name__}: {error}), "
            "and the given model must stay as it is; give the class a `__deepcopy__`, or take the attribute off it"
        ) from error


def plain_copy(optimised: nn.Module, keep_changes: bool = False) -> nn.Module:
    """The original structure of an optimised module, sharing its parameters and buffers.

    With `keep_changes` the layers that changes put in stay.
    """
    changed: list[tuple[nn.Module, type, dict]] = []
    part: Part = optimised.__dict__[_STATE]
    try:
        for module in optimised.modules():
            if isinstance(module, Optimized):
                changed.append((module, type(module), module.__dict__.pop(_STATE)))
                module.__class__ = module._normpass_plain_class  # type: ignore[assignment]
        plain = shared_copy(optimised)
    finally:
        for module, cls, state in changed:
            module.__class__ = cls
            module.__dict__[_STATE] = state
    for path, layer in part.replaced.items() if not keep_changes else ():
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


def optimise_in_place(
    model: nn.Module,
    options: Options,
    replaced: Mapping[str, nn.Module] | None = None,
    in_both_modes: bool = True,
) -> nn.Module:
    """Turn `model` (a copy that nobody else holds) into its optimised form.

    `replaced` has the layers that changes have replaced in it already. Without `in_both_modes` it is traced for the
    mode that it is in, train or eval, and for the other one when it is called in that.
    """
    replaced = dict(replaced or {})
    for change in options.changes:
        replaced.update(change.change_modules(model))
    decide(list(switchable_layers(model).values()))  # what has chosen is rewritten as what it chose
    parts = find_parts(model, also_without_norms=options.serialize is not None)
    for path, captured in parts.captures.items():
        module = model.get_submodule(path)
        parameters = parameters_of(module)
        names, defaults = [p.name for p in parameters], [p.default for p in parameters]
        positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        part = Part(options, path == "", names, defaults, positional, path)
        key = tuple(required_arguments(module).values())
        part.programs.append((key, build_program(captured, part)))
        _attach(module, part)
        if in_both_modes and any(name == "training" for _, name, _ in captured.guard.reads):
            _trace_other_mode(module, part, key)
    if "" not in parts.captures:
        _attach(model, Part(options, True, None))
    root: Part = model.__dict__[_STATE]
    root.untraceable, root.replaced, root.parts = parts.untraceable, replaced, tuple(parts.captures)
    return model


def _trace_other_mode(module: nn.Module, part: Part, key: tuple) -> None:
    """Trace for eval mode what was traced in train mode, or the reverse.

    Ahead of time, because under torch.compile nothing can be traced anew.
    """
    modes = [(m, m.training) for m in module.modules()]
    other = not module.training
    for m, _ in modes:
        m.training = other
    try:
        program = build_program(capture(module, dict(zip(part.names or [], key, strict=True))), part)
        part.programs.append((key, program))
    except CaptureError:
        pass  # tried again, with a warning, when it is called in that mode
    finally:
        for m, training in modes:
            m.training = training


def _attach(module: nn.Module, part: Part) -> None:
    module.__class__ = optimized_class(type(module))  # type: ignore[arg-type]
    module.__dict__[_STATE] = part


def build_program(captured: Capture, part: Part) -> Program:
    """The rewritten form of one captured graph of `part`."""
    options, decisions = part.options, part.options.decisions.below(part.path)
    for change in options.changes:
        change.change_graph(captured.graph, captured.root)
    passes.SPECIALISE.change_graph(captured.graph, captured.root)
    regions = _serialise(captured, part)
    plan = make_plan(find_sites(captured), passes.ORDER, options.allow_lossy, decisions)
    return replace(apply_plan(captured, plan, PASSES, decisions), regions=regions)


def _serialise(captured: Capture, part: Part) -> Any:
    """The regions that run sub-batch by sub-batch; None where nobody asked for them, or for other arguments."""
    options, graph = part.options, captured.graph
    arguments = sum(node.op == "placeholder" for node in graph.nodes)
    if options.serialize is None or not part.is_root or arguments != len(options.inputs):
        return None
    return options.serialize.apply(graph, captured.root, options.inputs)


# --- running --------------------------------------------------------------------------------------


def run(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """One forward of an optimised module."""
    part: Part = module.__dict__[_STATE]
    program, tensors = None, ()
    if part.names is not None and not any(global_hooks()):  # those want to see every layer
        key, tensors = _bind(part, args, kwargs)
        if key is not None:
            program = _program_for(module, part, key)
    forward: Callable = module._normpass_plain_class.forward
    if program is None:
        if part.options.changes and part.names is not None:
            raise StaleChangeError(_stale_message(module))
        body, arguments, named = forward, args, kwargs
    else:
        body, arguments, named = program.run, tensors, {}
    if torch.compiler.is_compiling():
        return _run_compiled(program, body, module, arguments, named)
    with recipe.recording():
        result = body(module, *arguments, **named)
    if not recipe.is_recording():
        recipe.untag(result)
    return result


def _bind(part: Part, args: tuple, kwargs: dict) -> tuple[tuple | None, tuple]:
    """The key of a call (each argument as `described`) and its tensors; None if it does not fit."""
    names, values = part.names or [], list(args)
    if len(args) > part.positional:
        return None, ()
    used = 0
    for name, default in zip(names[len(args) :], part.defaults[len(args) :], strict=True):
        values.append(kwargs.get(name, default))
        used += name in kwargs
    if used != len(kwargs):
        return None, ()
    key = tuple(described(value) for value in values)
    if None in key:
        return None, ()
    return key, tuple(t for value, what in zip(values, key, strict=True) for t in tensors_of(value, what))


def _program_for(module: nn.Module, part: Part, key: tuple) -> Program | None:
    for index, (known, program) in enumerate(part.programs):
        if known == key and program.guard.holds():
            if index and not torch.compiler.is_compiling():
                part.programs.insert(0, part.programs.pop(index))
            return program
    if torch.compiler.is_compiling():
        return None
    call = (key, module.training, torch.is_grad_enabled())
    return None if call in part.failures else _trace_anew(module, part, call)


def _trace_anew(module: nn.Module, part: Part, call: tuple[tuple, bool, bool]) -> Program | None:
    """Trace for a call that no program fits; None, remembered, where that fails.

    A warning only where gradients are on: without them nothing is kept, so nothing is lost.
    """
    key, _, with_gradients = call
    if len(part.programs) + len(part.failures) >= _MOST_PROGRAMS:
        if not part.is_exhausted:
            part.is_exhausted = True
            _warn(module, f"it was traced {_MOST_PROGRAMS} times for different flags or arguments")
        return None
    try:
        arguments = dict(zip(part.names or [], key, strict=True))
        program = build_program(capture(module, arguments), part)
    except CaptureError as error:
        part.failures.append(call)
        if with_gradients:
            _warn(module, str(error))
        return None
    part.programs.insert(0, (key, program))
    return program


def _warn(module: nn.Module, reason: str) -> None:
    name = module._normpass_plain_class.__name__
    warnings.warn(f"normpass: {name} runs unoptimised for this call: {reason}", stacklevel=7)


def _stale_message(module: nn.Module) -> str:
    return (
        f"{module._normpass_plain_class.__name__} was optimised with `changes=`, and this call cannot be traced, "
        "so its changed form cannot be run. Call it as it was called before, or optimise again."
    )


def _run_compiled(program: Program | None, body: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Under torch.compile saved-tensor hooks are not allowed; a selective checkpoint says what to run again."""
    if program is None or not torch.is_grad_enabled() or _runs_as_it_is(program.is_planned):
        return body(module, *args, **kwargs)
    context = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(body, module, *args, use_reentrant=False, context_fn=context)


def _runs_as_it_is(is_planned: bool) -> bool:
    """Whether the backend that Dynamo traces for runs the graph itself (`eager`), asked while it traces.

    There a checkpoint would be the one of eager mode, which refuses a region that moves running statistics. Warns
    where it was planned what is kept.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    backend = getattr(backend, "_torchdynamo_orig_backend", backend)
    options = getattr(backend, "kwargs", {}).get("options", {})
    runs_as_it_is = getattr(backend, "compiler_name", "") == "eager" or options.get("inner") == "eager"
    if runs_as_it_is and is_planned:
        warnings.warn(
            "normpass: the backend `eager` runs the graph as it is and keeps about what the plain model keeps, not "
            "what was planned: compile the planned model with `inductor` or `aot_eager`, or the plain one with "
            'backend="normpass"',
            stacklevel=2,
        )
    return runs_as_it_is


# What `torch.compiler.assume_constant_result` does, which would import Dynamo, for seconds, wherever nobody compiles.
_runs_as_it_is._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE if recipe.is_annotated() else CheckpointPolicy.MUST_SAVE


__all__ = [
    "Optimized",
    "Options",
    "Part",
    "Program",
    "join",
    "optimise_in_place",
    "part_of",
    "plain_copy",
    "shared_copy",
]
