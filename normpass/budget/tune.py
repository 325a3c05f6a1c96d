"""How long every result takes to be made once more, measured at the real shapes, on the real device.

The model runs one forward in train mode with all that can be rebuilt tagged; where a tag is put on, what would rebuild
the result is called a few times and the shortest time is taken. What was measured before, for the same layer with the
same shapes, is read from a file: one for each kind of device, thread count and torch version.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normpass.analysis.liveness import Seconds
from normpass.budget import cost
from normpass.collect import captured_graphs
from normpass.copies.trial import Arguments
from normpass.environment import device_name
from normpass.errors import InvalidInputError
from normpass.files import read_json, write_json
from normpass.graph.nodes import key_of
from normpass.measure.step_time import wait_for
from normpass.pipeline import Request, Rewritten
from normpass.recipe.notes import observed_tags, recording
from normpass.recipe.recipes import materialized

REPEATS = 3
_log = logging.getLogger(__name__)


class Timer:
    """Runs graphs node by node and times what would rebuild each tagged result."""

    def __init__(self, cache: dict[str, float]):
        self.seconds: dict[str, float] = {}
        """key of a step -> seconds"""
        self._cache, self._key = cache, ""

    def run(self, rewritten: Rewritten, inputs: Sequence[Any]) -> None:
        """Run a rewritten graph on copies of `inputs` and time what it notes."""
        copies = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs]
        with torch.enable_grad(), recording(), observed_tags(self.time):
            _Interpreter(self, rewritten.graph_module).run(*copies)

    def at(self, key: str) -> None:
        """The node that runs now."""
        self._key = key

    def time(self, function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Called for every tag."""
        args, kwargs = materialized(args), materialized(kwargs)
        signature = _signature(function, args, kwargs)
        if signature not in self._cache:
            self._cache[signature] = _shortest(function, args, kwargs)
        self.seconds[self._key] = self._cache[signature]


class _Interpreter(fx.Interpreter):
    def __init__(self, timer: Timer, graph_module: fx.GraphModule):
        super().__init__(graph_module)
        self._timer = timer

    def run_node(self, n: fx.Node) -> Any:
        self._timer.at(key_of(n))
        return super().run_node(n)


def measured_seconds(
    model: nn.Module, arguments: Arguments, request: Request, graphs: Sequence[Rewritten], folder: Path | None = None
) -> Seconds:
    """Seconds of a step, measured where it can be rebuilt; nothing of the model changes."""
    found = measured(model, arguments, _all_rebuilt(request, graphs), folder or cache_folder())
    return lambda step, facts: found[step.key] if step.key in found else cost.seconds(step, facts)


def _all_rebuilt(request: Request, graphs: Sequence[Rewritten]) -> Request:
    keys = {
        g.found.facts.steps[g.found.maker[v]].key
        for g in graphs
        if g.found is not None
        for v in g.found.cheap | g.found.dear
    }
    return replace(request, decisions=replace(request.decisions, rebuilt=frozenset(keys)))


def measured(model: nn.Module, arguments: Arguments, request: Request, folder: Path | None) -> dict[str, float]:
    """Seconds by key of whatever notes a recipe while the model runs as `request` says."""
    path = None if folder is None else folder / f"{_device_name(model)}.json"
    cache = _read(path)
    timer = Timer(cache)
    captured_graphs(model, arguments, request, timer.run)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, dict(sorted(cache.items())))
        except OSError as error:
            _log.info("the measurements are not kept for the next time: %s", error)
    return timer.seconds


def cache_folder() -> Path:
    """Where measurements are kept between runs."""
    return Path.home() / ".cache" / "normpass" / "tune"


def _read(path: Path | None) -> dict[str, float]:
    try:
        found = {} if path is None else read_json(path, "tune")
    except InvalidInputError:
        return {}  # none yet, or one that is broken: measured anew
    found = found if isinstance(found, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, float) and 0 < v < math.inf}


def _device_name(model: nn.Module) -> str:
    """A file's name for the device that the model is on, its threads and torch's version."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    return re.sub(r"\W+", "_", f"{device_name(kind)} torch {torch.__version__}")


def _signature(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The same for calls that take the same time: the layer, shapes, strides, dtypes and constants."""
    parts = [getattr(function, "__qualname__", repr(function))]
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        parts.append(f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _shortest(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float:
    device = next((t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    times = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            wait_for(device)
            start = time.perf_counter()
            function(*args, **kwargs)
            wait_for(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])
