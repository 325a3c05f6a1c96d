"""Batch norm and activation in train mode, through autograd: ours beside eager, torch.compile, cuDNN and a copy.

The limit is a plain copy of the same bytes. Forward reads x for the moments, reads x and writes z; backward
reads x and dz for the two sums, reads both again and writes dx: 3 and 5 arrays the size of x, which is the time
of 1.5 and 2.5 copies of one such array. A residual is read by norm_act and by the sums, which write its gradient, and
dx is made from that: 4 and 7. `ours` is what training does by default: somebody reads z in backward, and z is made
again from x (and the residual) by 2 (3) more moves; with `ours_kept` it is kept, as all others keep it.
The inputs come from memory, never from a cache; what stays in one from one pass to the next is read faster than the
copy reads, so small arrays may beat it.

Eager is at its best: its additions and ReLUs are in place, as torchvision's networks have them; beside it stands what
`nn.ReLU()` does by default.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass import measure
from normpass.environment import last_level_cache
from normpass.errors import NormpassError
from normpass.measure import Ratio, StepTime
from normpass.measure.step_time import wait_for
from normpass.measure.timing import Clock, Step, alternate
from normpass.recipe.notes import recording
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, split_norm_act

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
PHASES = ("forward", "backward", "both")
COPY = "copy"
_LONGEST_ERROR = 300
_MOST_SETS = 64

_CPU_SHAPES = "16x64x56x56 16x256x56x56 16x128x28x28 16x512x28x28 16x1024x14x14".split()
_CUDA_SHAPES = (
    "256x64x112x112 256x64x56x56 256x256x56x56 256x128x28x28 256x512x28x28 256x256x14x14 256x1024x14x14 "
    "256x512x7x7 256x2048x7x7 32x64x56x56 32x256x56x56 32x512x28x28 32x1024x14x14 32x2048x7x7"
).split()
DEFAULT_SHAPES = {"cpu": _CPU_SHAPES, "cuda": _CUDA_SHAPES}
"""Batch norms of ResNet-50; on a GPU all its sizes at batch 256, and the larger ones at 32."""


class BenchError(NormpassError, ValueError):
    """A benchmark cannot run: what it compares with fails, or its arguments do not fit."""


@dataclass(frozen=True)
class Layer:
    """act(norm(x) + residual) and how many arrays the size of x it has to move."""

    activation: str
    residual: bool
    forward_arrays: int
    backward_arrays: int

    @property
    def arrays(self) -> tuple[int, int, int]:
        """In forward, backward and both."""
        return self.forward_arrays, self.backward_arrays, self.forward_arrays + self.backward_arrays

    def arrays_of(self, contender: str) -> tuple[int, int, int]:
        """The same with what the contender rebuilds in backward."""
        rebuilt = 0 if contender != "ours" else 3 if self.residual else 2
        forward, backward, both = self.arrays
        return forward, backward + rebuilt, both + rebuilt


LAYERS = {
    "bn_relu": Layer("relu", False, 3, 5),
    "bn_add_relu": Layer("relu", True, 4, 7),
    "bn_silu": Layer("silu", False, 3, 5),
}


@dataclass(frozen=True)
class Case:
    """What one table row is measured on."""

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """One phase of one contender: seconds, the ratio to eager round by round, the fraction of the copy's speed."""

    seconds: float
    """median over the rounds"""
    seconds_low: float
    """lower quartile"""
    seconds_high: float
    """upper quartile"""
    ratio: Ratio
    of_copy: float
    """the time of copying as many bytes over this time: 1 is the speed of the copy"""


