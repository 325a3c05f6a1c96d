"""What forward finds and TorchDynamo reads once, without a guard: the state of a generator, the bound of a deque, …

    next(generator made elsewhere)  ⇒  Python runs it          deque(maxlen=n)  ⇒  bounded, guarded
    x.is_leaf, x.grad_fn is None    ⇒  guarded                 vars(config)     ⇒  guarded

Dynamo traces a copy of a generator that has not begun, and never advances the one there is: every call begins anew. It
drops the bound of a deque, which then grows without end while it is traced. And it compares much of a tensor, but not
where it comes from: a leaf and the result of an operator share a graph that has asked which of them it is. Of an
object's `__dict__` it compares what is read, not which names there are.
"""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.variables import builder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable, DequeVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedClassVariable, UserDefinedObjectVariable

Reads = dict[str, Callable[[Any], Any]]
"""name of an attribute -> what of it is to stay as it is"""
_GETATTR = "tp_getattro_impl" if "tp_getattro_impl" in vars(TensorVariable) else "var_getattr"  # the latter: torch 2.11
_HISTORY: Reads = {
    "is_leaf": lambda tensor: tensor.is_leaf,
    "grad_fn": lambda tensor: tensor.grad_fn is None,
    "_base": lambda tensor: tensor._base is None,
}
_NAMES: Reads = {"__dict__": lambda holder: list(vars(holder))}


def replaced() -> tuple[tuple[Any, str, Any], ...]:
    """What is replaced in Dynamo while it captures for us."""
    return (
        (builder, "inspect", _NothingBegins()),
        (BaseListVariable, "cls_for_instance", staticmethod(_bounded(BaseListVariable.cls_for_instance))),
        (GuardBuilder, "SEQUENCE_LENGTH", _with_bound(GuardBuilder.SEQUENCE_LENGTH)),
        (TensorVariable, _GETATTR, _guarding(_HISTORY, TensorVariable)),
        (UserDefinedObjectVariable, _GETATTR, _guarding(_NAMES, UserDefinedObjectVariable)),
        (UserDefinedClassVariable, _GETATTR, _guarding(_NAMES, UserDefinedClassVariable)),
    )


class _NothingBegins:
    """The module `inspect`, to which every generator has begun: those Dynamo leaves to Python."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def getgeneratorstate(generator: Any) -> str:
        return inspect.GEN_SUSPENDED


def _bounded(class_for: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def class_of(value: Any) -> Any:
        if type(value) is not collections.deque or value.maxlen is None:
            return class_for(value)
        return functools.partial(DequeVariable, maxlen=ConstantVariable.create(value.maxlen))

    return class_of


def _with_bound(original: Callable[..., None]) -> Callable[..., None]:
    def sequence_length(self: Any, guard: Any, *args: Any, **kwargs: Any) -> None:
        original(self, guard, *args, **kwargs)
        if type(self.get(guard)) is collections.deque:
            keep(self, guard, "maxlen", lambda deque: deque.maxlen)

    return sequence_length


def _guarding(reads: Reads, variable: Any) -> Callable[..., Any]:
    original = getattr(variable, _GETATTR)
    guards = {name: _guard_of(name, read) for name, read in reads.items()}

    def getattribute(self: Any, tx: Any, name: Any) -> Any:
        named = name if isinstance(name, str) else name.as_python_constant()
        if named in guards and self.source is not None:
            install_guard(self.source.make_guard(guards[named]))
        return original(self, tx, name)

    return getattribute


def keep(guards: Any, guard: Any, name: str, read: Callable[[Any], Any]) -> None:
    """Guard that `read` gives what it gives now."""
    now = read(guards.get(guard))
    words = [f"{name}: {now!r}"]
    guards.get_guard_manager(guard).add_lambda_guard(lambda value: read(value) == now, words, guard.user_stack)


def _guard_of(name: str, read: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    def unchanged(guards: Any, guard: Any) -> None:
        keep(guards, guard, name, read)

    return unchanged


__all__ = ["keep", "replaced"]
