"""A module's forward as graphs: TorchDynamo captures it, our backend gets each graph.

    call = captured(forward, backend)       call(module, *args) runs forward with its graphs replaced

Everything that Python does around the tensors is Dynamo's: attributes, globals, closures, hooks, branches, side
effects, exceptions. What is ours:

  * each captured function has a code object and a name of its own: models of one class share no cache, and a size
    that changes for one of them is no less fixed for the next;
  * limits on the number of captures are lifted for our frames: a size or a number that changes must not end the saving;
  * where a frame cannot be captured, Python runs it and raises what it raises. A frame that failed, and then ran, is
    left to Python for good; the frames below it are captured on their own;
  * what Dynamo gets wrong is kept from it (`normpass.capture.dynamo_limits`).

Whoever else looks on (an exporter, a tracer, a transform, a mode, somebody's saved-tensor hooks) is to see the plain
forward: `reason_to_run_plain`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from normpass.capture.random_state import ignore_next_restore, ignore_no_more
from normpass.errors import NormpassError
from normpass.graph.nodes import global_hooks
from normpass.onlookers import dispatch_modes, has_function_modes, is_exporting, is_traced, under_other_derivatives

_log = logging.getLogger(__name__)
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_compiler_of_frames = torch._C._dynamo.eval_frame.get_eval_frame_callback

_numbers = itertools.count(1)

OTHER_HOOKS = "saved-tensor hooks of somebody else are active (checkpoint, offloading)"
MOST_CAPTURES = 512
"""of one piece of code"""


def reason_to_run_plain(args: tuple, kwargs: dict) -> str | None:
    """Who looks on and is to see the plain forward; None for nobody. Costs about two microseconds."""
    if is_exporting() or is_traced() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return "it is being exported or traced"
    if dispatch_modes() or has_function_modes():
        return "a torch mode is active"
    if under_other_derivatives():
        return "a torch.func transform or forward-mode differentiation is active"
    if any(global_hooks()):
        return "hooks are registered for all modules"
    if _compiler_of_frames():
        return "somebody else's torch.compile sees it"  # in a frame that it has left to Python
    if torch.is_grad_enabled() and (_top_hooks(False) is not None or not _hooks_enabled()):
        return OTHER_HOOKS
    for value in (*args, *kwargs.values()):
        if isinstance(value, (FakeTensor, fx.Proxy)):
            return "it is called with tensors that have no values"
    return None


class Captured:
    """`forward(module, …)` run through Dynamo with a backend of our own."""

    def __init__(self, forward: Callable[..., Any], backend: Callable[..., Any]):
        self._forward, self._backend = forward, backend
        self._call: Callable[..., Any] | None = None
        self._frames: _Frames | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            call = self._begin()
        try:
            result = call(*args, **kwargs)
        except Exception:  # perhaps all that was wrong with the frames that could not be captured
            if self._frames is not None:
                self._frames.forget()
            raise
        finally:
            ignore_no_more()
        if self._frames is not None and self._frames.unsaid:
            self._frames.say()
        return result

    @property
    def failures(self) -> dict[Any, str]:
        """Code that was not captured -> why."""
        return {} if self._frames is None else dict(self._frames.failed)

    @property
    def is_off(self) -> bool:
        """Whether Dynamo is switched off, so that Python runs forward as it is."""
        if self._call is None:
            self._begin()
        return self._frames is None or torch._dynamo.eval_frame._stance.stance == "force_eager"

    def _begin(self) -> Callable[..., Any]:
        forward = self._forward

        def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        # Dynamo's cache hangs at the code object; which sizes and numbers change it remembers by the code's name.
        forward_of.__code__ = forward_of.__code__.replace(co_name=f"forward_of_{next(_numbers)}")
        context: Any = torch._dynamo.optimize(self._backend)
        if hasattr(context, "callback"):  # not where TORCHDYNAMO_DISABLE is set
            self._frames = _Frames(context.callback)
            context.callback = self._frames
        self._call = context(forward_of)
        return self._call


class _Frames:
    """Dynamo's callback for frames that are run for the first time, or whose guards fail."""

    def __init__(self, inner: Any):
        self._inner = self._torchdynamo_orig_backend = inner
        self.failed: dict[Any, str] = {}
        """code that could not be captured -> why"""
        self.unsaid: list[str] = []
        """what is to be said of that, once the call that met it has not raised"""
        self._said: set[str] = set()
        self._given_up: set[Any] = set()
        """frames that Dynamo leaves to Python"""

    def __call__(self, frame: Any, *others: Any) -> Any:
        state = random.getstate()
        found = self._look_at(frame, *others)
        ignore_next_restore(state)
        return found

    def _look_at(self, frame: Any, *others: Any) -> Any:
        from torch._dynamo.types import ConvertFrameReturn

        key, is_shared = _key(frame), frame.f_code is _SEQUENTIAL
        if key in self.failed or key in self._given_up:
            # It ran: Python has it from now on, what it calls is captured on its own.
            return ConvertFrameReturn(apply_to_code=not is_shared)
        try:
            with _limits(), _without_mistakes(), _not_skipping_sequentials(), _without_grad_warning(), _quietly():
                found = self._inner(frame, *others)
        except Exception as error:
            ours = getattr(error, "inner_exception", None)  # of our backend
            if isinstance(ours, NormpassError):
                raise ours from None
            if _raises and ours is not None:
                raise
            self.failed[key] = f"{type(error).__name__}: {_first_line(error)}"
            self.unsaid.append(f"{frame.f_code.co_qualname} is not captured: {self.failed[key]}")
            return _python_once()
        if found.guarded_code is not None or not found.apply_to_code or _is_skipped(frame.f_code):
            return found
        self._given_up.add(key)
        return ConvertFrameReturn(frame_exec_strategy=found.frame_exec_strategy, apply_to_code=False)

    def say(self) -> None:
        """Log what was not captured, each once."""
        for line in self.unsaid:
            if line not in self._said:
                _log.warning("normpass: %s; it runs as it is", line)
        self._said.update(self.unsaid)
        self.unsaid.clear()

    def forget(self) -> None:
        """Try again what could not be captured."""
        self.unsaid.clear()
        self.failed.clear()
        self._given_up.clear()