@dataclass(frozen=True)
class LayerRow:
    """One contender on one case."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    contender: str
    phases: Mapping[str, Phase] = field(default_factory=dict)
    """by name: forward, backward, both"""
    error: str = ""
    """why it did not run"""


def bench_layer(case: Case, rounds: int = 10, compile_backend: str | None = "inductor") -> list[LayerRow]:
    """Every contender on one case, alternating; the copy is the last row.

    Args:
        case: (N, C, *) shape, dtype and layout of x; weight, bias and statistics are float32.
        rounds: samples of each.
        compile_backend: of torch.compile; None leaves it out.

    Raises:
        BenchError: eager itself does not run on the case.
    """
    torch.manual_seed(0)
    inputs = make_inputs(case, count=3 if LAYERS[case.layer].residual else 2)
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name, module in contenders(case, compile_backend).items():
        sets = [_as_contiguous(s) for s in inputs] if name == "eager_contiguous" else inputs
        steps[name] = partial(_train, module, sets)
        try:
            _first(steps[name], case.device)
        except Exception as error:  # whatever a contender raises is a result, and the others go on
            errors[name] = one_line(error)
            del steps[name]
    if "eager" in errors:
        raise BenchError(
            f"eager does not run on {shape_text(case.shape)} in {name_of(case.dtype)}: {errors['eager']}; "
            "try another --shape"
        )
    steps[COPY] = partial(copy_step, [given[0] for given in inputs], torch.empty_like(inputs[0][0]))
    times = alternate(steps, case.device, rounds)
    return [*_rows(case, times), *(_row(case, name, error=error) for name, error in errors.items())]


def contenders(case: Case, compile_backend: str | None) -> dict[str, nn.Module]:
    """Modules of (x, residual) by name, each with a norm of its own; the others are compared with `eager`."""
    activation = LAYERS[case.layer].activation

    def norm() -> nn.BatchNorm2d:
        return nn.BatchNorm2d(case.shape[1], device=case.device)

    found: dict[str, nn.Module] = {"ours": Ours(norm(), activation), "ours_kept": OursKept(norm(), activation)}
    found["eager"] = Plain(norm(), activation)
    found["eager_out_of_place"] = Plain(norm(), activation, in_place=False)
    if case.layout == "channels_last":
        found["eager_contiguous"] = Plain(norm(), activation)
    if case.device.type == "cuda":
        found["cudnn"] = Library(norm(), activation, torch.cudnn_batch_norm)
        found["aten"] = Library(norm(), activation, torch.native_batch_norm)
    if compile_backend is not None:
        found["compile"] = _compiled(Plain(norm(), activation), compile_backend)
    return found


class Plain(nn.Module):
    """The layers one after another; by default in place where torchvision's networks are."""

    def __init__(self, norm: nn.BatchNorm2d, activation: str, in_place: bool = True) -> None:
        super().__init__()
        self.norm, self.activation, self.in_place = norm, activation, in_place

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.activate(self.norm(x), residual)

    def activate(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        return F.relu(y, inplace=self.in_place) if self.activation == "relu" else F.silu(y)


class Ours(Plain):
    """What an optimized model calls in their place, and somebody who reads the result in backward: it is rebuilt."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        with recording():
            z: Tensor = ReadInBackward.apply(
                split_norm_act(FunctionalBatchNorm.of(self.norm), x, residual, self.activation)
            )
        return z


class ReadInBackward(torch.autograd.Function):
    """What a consumer does to a tensor, without what it computes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (_,) = ctx.saved_tensors
        return grad


class OursKept(Plain):
    """The same where a plan says that the result is kept."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return fused_norm_act(FunctionalBatchNorm.of(self.norm), x, residual, self.activation)


class Library(Plain):
    """One library's batch norm by name; `nn.BatchNorm2d` would choose between them."""

    def __init__(self, norm: nn.BatchNorm2d, activation: str, batch_norm: Callable[..., Any]) -> None:
        super().__init__(norm, activation)
        self.batch_norm = batch_norm

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        n = self.norm
        y = self.batch_norm(x, n.weight, n.bias, n.running_mean, n.running_var, True, n.momentum, n.eps)[0]
        return self.activate(y, residual)


def make_inputs(case: Case, count: int) -> list[tuple[Tensor, ...]]:
    """Sets of `count` tensors, to be used in turn: so many that no tensor is still in the cache when it comes again."""
    size = math.prod(case.shape) * case.dtype.itemsize
    sets = min(_MOST_SETS, math.ceil(2 * last_level_cache(case.device) / size))
    return [tuple(_random(case) for _ in range(count)) for _ in range(sets)]


def copy_step(sources: Sequence[Tensor], target: Tensor, turn: int, clock: Clock) -> None:
    """One copy of one array: what the fractions are measured in."""
    source = sources[turn % len(sources)]
    clock.lap()
    target.copy_(source)
    clock.lap()


def of_copy(time: StepTime, copy: StepTime, arrays: int) -> float:
    """The time of copies that move so many arrays (each moves two) over this time, round by round: the median."""
    return arrays / 2 / measure.ratios({"own": time, COPY: copy}, COPY)["own"].median


def one_line(error: Exception) -> str:
    """What was raised, its first two lines: a compiler's error names itself in one and its cause in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_LONGEST_ERROR]


def shape_text(shape: Sequence[int]) -> str:
    """`(2, 3, 224, 224)` as `2x3x224x224`."""
    return "x".join(map(str, shape))


def name_of(dtype: torch.dtype | torch.memory_format) -> str:
    """`torch.bfloat16` as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _random(case: Case) -> Tensor:
    x = torch.randn(case.shape, device=case.device).to(case.dtype)
    return x.contiguous(memory_format=LAYOUTS[case.layout])


def _as_contiguous(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in given)


def _train(module: nn.Module, inputs: Sequence[tuple[Tensor, ...]], turn: int, clock: Clock) -> None:
    x, dz, *others = inputs[turn % len(inputs)]
    x = x.detach().requires_grad_()
    residual = others[0].detach().requires_grad_() if others else None
    wanted = (x, residual) if residual is not None else (x,)
    parameters = list(module.parameters())
    clock.lap()
    z = module(x, residual)
    clock.lap()
    torch.autograd.grad(z, (*wanted, *parameters), dz)
    clock.lap()


def train_step(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    turn: int,
    clock: Clock,
) -> None:
    """Forward and backward of `run`, on the (x, gradient) whose turn it is."""
    x, grad = pairs[turn % len(pairs)]
    leaf = x.detach().requires_grad_()
    clock.lap()
    y = run(leaf)
    clock.lap()
    torch.autograd.grad(y, [leaf, *parameters], grad)
    clock.lap()


def _compiled(module: nn.Module, backend: str) -> nn.Module:
    torch.compiler.reset()  # or the cases before count against the limit of recompilations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself warns of when Inductor is imported
        result: Any = torch.compile(module, backend=backend, dynamic=False)
    return result


def _first(step: Step, device: torch.device) -> None:
    """A first call: it compiles what is compiled, and raises here what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself warns of while it compiles
        step(0, Clock(device))
    wait_for(device)


def _rows(case: Case, times: Mapping[str, list[StepTime]]) -> Iterator[LayerRow]:
    copy = times[COPY][-1]
    for name, phases in times.items():
        if name == COPY:
            yield _row(case, name, {"both": _phase(copy, copy, copy, 2)})
            continue
        arrays = LAYERS[case.layer].arrays_of(name)
        compared = zip(phases, times["eager"], arrays, strict=True)
        found = [_phase(time, base, copy, count) for time, base, count in compared]
        yield _row(case, name, dict(zip(PHASES, found, strict=True)))


def _phase(time: StepTime, base: StepTime, copy: StepTime, arrays: int) -> Phase:
    ratio = measure.ratios({"own": time, "base": base}, "base")["own"]
    return Phase(time.median, time.low, time.high, ratio, of_copy(time, copy, arrays))


def _row(case: Case, name: str, phases: Mapping[str, Phase] | None = None, error: str = "") -> LayerRow:
    return LayerRow(case.layer, case.shape, name_of(case.dtype), case.layout, name, phases or {}, error)
