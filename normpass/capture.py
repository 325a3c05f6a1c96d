"""A module's forward as graphs: TorchDynamo captures it, our backend gets each graph.

    call = captured(forward, backend)       call(module, *args) runs forward with its graphs replaced

Everything that Python does around the tensors is Dynamo's: attributes, globals, closures, hooks, branches, side effects,
exceptions. What is ours:

  * each captured function has a code object of its own, so that models of one class do not share a cache;
  * limits on the number of captures are lifted for our frames: a size or a number that changes must not end the saving;
  * where a frame cannot be captured, Python runs it and raises what it raises. A frame that failed, and then ran, is
    left to Python for good; the frames below it are captured on their own;
  * what Dynamo gets wrong is kept from it (`normpass.dynamo_limits`).

Whoever else looks on (an exporter, a tracer, a transform, a mode, somebody's saved-tensor hooks) is to see the plain
forward: `reason_to_run_plain`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from normpass.errors import NormpassError
from normpass.graph import global_hooks
from normpass.ops.eager import is_only_default_device, under_other_derivatives
from normpass.ops.library import is_exporting

_log = logging.getLogger(__name__)
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_traced = torch._C._is_tracing

MOST_CAPTURES = 512
"""of one piece of code"""


def reason_to_run_plain(args: tuple, kwargs: dict) -> str | None:
    """Who looks on and is to see the plain forward; None for nobody. Costs about two microseconds."""
    if is_exporting() or _is_traced() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return "it is being exported or traced"
    if _dispatch_modes() or (_function_modes() and not is_only_default_device()):
        return "a torch mode is active"
    if under_other_derivatives():
        return "a torch.func transform or forward-mode differentiation is active"
    if any(global_hooks()):
        return "hooks are registered for all modules"
    if torch.is_grad_enabled() and (_top_hooks(False) is not None or not _hooks_enabled()):
        return "saved-tensor hooks of somebody else are active (checkpoint, offloading)"
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
        frames = self._frames
        if frames is None or not frames.failed:
            return call(*args, **kwargs)
        return self._call_after_failure(call, frames, args, kwargs)

    @property
    def failures(self) -> dict[Any, str]:
        """Code that was not captured -> why."""
        return {} if self._frames is None else dict(self._frames.failed)

    def _begin(self) -> Callable[..., Any]:
        forward = self._forward

        def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        forward_of.__code__ = forward_of.__code__.replace()  # Dynamo's cache hangs at the code
        context: Any = torch._dynamo.optimize(self._backend)
        if hasattr(context, "callback"):  # not where TORCHDYNAMO_DISABLE is set
            self._frames = _Frames(context.callback)
            context.callback = self._frames
        self._call = context(forward_of)
        return self._call

    def _call_after_failure(self, call: Callable, frames: _Frames, args: tuple, kwargs: dict) -> Any:
        """A frame could not be captured before. If Python raises in it, then that was why."""
        try:
            return call(*args, **kwargs)
        except Exception:
            frames.failed.clear()
            raise


class _Frames:
    """Dynamo's callback for frames that are run for the first time, or whose guards fail."""

    def __init__(self, inner: Any):
        self._inner = self._torchdynamo_orig_backend = inner
        self.failed: dict[Any, str] = {}
        """code that could not be captured -> why"""

    def __call__(self, frame: Any, *others: Any) -> Any:
        from torch._dynamo.types import ConvertFrameReturn

        if frame.f_code in self.failed:
            return ConvertFrameReturn()  # it ran: Python has it from now on, what it calls is captured on its own
        try:
            with _limits():
                return self._inner(frame, *others)
        except Exception as error:
            ours = getattr(error, "inner_exception", None)  # of our backend
            if isinstance(ours, NormpassError):
                raise ours from None
            if _raises and ours is not None:
                raise
            self.failed[frame.f_code] = f"{type(error).__name__}: {_first_line(error)}"
            _log.info("%s is not captured: %s", frame.f_code.co_qualname, self.failed[frame.f_code])
            return _python_once()


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
