"""Serialization with sub-batches around the size of the device's cache.

Two tables, both as ratios to the plain form, measured in turns in one process:

    exact   norm → ReLU → convolution → moments of ResNet-50's bottlenecks in train mode, forward and backward,
            block by block (`normpass.passes.SerializeNorms`), against the whole tensors
    deep    a training step of ResNet-50 with GroupNorm, whole regions sub-batch by sub-batch
            (`normpass.passes.SerializeMinibatch`), against plain layers: time, and peak of the memory

A buffer is a share of the last-level cache (the L2 of a GPU).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from normpass import measure
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.environment import last_level_cache
from normpass.extras import needed
from normpass.kernels import kernels_for
from normpass.measure.timing import Clock, alternate
from normpass.ops.moments import moments_with_update
from normpass.passes import SerializeMinibatch
from normpass.recipe.notes import recording
from normpass.runtime.convolution import convolution_function
from normpass.runtime.functional import FunctionalBatchNorm, split_norm_act
from normpass.runtime.norm_blocks import serial_norm_act_conv
from normpass.serialize.traffic import graph_of

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Buffers, as parts of the last-level cache."""
BLOCKS = tuple(2**20 * mib for mib in (1, 2, 4, 8, 16, 32, 64))
"""What `tuned` tries, in bytes."""


@dataclass(frozen=True)
class Region:
    """norm → ReLU → convolution of `inside` to `outside` channels over maps of `size`."""

    inside: int
    outside: int
    kernel: int
    size: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.inside} -> {self.outside} {self.kernel}x{self.kernel}{stride} on {self.size}x{self.size}"


RESNET50 = (
    Region(64, 64, 3, 56),
    Region(64, 256, 1, 56),
    Region(128, 128, 3, 56, 2),
    Region(128, 128, 3, 28),
    Region(128, 512, 1, 28),
    Region(256, 256, 3, 28, 2),
    Region(256, 256, 3, 14),
    Region(256, 1024, 1, 14),
    Region(512, 512, 3, 14, 2),
    Region(512, 512, 3, 7),
    Region(512, 2048, 1, 7),
)


@dataclass(frozen=True)
class Row:
    """One measurement: time relative to the plain form (and peak, where it was taken), by buffer in bytes."""

    table: str
    what: str
    batch: int
    dtype: str
    time: dict[int, float]
    peak: dict[int, float]
    best: int | None
    """the buffer that is faster than the plain form, None if none is"""


class SerialisedModel(nn.Module):
    """A model whose forward runs as `SerializeMinibatch` rewrites it for inputs like `x`."""

    def __init__(self, model: nn.Module, x: Tensor, buffer_bytes: int) -> None:
        super().__init__()
        program, values = graph_of(model, x)
        self.model = model
        facts = facts_of(program, FakeInputs(values))
        self.found = SerializeMinibatch(buffer_bytes=buffer_bytes).apply(program.graph, facts)
        self._run, self._values = fx.GraphModule(program, program.graph).forward, values
        self._place = next(index for index, value in enumerate(values) if value is x)

    def forward(self, x: Tensor) -> Tensor:
        values = [*self._values[: self._place], x, *self._values[self._place + 1 :]]
        result: Tensor = self._run(*values)[0]
        return result


def buffers_of(device: torch.device, shares: Sequence[float] = SHARES) -> list[int]:
    """The sizes that are tried, in bytes."""
    return [int(last_level_cache(device) * share) for share in shares]