_SEQUENTIAL = nn.Sequential.forward.__code__


def _key(frame: Any) -> Any:
    """The code that runs; of a Sequential, whose code they all share, the module as well."""
    return (_SEQUENTIAL, id(frame.f_locals["self"])) if frame.f_code is _SEQUENTIAL else frame.f_code


def _is_skipped(code: Any) -> bool:
    """Whether Dynamo leaves this code to Python without a look."""
    from torch._dynamo import trace_rules

    return code is not _SEQUENTIAL and bool(trace_rules.check(code))


def _not_skipping_sequentials() -> contextlib.AbstractContextManager:
    """Dynamo leaves frames of torch's own code to Python: a Sequential whose caller cannot be captured, too."""
    from torch._dynamo import trace_rules

    skips = trace_rules.check

    def check(found: Any, *args: Any, **kwargs: Any) -> bool:
        return found is not _SEQUENTIAL and skips(found, *args, **kwargs)

    return mock.patch.object(trace_rules, "check", check)


def _python_once() -> Any:
    """This frame and what it calls are run by Python, this time."""
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy

    skip = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    return ConvertFrameReturn(frame_exec_strategy=skip, apply_to_code=False)


def _limits() -> contextlib.AbstractContextManager:
    return torch._dynamo.config.patch(
        recompile_limit=MOST_CAPTURES,
        accumulated_recompile_limit=64 * MOST_CAPTURES,
        optimize_ddp=False,  # it would cut the graph at its buckets, for a compiler
    )


@contextlib.contextmanager
def _without_grad_warning() -> Iterator[None]:
    """Dynamo reads `.grad` of every input; where warnings are errors, torch's about that would end the capture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Dynamo's warnings of graph breaks, which nobody asked about, and of errors, which plain's forward raises.

    `explain` has the former.
    """
    quiet = {"torch._dynamo": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    logs = [(logging.getLogger(name), level) for name, level in quiet.items()]
    levels = [log.level for log, _ in logs]
    for log, level in logs:
        if log.getEffectiveLevel() >= logging.WARNING:
            log.setLevel(level)
    try:
        yield
    finally:
        for (log, _), level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _without_mistakes() -> contextlib.AbstractContextManager:
    from normpass.capture.dynamo_limits import (
        capturing,  # here: an import of torch._dynamo takes as long as one of torch
    )

    return capturing()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


_raises = False


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside, what goes wrong while a graph is rewritten is raised: for tests."""
    global _raises
    before, _raises = _raises, True
    try:
        yield
    finally:
        _raises = before


def is_raising() -> bool:
    return _raises


__all__ = ["Captured", "is_raising", "raising", "reason_to_run_plain"]
