"""What TorchDynamo itself gets wrong, without a word, and what is done about it while it captures for us.

    capturing(): Dynamo traces, but does not guess ──► a guard, or a graph break where no guard can tell

Each was seen with `torch.compile(model, backend="eager")` (torch 2.11 to 2.14), each has a test:

- draws of Python's `random`: a `random.Random()` is frozen, `random.seed`, `random.sample` and draws in a generator
  expression are wrong or raise. Every draw breaks the graph. (torch's generators are right.)
- what functions of the standard library read from their modules has no guard: `os.getenv` is frozen. Guarded.
- `d[key]` that raises KeyError has no guard on the key: `try: d[key] except KeyError:` and ChainMap never see the key
  that comes later. Guarded.
- guards compare with ==, so 0.0 is -0.0, (True,) is (1,) and (1.0,). Guarded by class and sign.
- `torch.jit.isinstance(x, Tensor)`, as MONAI has it, breaks the graph, though it is `isinstance`. Not any more.
- `functools.lru_cache`, of methods as well, is traced through as if it did not cache. The call breaks the graph (not in
  torch and einops).
- a hook that is registered after the first call is not called. Guarded, by a setting of Dynamo's.
- a batch norm with a cumulative average makes a number of its counter, which breaks the graph. One node.
- random numbers that other threads draw meanwhile come again (`normpass.capture.random_state`).
- `torch.compiler.is_compiling()` is true: a model then takes a branch that it does not take without us. False in the
  user's code, true in torch's and ours.
- `torch.utils.checkpoint` with `use_reentrant=True`, the default, runs as with False: parameters have gradients where
  no input has one, a nested region runs (and moves running statistics) once less. The call breaks the graph.
- NumPy is torch in disguise (`normpass.capture.dynamo_numpy`).
- generators and bounded deques that forward finds, `is_leaf`, `grad_fn is None`, `vars()`
  (`normpass.capture.dynamo_found`).
- each graph's guards are timed for a line in a log, with the processor's caches flushed before: some 25 ms of each
  capture. Not timed.

Dynamo's methods are replaced for as long as one frame is captured, under Dynamo's own lock: nobody else's frames
are touched. A method that is gone raises AttributeError.

Not mended, all of them changes between two calls: a method, operator or attribute put on a class of the user's that
is not an `nn.Module`, or `forward` on one of torch's; `OrderedDict.move_to_end`, dict and set entries replaced by equal
ones of another type; a module global that shadows a builtin; another object under the name in `sys.modules` of an
`import` in forward; `is` between numbers; `torch.set_autocast_dtype` outside autocast. Objects with a
`__getattribute__` of their own raise InternalTorchDynamoError. torch 2.11 has no guards on class attributes, on
defaults of functions, on `requires_grad` of a parameter not computed with, and loses what a `Counter` counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
from torch._decomp import decompositions
from torch._dynamo import config, convert_frame, exc, guards, symbolic_convert
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import builder
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.functions import SkipFunctionVariable, UserFunctionVariable, WrapperUserMethodVariable
from torch._dynamo.variables.higher_order_ops import CheckpointHigherOrderVariable
from torch._dynamo.variables.misc import RandomClassVariable, RandomVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

from normpass.capture import cumulative_norm as cumulative
from normpass.capture import dynamo_found, dynamo_numpy, fake_norm
from normpass.capture.random_state import without_restore

_COMPILING = (
    *(torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling),
    *(torch._dynamo.is_compiling, torch._utils.is_compiling),  # older names
)
_KNOW_OF_COMPILING = ("torch", "normpass")
_OLDER_NAMES = ("torch._dynamo.external_utils", "torch._utils")  # frames of their own where a break precedes them
_PURE_CACHES = ("torch", "einops")


@contextmanager
def capturing() -> Iterator[None]:
    """Put this around each call of Dynamo's own frame callback."""
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (torch._dynamo.utils, "warn_once", lambda *args, **kwargs: None),  # of breaks that nobody asked about
        (symbolic_convert, "is_stdlib", lambda module: False),
        *((convert_frame, name, found) for name, found in without_restore().items() if hasattr(convert_frame, name)),
        (InstructionTranslatorBase, "inline_user_function_return", _with_cumulative(InstructionTranslatorBase)),
        (RandomVariable, "is_supported_random_obj", staticmethod(lambda value: False)),
        (UserDefinedObjectVariable, "_supported_random_functions", staticmethod(frozenset)),
        (RandomClassVariable, "call_function", _break_at_a_new_generator),
        (builder, "is_lru_cache_wrapped_function", _only_pure(builder.is_lru_cache_wrapped_function)),
        (WrapperUserMethodVariable, "call_function", _breaking_where_cached(WrapperUserMethodVariable)),
        (ConstDictVariable, "getitem_const_raise_exception_if_absent", _guarding_absence(ConstDictVariable)),
        (GuardBuilder, "EQUALS_MATCH", _exactly(GuardBuilder.EQUALS_MATCH)),
        (SkipFunctionVariable, "call_function", _with_isinstance(SkipFunctionVariable.call_function)),
        (TorchInGraphFunctionVariable, "call_function", _as_plain(TorchInGraphFunctionVariable.call_function)),
        *dynamo_numpy.replaced(),
        *dynamo_found.replaced(),
        (CheckpointHigherOrderVariable, "_call_function", _breaking_where_reentrant(CheckpointHigherOrderVariable)),
        (guards, "profile_guard_manager", lambda *args: 0.0),
        (decompositions, fake_norm.NAME, fake_norm.quick_batch_norm()),
    )
    with (
        convert_frame.compile_lock,
        config.patch({"skip_nnmodule_hook_guards": False, **dynamo_numpy.SETTINGS}),
        ExitStack() as stack,
    ):
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _break_at_a_new_generator(self: Any, tx: Any, args: Any, kwargs: Any) -> NoReturn:
    exc.unimplemented(
        gb_type="random.Random() in forward",
        context="",
        explanation="Dynamo would seed it once, while it traces, and use that at every call",
        hints=[],
    )


