"""Kept bytes, peak bytes and step time: the one definition used by the report, the benchmarks and the tests.

*Kept* is what one forward leaves allocated for its backward. It is read from the allocator, not from
saved-tensor hooks: hooks see only what autograd saves, and they would switch off the very recipes that
are to be measured. So caches, recipes and buffers of compiled code all count.

On the CPU the figures come from the memory events of torch's profiler. They are read through the legacy
entry points, which torch 2.11 to 2.15 have and which, unlike the newer front end, write nothing to stderr.
On CUDA they come from the caching allocator. Memory that a library takes past torch's allocator (packed
weights of a vendor's convolution, a thread's scratch) is in neither.

Nothing here changes the model: see `untouched`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy
from torch.utils._pytree import tree_leaves

from normpass.untouched import leaves_of, storage_key, tensors_in, undone, untouched

Loss = Callable[..., Tensor]

_FORWARD_END = "normpass: forward end"
_CUDA_BLOCK = 512  # torch's CUDA allocator rounds every request up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Memory along one training step, relative to its start."""

    seconds: tuple[float, ...]
    """When each allocation or release happened, since the start of the step; never decreases."""
    bytes: tuple[int, ...]
    """Bytes allocated above the start, after each event; the first entry is 0."""
    forward_end: int
    """Index of the last event of the forward pass (the loss comes after it)."""

    @property
    def peak(self) -> int:
        """The highest memory of the step, in bytes above its start."""
        return max(self.bytes)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: median, lower and upper quartile, and every round's time in order."""

    median: float
    low: float
    high: float
    times: tuple[float, ...]

    @classmethod
    def of(cls, times: Sequence[float]) -> StepTime:
        """What the rounds' times, at least one, amount to."""
        return cls(*_quartiles(times), tuple(times))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time relative to a base, round by round: median, lower and upper quartile."""

    median: float
    low: float
    high: float


def kept_bytes(model: nn.Module, *inputs: object, **kwargs: object) -> int:
    """Bytes that `model(*inputs, **kwargs)` in its current mode leaves allocated for backward.

    The storages of the output are not counted, nor is what existed before the call (inputs, parameters,
    buffers). A first step warms up caches and compilation; the second forward is measured.

    Everything else counts, activation or not: the weights that autocast casts, and the copies of weights that
    compiled code makes and keeps. Inductor on the CPU runs convolutions channels_last and keeps the weights
    in that layout, for ResNet-50 43.2 MiB whatever the batch; a model that is channels_last already has none.

    Raises:
        ValueError: gradients are off (then nothing is kept, and the 0 would mislead), or the model is on a
            device other than the CPU or CUDA.
    """
    device = _checked_device(model, inputs, kwargs)
    forward = partial(_forward, model, inputs, kwargs)
    with untouched(model, inputs, kwargs):
        _warm_up(forward())
        before = _existing(model, inputs, kwargs)  # kept alive, so that what replaces them counts in full
        growth, output = _growth(forward, device)
        known = {storage_key(tensor) for tensor in before}
        own = {storage_key(tensor): tensor for tensor in tensors_in(output) if storage_key(tensor) not in known}
        return growth - sum(_allocated(tensor, device) for tensor in own.values())


def kept_by_layer(model: nn.Module, *inputs: object) -> dict[str, int]:
    """Kept bytes by the dotted name of the innermost module that was running ("" is the model itself).

    For attribution in a plain eager model only: it looks at distinct storages through saved-tensor hooks,
    which change what a rewritten or compiled model keeps. `kept_bytes` is the figure to quote. Parameters,
    buffers, inputs and outputs are left out, so for a plain model the sum equals `kept_bytes`. A storage
    that several layers save belongs to the first.

    Raises:
        ValueError: as for `kept_bytes`.
    """
    _checked_device(model, inputs)
    running = [""]
    saved: list[tuple[weakref.ref[Tensor], str]] = []  # a reference dies with its part of the graph

    def pack(tensor: Tensor) -> Tensor:
        held = tensor.detach()
        saved.append((weakref.ref(held), running[-1]))
        return held

    with untouched(model, inputs), _names_of_running(model, running):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            output = _forward(model, inputs, {})
        seen = {storage_key(tensor) for tensor in [*_existing(model, inputs), *tensors_in(output)]}
        kept: dict[str, int] = {}
        for reference, layer in saved:
            tensor = reference()
            if tensor is not None and storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                kept[layer] = kept.get(layer, 0) + tensor.untyped_storage().nbytes()
    return kept


def peak_bytes(
    model: nn.Module,
    *inputs: object,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **kwargs: object,
) -> int:
    """The highest memory in bytes above the start, over one training step of a warm model.

    The step is `model(*inputs, **kwargs)`, `loss(output)` (by default the mean square, summed over the
    floating outputs), backward and, if given, `optimizer.step()`. Parameters, gradients and the optimizer's
    state exist before it starts, so they do not count; temporaries on the way to them do.

    Raises:
        ValueError: gradients are off, no output depends on anything that requires one, or the device is
            neither the CPU nor CUDA.
        TypeError: `loss` returned something other than one number in a tensor.
    """
    device = _checked_device(model, inputs, kwargs)
    if device.type == "cpu":
        return _timeline(model, inputs, kwargs, loss, optimizer).peak
    with _warm_step(model, inputs, kwargs, loss, optimizer) as step:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start


def forward_peak_bytes(model: nn.Module, *inputs: object, **kwargs: object) -> int:
    """The highest memory in bytes above the start, over one warm forward in the current mode, its output included.

    Under `no_grad` nothing is kept for backward, so this is the peak beyond parameters and kept tensors; with
    gradients kept tensors count.

    Raises:
        ValueError: the device is neither the CPU nor CUDA.
    """
    with torch.enable_grad():
        device = _checked_device(model, inputs, kwargs)
    forward = partial(_forward, model, inputs, kwargs)
    with untouched(model, inputs, kwargs):
        forward()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            start = torch.cuda.memory_allocated(device)
            forward()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - start
        with _recorded() as events:
            forward()
    return max(itertools.accumulate((change or 0 for _, change in events), initial=0))


def memory_timeline(model: nn.Module, *inputs: object, loss: Loss | None = None, **kwargs: object) -> Timeline:
    """Memory along one training step on the CPU; its `peak` is `peak_bytes`.

    Raises:
        ValueError: as for `peak_bytes`, and on CUDA, where the allocator reports only the peak.
        TypeError: as for `peak_bytes`.
    """
    device = _checked_device(model, inputs, kwargs)
    if device.type != "cpu":
        raise ValueError(f"memory_timeline needs a model on the CPU, not on `{device}`; use peak_bytes there")
    return _timeline(model, inputs, kwargs, loss, None)


def step_time(
    models: Mapping[str, nn.Module],
    *inputs: object,
    rounds: int = 10,
    loss: Loss | None = None,
    warmup: int = 2,
    around: Mapping[str, Callable[[], contextlib.AbstractContextManager[object]]] | None = None,
) -> dict[str, StepTime]:
    """Seconds of forward, loss and backward for each model, measured side by side.

    Every round runs each model once, in an order that rotates from round to round, so that slow drifts of
    the machine fall on all of them; compare with `ratios`. Every step starts without gradients, and inside the
    context that `around` has for its model.

    Raises:
        ValueError: no models, `rounds` < 1, `warmup` < 0, or as for `peak_bytes`.
        TypeError: as for `peak_bytes`.
    """
    if not models or rounds < 1 or warmup < 0:
        raise ValueError(f"needs models, `rounds` >= 1 and `warmup` >= 0, not {rounds} and {warmup}")
    devices = {name: _checked_device(model, inputs) for name, model in models.items()}
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(untouched(model, inputs))
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with (around or {}).get(name, contextlib.nullcontext)():
                    seconds = _seconds(models[name], inputs, loss, devices[name])
                if turn >= 0:
                    times[name].append(seconds)
    return {name: StepTime.of(values) for name, values in times.items()}


def ratios(times: Mapping[str, StepTime], base: str) -> dict[str, Ratio]:
    """Each entry's time over the time of `base` in the same round (the base's own ratio is 1).

    Raises:
        ValueError: there is no `base` among the entries.
    """
    if base not in times:
        raise ValueError(f"no entry `{base}` to compare with; there are: {', '.join(times) or 'none'}")
    paired = {n: [a / b for a, b in zip(t.times, times[base].times, strict=True)] for n, t in times.items()}
    return {name: Ratio(*_quartiles(values)) for name, values in paired.items()}


def format_bytes(count: int) -> str:
    """`170813030` as `162.9 MiB`: binary units, one decimal from KiB up."""
    if abs(count) < 1024:
        return f"{count} B"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.95:  # what would print as 1024.0 is 1.0 of the next unit
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _checked_device(model: nn.Module, *values: object) -> torch.device:
    """The device to measure on: CUDA where anything is on it, else the CPU."""
    if not torch.is_grad_enabled():
        raise ValueError("gradients are off, so nothing is kept for backward: measure outside `no_grad`")
    devices = sorted({tensor.device for tensor in [*model.parameters(), *tensors_in(values)]}, key=str)
    for device in devices:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"only `cpu` and `cuda` are measured: move model and inputs there from `{device}`")
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _existing(model: nn.Module, *values: object) -> list[Tensor]:
    """Every tensor that is there before the call: in the model, as an attribute too, and in its arguments."""
    attributes = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    return [leaf for leaf in attributes if isinstance(leaf, Tensor)] + tensors_in(values)


def _forward(model: nn.Module, inputs: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """One call, with the weights that autocast caches dropped before and after, as leaving autocast does."""
    torch.clear_autocast_cache()
    output = model(*inputs, **kwargs)
    torch.clear_autocast_cache()
    return output


def mean_square(output: object) -> Tensor:
    """The loss where none is given: the mean square, summed over the floating tensors of the output.

    Raises:
        ValueError: there is none.
    """
    parts = [t.float().square().mean() for t in tensors_in(output) if t.is_floating_point()]
    if not parts:
        raise ValueError("the output holds no floating tensor to make a loss of: pass `loss`")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _warm_up(output: object) -> None:
    """Run a backward for compiled code's sake, where there is one."""
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if outputs:
        mean_square(outputs).backward()


