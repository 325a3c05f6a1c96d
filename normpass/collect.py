"""The graphs of one forward, captured and rewritten, without leaving a trace on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normpass.copies.trial import Arguments, copied_inputs, trial, trial_copy
from normpass.optimized import optimize_in_place, state_of
from normpass.pipeline import Request, Rewritten


@dataclass
class Collected:
    """What one forward in train mode was made of."""

    graphs: list[Rewritten] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """why code was not captured, or a graph not rewritten"""


def captured_graphs(
    model: nn.Module,
    arguments: Arguments,
    request: Request,
    observer: Callable[[Rewritten, Sequence[Any]], None] | None = None,
) -> Collected:
    """Run a copy of `model`, optimized, on copies of `arguments` in train mode, and collect its graphs.

    `observer` is called with each graph and its inputs before it runs. Whatever the model raises is raised.
    """
    found = Collected()
    with trial(model), torch.enable_grad():
        optimized = optimize_in_place(trial_copy(model).train(), request)
        state = state_of(optimized)
        state.is_logging = False
        state.observers.append(lambda rewritten, inputs: found.graphs.append(rewritten))
        if observer is not None:
            state.observers.append(observer)
        args, kwargs = copied_inputs(arguments)
        optimized(*args, **kwargs)
    found.failures = [*state.plain_calls, *state.failures, *state.call.failures.values()]
    return found
