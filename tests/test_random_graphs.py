"""Random modules train like the plain ones: convolutions, norms, joins, views, writes, Python.

`random_modules` writes them. Each is trained for three steps, plain and optimised, in float64, with what a training
loop may do in between: outputs, gradients of parameters and inputs, inputs, parameters, buffers and attributes are
the same after every step, and where one raises, so does the other, with the same class.

A number may differ by 1e-9 of the largest in its tensor, by 1e-11 of the largest of its step, or by 100 times what
plain differs from itself when its inputs move by one ulp.

By hand, 3000 programs from seed 0, each that fails cut down and printed:

    OMP_NUM_THREADS=1 .venv/bin/python tests/test_random_graphs.py 0 3000
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets.nested import leaves as named_leaves
from random_modules import Program, Step, random_program
from torch import Tensor, nn

import normpass

EXAMPLES = 150
IN_PLACE = "modified by an inplace operation"
Numbers = dict[str, Any]
"""what was found by name: tensors, None, or the name of an exception's class"""


def leaves(value: object) -> list[Tensor]:
    return [t for _, t in named_leaves(value)]


# --- one training -----------------------------------------------------------------------------------


def arguments(step: Step, seed: int, noise: int = 0) -> list[Tensor]:
    """x and z; with `noise`, moved by one ulp."""
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(step.samples, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    if noise:
        directions = torch.Generator().manual_seed(noise)
        x, z = (torch.nextafter(t, t + torch.randn(t.shape, generator=directions)) for t in (x, z))
    if step.layout != "constant":
        x, z = x.requires_grad_(), z.requires_grad_()
    given = x
    if step.layout in ("contiguous", "channels_last", "transposed"):
        given = x * 1
    if step.layout == "channels_last":
        given = given.contiguous(memory_format=torch.channels_last)
    if step.layout == "transposed":
        given = given.transpose(2, 3)
    seconds = {"other": lambda: z * 1, "same": lambda: given, "view": lambda: given[:], "detached": given.detach}
    return [given, seconds[step.second](), x, z]


def order_of(t: Tensor) -> list[int]:
    """The dimensions as they lie in memory, on which the draw of a dropout depends."""
    return sorted((d for d in range(t.dim()) if t.shape[d] > 1), key=lambda d: -t.stride(d))


def differentiate(way: str, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """One of the ways to run backward; gradients that it returns."""
    outputs = [t for t in outputs if t.requires_grad]
    inputs = [t for t in inputs if t.requires_grad]
    if not outputs or way == "none":
        return []
    squares = sum(t.square().sum() for t in outputs)
    if way == "inputs":
        return list(torch.autograd.grad(squares, inputs, allow_unused=True)) if inputs else []
    if way == "second":
        if not inputs:
            return []
        first = torch.autograd.grad(squares, inputs, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
        return list(first)
    if way == "squares":
        squares.backward()
    if way == "sums":
        sum(t.sum() for t in outputs).backward()
    if way == "strided":
        torch.autograd.backward(
            outputs, [torch.randn(t.shape[::-1]).double().permute(*range(t.dim())[::-1]) for t in outputs]
        )
    if way == "each":
        for index, output in enumerate(outputs):
            output.sin().sum().backward(retain_graph=index + 1 < len(outputs))
    if way == "twice":
        squares.backward(retain_graph=True)
        squares.backward()
    return []


class Trainer:
    """Trains one model as a program says and notes every number."""

    def __init__(self, model: nn.Module, noise: int = 0):
        self.model, self.noise = model, noise
        self.numbers: Numbers = {}

    def run(self, steps: tuple[Step, ...]) -> Numbers:
        for index, step in enumerate(steps):
            self.model.zero_grad()
            try:
                self._step(f"{index}", index, step)
            except Exception as error:
                self.numbers[f"{index} raised"] = type(error).__name__
                self.numbers[f"{index} message"] = str(error)
                self.model.zero_grad()  # how far backward came is nobody's promise
            self._note_state(f"{index}")
            self._update()
        return self.numbers

    def _step(self, name: str, index: int, step: Step) -> None:
        space = {
            "model": self.model,
            "step": step,
            "leaves": leaves,
            "arguments": lambda s, n: arguments(s, n, self.noise)[:2],
            "torch": torch,
        }
        self._execute(step.before, space)
        *args, x, z = arguments(step, index, self.noise and self.noise + index)
        torch.manual_seed(index)
        self.numbers[f"{name} reached"] = "forward"
        outputs = leaves(self.model(*args))
        self.numbers |= {f"{name} output {i}": t.detach().clone() for i, t in enumerate(outputs)}
        self.numbers |= {f"{name} layout {i}": f"{order_of(t)} {t.requires_grad}" for i, t in enumerate(outputs)}
        space |= {"outputs": outputs, "args": args}
        self.numbers[f"{name} reached"] = "between"
        self._execute(step.between, space)
        self.numbers |= {f"{name} input {i}": t.detach().clone() for i, t in enumerate(args)}
        self.numbers[f"{name} reached"] = "backward"
        returned = differentiate(step.backward, outputs, [x, z])
        self.numbers[f"{name} reached"] = "end"
        self.numbers |= {f"{name} returned {i}": t for i, t in enumerate(returned)}
        self.numbers |= {f"{name} input gradient {i}": t.grad for i, t in enumerate((x, z))}
        self.numbers |= {f"{name} gradient {path}": copy.copy(p.grad) for path, p in self.model.named_parameters()}

    def _execute(self, action: str, space: dict) -> None:
        with torch.set_grad_enabled(not action.startswith("model.l")):
            exec(action, space)

    def _note_state(self, name: str) -> None:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.numbers |= {f"{name} state {path}": t.detach().clone() for path, t in tensors.items()}
        for attribute in ("seen", "count"):
            value = getattr(self.model, attribute)
            self.numbers[f"{name} {attribute}"] = value.detach().clone() if isinstance(value, Tensor) else value

    def _update(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None and p.grad.isfinite().all():
                    p.sub_(0.1 * p.grad / (1 + p.grad.abs().max()))


def train(model: nn.Module, program: Program, noise: int = 0) -> Numbers:
    return Trainer(model, noise).run(program.steps)


# --- comparing --------------------------------------------------------------------------------------


def difference(program: Program, expected: Numbers, found: Numbers, noises: Callable[[], list[Numbers]]) -> str | None:
    """The first thing that differs, in words."""
    known: list[Numbers] = []
    reads_statistics = any("running_" in line for line in program.lines)
    written = {
        str(i) for i, step in enumerate(program.steps) if "running_" in step.between or "outputs" in step.between
    }
    for name, value in expected.items():
        if name.endswith("message"):
            continue
        if name not in found:
            return f"{name}: missing: {found.get(name[0] + ' raised')} {found.get(name[0] + ' message')}"
        other = found[name]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            if (
                name[0] in written
                and (value, other) == ("backward", "end")
                and IN_PLACE in expected[f"{name[0]} message"]
            ):
                return None  # what plain keeps may not be written to; ours need not keep it
            if reads_statistics and (value, other) == ("end", "backward") and IN_PLACE in found[f"{name[0]} message"]:
                return None  # plain does not notice that running statistics which it keeps have moved
            if value != other:
                return f"{name}: {value} became {other} ({found.get(name[0] + ' message')})"
            continue
        if value.shape != other.shape or value.dtype != other.dtype:
            return f"{name}: {value.shape} {value.dtype} became {other.shape} {other.dtype}"
        if not value.isfinite().all() or value.abs().max() > 1e12:
            return None
        scale = _largest(expected, name)
        error = _distance(value, other)
        if error <= max(1e-9 * float(value.abs().max()), 1e-11 * scale):
            continue
        known = known or noises()
        noise = max(_distance(value, n.get(name)) for n in known)
        if error <= 100 * noise:
            continue
        largest = float(value.abs().max())
        return f"{name}: differs by {error:.2g}, the largest is {largest:.2g}, plain's noise {noise:.2g}"
    extra = [name for name in found if name not in expected]
    return (
        f"{extra[0]}: {found[extra[0]]} where plain has none ({found.get(extra[0][0] + ' message')})" if extra else None
    )


def _distance(value: Tensor, other: Any) -> float:
    if not isinstance(other, Tensor) or other.shape != value.shape:
        return float("inf")
    return float((value.double() - other.double()).abs().max()) if value.numel() else 0.0


def _largest(numbers: Numbers, name: str) -> float:
    return max(
        float(t.abs().max()) for n, t in numbers.items() if isinstance(t, Tensor) and n[0] == name[0] and t.numel()
    )


def failure(program: Program) -> str | None:
    """What differs between a program's module and the optimised one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = program.build()
        optimised = normpass.optimize(copy.deepcopy(plain))
        expected = train(plain, program)
        try:
            found = train(optimised, program)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return difference(program, expected, found, lambda: [train(program.build(), program, n) for n in (10, 20, 30)])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_random_modules_train_the_same(rng):
    program = random_program(rng)
    found = failure(program)
    assert found is None, f"{found}\n{program}"
