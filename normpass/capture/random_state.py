"""Random numbers while Dynamo captures: other threads may draw, and what they drew is not to come again.

Dynamo saves the states of torch's and Python's generators before it looks at a frame and puts them back afterwards,
for the whole process. Nothing draws in between: tensors have no memory, and every draw of Python's breaks the graph
(`normpass.capture.dynamo_limits`). So the states are left alone while a frame is captured for us. Dynamo's C++ puts
back that of Python's `random` once the callback has returned; that one call does nothing.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import torch

_lock = threading.Lock()
_ignored: dict[int, Any] = {}
"""thread -> the state that Dynamo is about to put back there"""


def ignore_next_restore(state: Any) -> None:
    """The next `random.setstate(state)` of this thread does nothing: to be called right before Dynamo makes it."""
    with _lock:
        _ignored[threading.get_ident()] = state
        if random.setstate is not _setstate:
            _setstate.original, random.setstate = random.setstate, _setstate  # type: ignore[attr-defined]


def ignore_no_more() -> None:
    """Where Dynamo has not made that call (older ones do it themselves), the next one is somebody else's."""
    if _ignored:
        with _lock:
            _ignored.pop(threading.get_ident(), None)
            _put_back()


def _put_back() -> None:
    if not _ignored and random.setstate is _setstate:
        random.setstate = _setstate.original  # type: ignore[attr-defined]


def _setstate(state: Any) -> None:
    with _lock:
        is_ignored = _ignored.pop(threading.get_ident(), None) == state
        original = _setstate.original  # type: ignore[attr-defined]
        _put_back()
    if not is_ignored:
        original(state)


class _Without:
    """A module with some attributes replaced."""

    def __init__(self, module: Any, **replaced: Any):
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _nothing(*args: object) -> None:
    """What stands for saving a state, and for putting it back."""


def without_restore() -> dict[str, Any]:
    """Modules for the file of Dynamo's that saves and puts back the states of their generators, without that."""
    without = {"get_rng_state": _nothing, "set_rng_state": _nothing}
    ours = _Without(torch, random=_Without(torch.random, **without), cuda=_Without(torch.cuda, **without))
    return {"torch": ours, "random": _Without(random, getstate=_nothing, setstate=_nothing)}