def _with_cumulative(translator: Any) -> Callable[..., Any]:
    original = translator.inline_user_function_return

    def inline(self: Any, fn: Any, *args: Any, **options: Any) -> Any:
        if getattr(fn, "fn", None) is cumulative.plain_forward and self.f_code is not cumulative.forward.__code__:
            fn = UserFunctionVariable(cumulative.forward)  # type: ignore[arg-type]
        return original(self, fn, *args, **options)

    return inline


def _with_isinstance(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        asks = self.value is torch.jit.isinstance and len(args) == 2 and args[1].is_python_constant()
        if asks and isinstance(args[1].as_python_constant(), type):
            return BuiltinVariable(isinstance).call_function(tx, args, kwargs)
        return original(self, tx, args, kwargs)

    return call_function


def _only_pure(is_cached: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether Dynamo may call what is behind the cache instead; else it leaves the call to Python."""

    def is_cached_and_pure(function: Any) -> bool:
        return is_cached(function) and _package(getattr(function, "__module__", None)) in _PURE_CACHES

    return is_cached_and_pure


def _breaking_where_cached(method: Any) -> Callable[..., Any]:
    original = method.call_function

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = getattr(self, "wrapper_obj", None) or self.fn.wrapper_obj  # torch 2.15 has it in another variable
        if isinstance(function, functools._lru_cache_wrapper) and _package(function.__module__) not in _PURE_CACHES:
            exc.unimplemented(
                gb_type="a method with a functools.lru_cache",
                context=function.__qualname__,
                explanation="Dynamo would run it at every call",
                hints=[],
            )
        return original(self, tx, args, kwargs)

    return call_function


def _guarding_absence(cls: Any) -> Callable[..., Any]:
    original = cls.getitem_const_raise_exception_if_absent

    def getitem(self: Any, tx: Any, key: Any) -> Any:
        if key not in self:
            self.install_dict_contains_guard(tx, [key])
        return original(self, tx, key)

    return getitem


def _breaking_where_reentrant(checkpoint: Any) -> Callable[..., Any]:
    original = checkpoint._call_function

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        reentrant = kwargs.get("use_reentrant")
        if reentrant is None or not reentrant.is_python_constant() or reentrant.as_python_constant() is not False:
            exc.unimplemented(
                gb_type="torch.utils.checkpoint with use_reentrant=True",
                context="",
                explanation="Dynamo would run it as with use_reentrant=False, which has other gradients",
                hints=[],
            )
        return original(self, tx, args, kwargs)

    return call


def _as_plain(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        asking = tx.f_globals.get("__name__")
        if self.value in _COMPILING and (asking in _OLDER_NAMES or _package(asking) not in _KNOW_OF_COMPILING):
            return ConstantVariable.create(False)
        return original(self, tx, args, kwargs)

    return call_function


def _package(name: str | None) -> str:
    return (name or "").partition(".")[0]


def _exactly(original: Callable[..., None]) -> Callable[..., None]:
    """A guard on equality that also compares classes and signs, where == does not."""

    def equals_match(self: Any, guard: Any, *args: Any, **kwargs: Any) -> None:
        original(self, guard, *args, **kwargs)
        if _has_another_equal(self.get(guard)):
            dynamo_found.keep(self, guard, "exactly", _written)

    return equals_match


def _has_another_equal(value: Any) -> bool:
    """Whether something else can be == `value`, its class aside, which has a guard where it is a scalar."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(isinstance(item, (int, float, complex)) or _has_another_equal(item) for item in value)
    if isinstance(value, complex):
        return value.real == 0 or value.imag == 0
    return isinstance(value, float) and value == 0


def _written(value: Any) -> Any:
    """What differs where two values are equal but not the same."""
    if isinstance(value, (tuple, list)):
        return type(value), [_written(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    return type(value), repr(value)