def _step(forward: Callable[[], object], loss: Loss | None, optimizer: torch.optim.Optimizer | None = None) -> None:
    output = forward()
    with torch.profiler.record_function(_FORWARD_END):
        value = (loss or mean_square)(output)
    del output
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"`loss` must return one number in a tensor, not {_what(value)}")
    if not value.requires_grad:
        raise ValueError("the loss depends on nothing that requires a gradient: is the model frozen?")
    value.backward()
    if optimizer is not None:
        optimizer.step()


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextlib.contextmanager
def _warm_step(
    model: nn.Module,
    inputs: Sequence[object],
    kwargs: Mapping[str, object],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
) -> Iterator[Callable[[], None]]:
    """A step whose lasting results are there already: compiled code, gradients, the optimizer's state."""
    step = partial(_step, partial(_forward, model, inputs, kwargs), loss, optimizer)
    with untouched(model, inputs, kwargs), undone(optimizer):
        step()
        for leaf in leaves_of(model, (inputs, kwargs)):
            leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
        gc.collect()
        yield step


@contextlib.contextmanager
def profiled(*, shapes: bool = False, memory: bool = False) -> Iterator[list[Any]]:
    """What torch's profiler records on the CPU inside, of every thread, filled in on leaving."""
    records: list[Any] = []
    options = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, shapes, memory, False, False, False, options))
    try:
        yield records
    finally:
        records += [record for thread in _disable_profiler_legacy() for record in thread]


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[float, int | None]]]:
    """The CPU's (seconds, bytes) events, filled in on leaving; bytes are None where forward ended."""
    events: list[tuple[float, int | None]] = []
    with profiled(memory=True) as records:
        yield events
    start = next(record for record in records if record.name() == "__start_profile")
    for record in records:
        if record.kind() == "memory_alloc":
            events.append((start.cpu_elapsed_us(record) * 1e-6, record.cpu_memory_usage()))
        elif record.kind() == "push" and record.name() == _FORWARD_END:
            events.append((start.cpu_elapsed_us(record) * 1e-6, None))
    events.sort(key=lambda event: event[0])


