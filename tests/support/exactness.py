"""Does an optimized model train exactly as the plain one? The judge of every exact rewrite.

`compare` trains two deep copies of one model in fp64, one plain and one optimized, on the same data with the
same seeds, and then looks at every number there is: the outputs of every step, the gradient of every
parameter at every step, every parameter and every buffer afterwards, and the outputs in eval mode.

How numbers are judged
----------------------
Each number belongs to one of five kinds: outputs, gradients, parameters, buffers, eval outputs. For a kind

    scale       the largest magnitude of the kind in the plain run
    difference  the largest |optimized - plain|
    noise       the largest |plain with a moved input - plain|, over three runs: in each of them every element
                of every floating input, of every step and of the eval call, moves by one ulp up or down, at
                random (`torch.nextafter`); but at least eps/2 * scale, the rounding of the largest number
                itself, so that a kind which does not depend on the input may still differ by 15 eps * scale

and the kind passes if difference <= 1e-9 * scale and difference <= 30 * noise. A kind without a number in it
passes. The limits hold for the kind and not for the tensor because a tensor may be zero in exact arithmetic
(the bias of a convolution before a norm has no gradient) and then has no relative error to speak of. Integers
(`num_batches_tracked`, detected labels) must be equal and count in no scale. NaN or infinity in the plain run
is a failure of the comparison.

What else must hold
-------------------
The given model is untouched by `optimize`: its `state_dict` bit for bit, and the type and training flag of
every submodule. The optimized model has the same `state_dict` keys, parameters and buffers in the same
order, and gives outputs of the same types, nesting, names, shapes and dtypes; a parameter has a gradient
where it has one in the plain run, and None where it has None there.

The training
------------
The model runs in the mode in which it was built (train, but frozen norms stay frozen). Step k takes the batch
`make_inputs(k)` and calls `torch.manual_seed` before its forward pass, for dropout and stochastic depth. The
loss is a random linear functional of all floating outputs, the same in every step, of norm one for each
tensor, times a power of two which brings the largest gradient of the first plain step to about one. The
optimizer is SGD with momentum. The eval call takes `make_inputs(steps)`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from identity import Identity, Layout
from nested import leaves, map_tensors, move_by_one_ulp, structure
from torch import Tensor, nn

KINDS = ("outputs", "gradients", "parameters", "buffers", "eval outputs")
SCALE_LIMIT = 1e-9
NOISE_LIMIT = 30.0
NOISE_RUNS = 3
EPS = torch.finfo(torch.float64).eps
NAMED_FAILURES = 5
"""So many tensors of a kind are named in `failures`, the worst first; the others are counted."""

Inputs = tuple
"""What a model is called with: positional arguments, tensors nested in lists, tuples and dicts."""


@dataclass(frozen=True)
class KindResult:
    """What was found for one kind of number; `difference`, `noise` and `scale` are absolute."""

    kind: str
    difference: float
    noise: float
    scale: float

    @property
    def ratio(self) -> float:
        """difference / noise, at most 30 if exact."""
        return self.difference / self.noise if self.noise else 0.0 if self.difference == 0 else math.inf

    @property
    def limit(self) -> float:
        return min(SCALE_LIMIT * self.scale, NOISE_LIMIT * self.noise)

    def relative(self, value: float) -> float:
        return value / self.scale if self.scale else value


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: one `KindResult` for each of `KINDS`, and what is wrong, in words."""

    kinds: tuple[KindResult, ...]
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def worst(self) -> KindResult:
        return max(self.kinds, key=lambda result: result.ratio)

    def row(self) -> dict[str, bool | float]:
        """One flat row of a table: difference/scale, noise/scale and difference/noise of every kind."""
        row: dict[str, bool | float] = {"ok": self.ok}
        for result in self.kinds:
            row[result.kind] = result.relative(result.difference)
            row[f"{result.kind} noise"] = result.relative(result.noise)
            row[f"{result.kind} ratio"] = result.ratio
        return row

    def __str__(self) -> str:
        lines = [
            f"{r.kind:12}  difference/scale {r.relative(r.difference):.1e}  "
            f"noise/scale {r.relative(r.noise):.1e}  ratio {r.ratio:.2g}"
            for r in self.kinds
        ]
        return "\n".join([*lines, *self.failures])


