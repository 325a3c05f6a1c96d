"""Kept and peak bytes: the one definition used by the report, the benchmarks and the tests.

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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

from normpass.copies.untouched import storage_key, tensors_in, untouched
from normpass.errors import InvalidInputError
from normpass.measure.step import FORWARD_END, Loss, checked_device, existing, forward_of, warm_step, warm_up

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


def kept_bytes(model: nn.Module, *inputs: object, **kwargs: object) -> int:
    """Bytes that `model(*inputs, **kwargs)` in its current mode leaves allocated for backward.

    The storages of the output are not counted, nor is what existed before the call (inputs, parameters,
    buffers). A first step warms up caches and compilation; the second forward is measured.

    Everything else counts, activation or not: the weights that autocast casts, and the copies of weights that
    compiled code makes and keeps. Inductor on the CPU runs convolutions channels_last and keeps the weights
    in that layout, for ResNet-50 43.2 MiB whatever the batch; a model that is channels_last already has none.

    Raises:
        InvalidInputError: gradients are off (then nothing is kept, and the 0 would mislead), or the model is on a
            device other than the CPU or CUDA.
    """
    device = checked_device(model, inputs, kwargs)
    forward = partial(forward_of, model, inputs, kwargs)
    with untouched(model, inputs, kwargs):
        warm_up(forward())
        before = existing(model, inputs, kwargs)  # kept alive, so that what replaces them counts in full
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
        InvalidInputError: as for `kept_bytes`.
    """
    checked_device(model, inputs)
    running = [""]
    saved: list[tuple[weakref.ref[Tensor], str]] = []  # a reference dies with its part of the graph

    def pack(tensor: Tensor) -> Tensor:
        held = tensor.detach()
        saved.append((weakref.ref(held), running[-1]))
        return held

    with untouched(model, inputs), _names_of_running(model, running):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            output = forward_of(model, inputs, {})
        seen = {storage_key(tensor) for tensor in [*existing(model, inputs), *tensors_in(output)]}
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
        InvalidInputError: gradients are off, no output depends on anything that requires one, or the device is
            neither the CPU nor CUDA.
        TypeError: `loss` returned something other than one number in a tensor.
    """
    device = checked_device(model, inputs, kwargs)
    if device.type == "cpu":
        return _timeline(model, inputs, kwargs, loss, optimizer).peak
    with warm_step(model, inputs, kwargs, loss, optimizer) as step:
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
        InvalidInputError: the device is neither the CPU nor CUDA.
    """
    with torch.enable_grad():
        device = checked_device(model, inputs, kwargs)
    forward = partial(forward_of, model, inputs, kwargs)
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
        InvalidInputError: as for `peak_bytes`, and on CUDA, where the allocator reports only the peak.
        TypeError: as for `peak_bytes`.
    """
    device = checked_device(model, inputs, kwargs)
    if device.type != "cpu":
        raise InvalidInputError(f"memory_timeline needs a model on the CPU, not on `{device}`; use peak_bytes there")
    return _timeline(model, inputs, kwargs, loss, None)


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
        elif record.kind() == "push" and record.name() == FORWARD_END:
            events.append((start.cpu_elapsed_us(record) * 1e-6, None))
    events.sort(key=lambda event: event[0])


def _timeline(
    model: nn.Module,
    inputs: Sequence[object],
    kwargs: Mapping[str, object],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
) -> Timeline:
    with warm_step(model, inputs, kwargs, loss, optimizer) as step, _recorded() as events:
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