def _timeline(
    model: nn.Module,
    inputs: Sequence[object],
    kwargs: Mapping[str, object],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
) -> Timeline:
    with _warm_step(model, inputs, kwargs, loss, optimizer) as step, _recorded() as events:
        step()
    seconds, running, forward_end = [0.0], [0], 0
    for when, change in events:
        if change is None:
            forward_end = len(running) - 1
        else:
            seconds.append(when)
            running.append(running[-1] + change)
    return Timeline(tuple(seconds), tuple(running), forward_end)


def _growth(call: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """Bytes that the call leaves allocated, and its result, which must be alive for that."""
    gc.collect()
    if device.type == "cpu":
        with _recorded() as events:
            output = call()
            gc.collect()
        return sum(change or 0 for _, change in events), output
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    output = call()
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - start, output


def _allocated(tensor: Tensor, device: torch.device) -> int:
    """Bytes that the measured device gave for the tensor's storage."""
    size = tensor.untyped_storage().nbytes() if tensor.device.type == device.type else 0
    return size if device.type == "cpu" else -(-size // _CUDA_BLOCK) * _CUDA_BLOCK


@contextlib.contextmanager
def _names_of_running(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keeps the name of the module that is executing at the end of `running`."""

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seconds(model: nn.Module, inputs: Sequence[object], loss: Loss | None, device: torch.device) -> float:
    for leaf in leaves_of(model, inputs):
        leaf.grad = None
    _wait_for(device)
    start = time.perf_counter()
    _step(partial(_forward, model, inputs, {}), loss)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high