def compare(
    build: Callable[[], nn.Module],
    make_inputs: Callable[[int], Inputs],
    optimize: Callable[[nn.Module], nn.Module],
    *,
    steps: int = 2,
    lr: float = 0.01,
    momentum: float = 0.9,
    seed: int = 0,
) -> Comparison:
    """Train `build()` and `optimize(build())` alike in fp64 and compare every number (module docstring).

    Args:
        build: makes the model, on the CPU; called once, under `seed`.
        make_inputs: the arguments of forward for step k, the same at every call; floats are made fp64.
        optimize: takes a model and returns the model to be judged.
        steps: SGD steps before the eval call.
        lr, momentum: of SGD; the largest gradient of the first step is about one.
    """
    torch.manual_seed(seed)
    model = build().double()
    run = _Run(make_inputs, steps, lr, momentum, seed, 1.0)
    run = run.scaled(_largest_gradient(run, copy.deepcopy(model)))
    plain = {(item.kind, item.name): item.value for item in run.trace(copy.deepcopy(model))}

    given = copy.deepcopy(model)
    before = Identity.of(given)
    optimized = optimize(given)
    failures = before.changes(Identity.of(given), "the given model")
    failures += before.layout.differences(Layout.of(optimized))
    found = _Differences.between(plain, run.trace(optimized))
    del given, optimized

    noise = [
        _Differences.between(plain, run.trace(copy.deepcopy(model), moved_by=seed)) for seed in range(1, NOISE_RUNS + 1)
    ]
    for moved in noise:
        if moved.wrong:
            raise ValueError(f"plain changes more than its rounding when its input moves: {moved.wrong}")
    kinds = tuple(_judge(kind, plain, found, noise) for kind in KINDS)
    failures += _not_finite(plain) + list(found.wrong)
    for result in kinds:
        failures += _beyond(result, found.by_tensor)
    return Comparison(kinds, tuple(failures))


@dataclass(frozen=True)
class _Item:
    """One thing to compare: a tensor, None (no gradient), or words (the structure of an output)."""

    kind: str
    name: str
    value: Tensor | str | None


@dataclass(frozen=True)
class _Run:
    """One training, the same for every model it is given."""

    make_inputs: Callable[[int], Inputs]
    steps: int
    lr: float
    momentum: float
    seed: int
    loss_scale: float

    def scaled(self, largest_gradient: float) -> _Run:
        scale = 2.0 ** -round(math.log2(largest_gradient)) if largest_gradient else 1.0
        return _Run(self.make_inputs, self.steps, self.lr, self.momentum, self.seed, scale)

    def batch(self, step: int, moved_by: int | None) -> Inputs:
        inputs = map_tensors(_as_double, self.make_inputs(step))
        if moved_by is None:
            return inputs
        generator = torch.Generator().manual_seed(1000 * moved_by + step)
        return map_tensors(lambda tensor: move_by_one_ulp(tensor, generator), inputs)

    def loss(self, output: object) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        terms = []
        for _, tensor in leaves(output):
            if not tensor.is_floating_point():
                continue
            weight = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            terms.append((tensor * weight).sum() / math.sqrt(max(tensor.numel(), 1)))
        return torch.stack(terms).sum() * self.loss_scale

    def forward(self, model: nn.Module, step: int, moved_by: int | None = None) -> object:
        inputs = self.batch(step, moved_by)
        torch.manual_seed(self.seed + step)
        return model(*inputs)

    def trace(self, model: nn.Module, moved_by: int | None = None) -> Iterator[_Item]:
        """Train `model` and hand out, as it goes, all there is to compare."""
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        for step in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            output = self.forward(model, step, moved_by)
            self.loss(output).backward()
            yield from _output_items("outputs", f"step {step}: ", output)
            for name, parameter in model.named_parameters():
                yield _Item("gradients", f"step {step}: `{name}`", _clone(parameter.grad))
            optimizer.step()
        for name, parameter in model.named_parameters():
            yield _Item("parameters", f"`{name}`", _clone(parameter))
        for name, buffer in model.named_buffers():
            yield _Item("buffers", f"`{name}`", _clone(buffer))
        model.eval()
        with torch.no_grad():
            yield from _output_items("eval outputs", "eval: ", self.forward(model, self.steps, moved_by))