def exact_row(
    region: Region, batch: int, dtype: torch.dtype, device: torch.device, buffers: Sequence[int], rounds: int
) -> Row:
    """Time of one region, block by block, relative to the whole; norm parameters in float32."""
    norm = nn.BatchNorm2d(region.inside, device=device)
    conv = nn.Conv2d(
        region.inside,
        region.outside,
        region.kernel,
        region.stride,
        region.kernel // 2,
        bias=False,
        device=device,
        dtype=dtype,
    ).to(memory_format=torch.channels_last)
    x = torch.randn(batch, region.inside, region.size, region.size, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    best, ratios = tuned(norm, conv, x, blocks=buffers, rounds=rounds)
    return Row("exact", str(region), batch, _name(dtype), ratios, {}, best)


def deep_row(
    name: str,
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    buffers: Sequence[int],
    rounds: int,
) -> Row:
    """Step time and peak of a network, serialized with each buffer, relative to plain; autocast unless float32."""
    model = make().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(tuple(shape), device=device).to(memory_format=torch.channels_last)
    models: dict[str, nn.Module] = {"plain": model}
    models |= {str(buffer): SerialisedModel(model, x, buffer) for buffer in buffers}
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
        times = measure.ratios(measure.step_time(models, x, rounds=rounds), "plain")
        peaks = {key: measure.peak_bytes(each, x) for key, each in models.items()}
    time = {buffer: times[str(buffer)].median for buffer in buffers}
    peak = {buffer: peaks[str(buffer)] / peaks["plain"] for buffer in buffers}
    best = min(time, key=time.__getitem__)
    return Row("deep", name, shape[0], _name(dtype), time, peak, best if time[best] < 1 else None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_norm_resnet50() -> nn.Module:
    """torchvision's ResNet-50 with 32 groups in place of every batch norm."""
    return needed("torchvision.models").resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels))


def format_row(row: Row) -> str:
    """`64 -> 256 1x1 on 56x56: 4 MiB 1.03, 8 MiB 0.99`"""
    parts = []
    for buffer, ratio in row.time.items():
        peak = f" (peak {row.peak[buffer]:.2f})" if buffer in row.peak else ""
        parts.append(f"{buffer / 2**20:g} MiB {ratio:.2f}{peak}")
    return f"{row.table:6}{row.what}: {', '.join(parts)}"


def rows(
    tables: Sequence[str], batch: int, size: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> Iterator[Row]:
    """Of the tables "exact" and "deep", each as it is measured.

    Args:
        size: height and width of the images of the deep table.
    """
    buffers = buffers_of(device)
    if "exact" in tables:
        for region in RESNET50:
            yield exact_row(region, batch, dtype, device, buffers, rounds)
    if "deep" in tables:
        shape = batch, 3, size, size
        yield deep_row("ResNet-50, GroupNorm", group_norm_resnet50, shape, dtype, device, buffers, rounds)


# --- block by block -------------------------------------------------------------------------------


def tuned(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    activation: str = "relu",
    activation_args: Sequence[float] = (),
    blocks: Sequence[int] = BLOCKS,
    rounds: int = 5,
) -> tuple[int | None, dict[int, float]]:
    """The block with which norm, activation, convolution and moments are fastest, forward and backward.

    Copies of the layers run on a detached `x`, whole and with every block of `blocks` (bytes), in turns.

    Returns:
        The block, None where the whole form is fastest; and the time of each block relative to the whole form, the
        median of `rounds`.
    """
    norm, conv = copy.deepcopy(norm), copy.deepcopy(conv)
    x, args = x.detach().requires_grad_(), list(activation_args)

    def step(block: int, turn: int, clock: Clock) -> None:
        clock.lap()
        _forward_and_backward(norm, conv, x, activation, args, block)
        clock.lap()

    taken = alternate({str(block): partial(step, block) for block in (0, *blocks)}, x.device, rounds)
    found = measure.ratios({name: phases[-1] for name, phases in taken.items()}, "0")
    times = {block: found[str(block)].median for block in blocks}
    best = min(times, key=times.__getitem__, default=None)
    return (best if best is not None and times[best] < 1 else None), times


def _forward_and_backward(norm: Any, conv: Any, x: Tensor, activation: str, args: list[float], block: int) -> None:
    """`block` 0: whole."""
    with recording():
        if block:
            c, moments = serial_norm_act_conv(as_function(norm), x, None, activation, args, block, *_arguments(conv))
        else:
            z = split_norm_act(as_function(norm), x, None, activation, args)
            c, moments = convolution_function(z, *_arguments(conv)), None
        if moments is None:
            moments_with_update(kernels_for(c.device.type), c, None)
    torch.autograd.grad(c, [x, *conv.parameters(), *norm.parameters()], torch.ones_like(c))


def as_function(norm: Any) -> FunctionalBatchNorm:
    """The arguments of the call that a batch norm makes."""
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return FunctionalBatchNorm(mean, var, weight, bias, norm.training, norm.momentum or 0.0, norm.eps)


def _arguments(conv: Any) -> tuple[Any, ...]:
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