@dataclass(frozen=True)
class _Differences:
    """How one trace differs from the plain one."""

    by_tensor: Mapping[tuple[str, str], float]
    wrong: tuple[str, ...]
    """What differs by more than a number: missing, of another shape or type, integers that are unequal."""

    @classmethod
    def between(cls, plain: Mapping[tuple[str, str], object], trace: Iterator[_Item]) -> _Differences:
        by_tensor: dict[tuple[str, str], float] = {}
        wrong: list[str] = []
        seen = set()
        for item in trace:
            key = (item.kind, item.name)
            seen.add(key)
            if key not in plain:
                wrong.append(f"{item.kind}: {item.name} is not in the plain run")
                continue
            difference = _difference(plain[key], item.value)
            if isinstance(difference, str):
                wrong.append(f"{item.kind}: {item.name}: {difference}")
            else:
                by_tensor[key] = difference
        missing = [key for key in plain if key not in seen]
        wrong += [f"{kind}: {name} is only in the plain run" for kind, name in missing]
        return cls(by_tensor, tuple(wrong))

    def largest(self, kind: str) -> float:
        return max((value for (of, _), value in self.by_tensor.items() if of == kind), default=0.0)


def _difference(plain: object, other: object) -> float | str:
    """The largest absolute difference, or what is wrong in words."""
    if not isinstance(plain, Tensor) or not isinstance(other, Tensor):
        return 0.0 if _words(plain) == _words(other) else f"{_words(other)}, plain gives {_words(plain)}"
    if plain.shape != other.shape or plain.dtype != other.dtype:
        return f"{_words(other)}, plain gives {_words(plain)}"
    if torch.equal(plain, other):
        return 0.0
    if not plain.is_floating_point():
        return f"{other.tolist()} where plain gives {plain.tolist()}; integers must be equal"
    largest = (plain - other).abs().max().item()
    return math.inf if math.isnan(largest) else largest


def _words(value: object) -> str:
    return structure(value) if isinstance(value, Tensor) else str(value)


def _judge(
    kind: str,
    plain: Mapping[tuple[str, str], object],
    found: _Differences,
    noise: list[_Differences],
) -> KindResult:
    values = (value for (of, _), value in plain.items() if of == kind)
    floats = (value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    scale = max((value.abs().max().item() for value in floats if value.numel()), default=0.0)
    largest_noise = max(moved.largest(kind) for moved in noise)
    return KindResult(kind, found.largest(kind), max(largest_noise, EPS / 2 * scale), scale)


def _beyond(result: KindResult, by_tensor: Mapping[tuple[str, str], float]) -> list[str]:
    """The tensors of a kind which differ by more than the kind allows, the worst first."""
    of_kind = [(value, name) for (kind, name), value in by_tensor.items() if kind == result.kind]
    beyond = sorted((pair for pair in of_kind if pair[0] > result.limit), reverse=True)
    failures = [
        f"{result.kind}: {name} differs by {value:.2e}, the limit is {result.limit:.2e} "
        f"(scale {result.scale:.2e}, noise {result.noise:.2e})"
        for value, name in beyond[:NAMED_FAILURES]
    ]
    if len(beyond) > NAMED_FAILURES:
        failures.append(f"{result.kind}: and {len(beyond) - NAMED_FAILURES} tensors more")
    return failures


def _not_finite(plain: Mapping[tuple[str, str], object]) -> list[str]:
    bad = (key for key, value in plain.items() if isinstance(value, Tensor) and not value.isfinite().all())
    return [f"{kind}: {name} is not finite in the plain run" for kind, name in bad]


def _largest_gradient(run: _Run, model: nn.Module) -> float:
    run.loss(run.forward(model, 0)).backward()
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    return max(g.abs().max().item() for g in gradients if g.numel())


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _output_items(kind: str, prefix: str, output: object) -> Iterator[_Item]:
    yield _Item(kind, f"{prefix}structure", structure(output))
    for name, tensor in leaves(output):
        yield _Item(kind, prefix + name, _clone(tensor))


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
