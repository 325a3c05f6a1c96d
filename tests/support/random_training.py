"""Trains a random module plain and optimized, and finds the first thing that differs.

By hand, 3000 programs of other seeds than the tests', every one that fails cut down and printed:

    OMP_NUM_THREADS=1 .venv/bin/python tests/support/random_training.py 3000 [first seed [sub-batch]]

With the last of the three every chain of layers that may be runs in sub-batches of so many samples.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from nested import leaves as named_leaves
from random_modules import Program, Step, random_program
from torch import Tensor, nn

import normpass
from normpass.capture.dynamo import raising

IN_PLACE = "modified by an inplace operation"
Numbers = dict[str, Any]
"""what was found, by step and name: tensors, None, or words"""


def leaves(value: object) -> list[Tensor]:
    return [t for _, t in named_leaves(value)]


# --- one training -----------------------------------------------------------------------------------


def arguments(step: Step, seed: int, noise: int = 0) -> list[Tensor]:
    """What forward is called with, and the two leaves behind it; with `noise`, moved by one ulp."""
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(step.samples, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    if noise:
        directions = torch.Generator().manual_seed(noise)
        x, z = (torch.nextafter(t, t + torch.randn(t.shape, generator=directions)) for t in (x, z))
    if step.layout != "constant":
        x, z = x.requires_grad_(), z.requires_grad_()
    given = x if step.layout in ("leaf", "constant") else x * 1
    if step.layout == "channels_last":
        given = given.contiguous(memory_format=torch.channels_last)
    if step.layout == "transposed":
        given = given.transpose(2, 3)
    seconds = {"other": lambda: z * 1, "same": lambda: given, "view": lambda: given[:], "detached": given.detach}
    return [given, seconds[step.second](), x, z]


def strided_like(t: Tensor) -> Tensor:
    """A gradient that is not contiguous, for `t`."""
    return torch.randn(t.shape[::-1], dtype=t.dtype).permute(*reversed(range(t.dim())))


def differentiate(way: str, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Backward in one of BACKWARDS; the gradients that it returns."""
    outputs, inputs = ([t for t in tensors if t.requires_grad] for tensors in (outputs, inputs))
    squares = sum((t.square().sum() for t in outputs), torch.zeros(()))
    if not outputs or way == "none" or (way in ("inputs", "second") and not inputs):
        return []
    if way in ("inputs", "second"):
        first = torch.autograd.grad(squares, inputs, create_graph=way == "second", allow_unused=True)
        total = sum((g.square().sum() for g in first if g is not None), torch.zeros(()))
        if total.requires_grad:
            total.backward()
        return list(first)
    if way == "squares":
        squares.backward()
    if way == "twice":
        squares.backward(retain_graph=True)
        squares.backward()
    if way == "sums":
        torch.stack([t.sum() for t in outputs]).sum().backward()
    if way == "strided":
        torch.autograd.backward(outputs, [strided_like(t) for t in outputs])
    if way == "each":
        for index, output in enumerate(outputs):
            output.sin().sum().backward(retain_graph=index + 1 < len(outputs))
    return []


class Training:
    """Trains one model as a program says and notes every number."""

    def __init__(self, model: nn.Module, noise: int = 0):
        self.model, self.noise = model, noise
        self.numbers: Numbers = {}

    def run(self, steps: tuple[Step, ...]) -> Numbers:
        for index, step in enumerate(steps):
            self.model.zero_grad()
            try:
                self._step(index, step)
            except Exception as error:
                # Inside a rewrite, where `raising()` lets it through; users get plain's, whose forward runs then.
                error = getattr(error, "inner_exception", None) or error
                self.numbers[f"{index} raised"] = type(error).__name__
                self.numbers[f"{index} message"] = str(error)
                self._undo_backward(index)
            self._note_state(index)
            self._update()
        return self.numbers

    def _undo_backward(self, index: int) -> None:
        """How far a backward that raises came is nobody's promise: gradients, and what `checkpoint` ran again."""
        self.model.zero_grad()
        if self.numbers[f"{index} reached"] == "backward":
            for name, buffer in self.model.named_buffers():
                buffer.data.copy_(self.numbers[f"{index} buffer {name}"])

    def _note(self, index: int, what: str, values: dict[Any, Tensor | None]) -> None:
        """Tensors as they are now."""
        copies = {name: None if t is None else t.detach().clone() for name, t in values.items()}
        self.numbers |= {f"{index} {what} {name}": t for name, t in copies.items()}

    def _step(self, index: int, step: Step) -> None:
        given = {"model": self.model, "leaves": leaves, "step": step}
        given["arguments"] = lambda step, seed: arguments(step, seed, self.noise)[:2]
        self._reach(index, "before", step.before, given)
        *args, x, z = arguments(step, index, self.noise and self.noise + index)
        torch.manual_seed(index)
        self._reach(index, "forward")
        outputs = leaves(self.model(*args))
        self._note(index, "output", dict(enumerate(outputs)))
        self.numbers[f"{index} layouts"] = [(t.stride(), t.requires_grad) for t in outputs]
        self._reach(index, "between", step.between, given | {"outputs": outputs, "args": args})
        self._note(index, "input", dict(enumerate(args)))
        self._note(index, "buffer", dict(self.model.named_buffers()))
        self._reach(index, "backward")
        returned = differentiate(step.backward, outputs, [x, z])
        self._reach(index, "end")
        self._note(index, "returned gradient", dict(enumerate(returned)))
        self._note(index, "input gradient", {"x": x.grad, "z": z.grad})
        self._note(index, "gradient", {path: p.grad for path, p in self.model.named_parameters()})

    def _reach(self, index: int, phase: str, action: str = "", given: dict[str, Any] | None = None) -> None:
        self.numbers[f"{index} reached"] = phase
        with torch.set_grad_enabled(not action.startswith("model.l")):
            exec(action, given)

    def _note_state(self, index: int) -> None:
        self._note(index, "parameter", dict(self.model.named_parameters()))
        self._note(index, "buffer", dict(self.model.named_buffers()))
        self.numbers[f"{index} count"] = self.model.count
        self._note(index, "attribute", {"seen": self.model.seen})

    def _update(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None and p.grad.isfinite().all():
                    p.sub_(0.1 * p.grad / (1 + p.grad.abs().max()))


# --- comparing --------------------------------------------------------------------------------------


def failure(program: Program, **options: Any) -> str | None:
    """The first thing that differs between a program's module and the optimized one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = program.build()
        optimized = normpass.optimize(copy.deepcopy(plain), **options)
        expected, found = (Training(model).run(program.steps) for model in (plain, optimized))
        noises = (Training(program.build(), noise).run(program.steps) for noise in (10, 20, 30))
        return difference(program, expected, found, noises)


def difference(program: Program, expected: Numbers, found: Numbers, noises: Iterator[Numbers]) -> str | None:
    others: list[Numbers] = []
    for name, value in expected.items():
        other = found.get(name, "nothing")
        if name.endswith("message"):
            continue
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            if is_meant(program, name, expected, found):
                return None
            if value is other or value == other or is_no_gradient(program, name, value, other):
                continue
            return changed(name, value, other, found)
        if value.shape != other.shape or value.dtype != other.dtype:
            return changed(name, value, other, found)
        if not value.isfinite().all() or largest([value]) > 1e12:
            return None
        distance = largest([value - other])
        if distance <= max(1e-9 * largest([value]), 1e-11 * largest(of_step(expected, name))):
            continue
        others = others or list(noises)
        if not distance <= 100 * max(noise_of(value, other.get(name)) for other in others):
            return f"{name}: differs by {distance:.2g}, the largest is {largest([value]):.2g}"
    new = [name for name in found if name not in expected]
    return f"{new[0]}: {found[new[0]]}, where plain has none" if new else None


def changed(name: str, value: Any, other: Any, found: Numbers) -> str:
    return f"{name}: {value} became {other} ({found.get(f'{name[0]} message')})"


def is_meant(program: Program, name: str, expected: Numbers, found: Numbers) -> bool:
    """Whether one raises and the other does not as the module's docstring has it."""
    if not name.endswith("reached"):
        return False
    between = program.steps[int(name[0])].between
    if (expected[name], found[name]) == ("backward", "end"):
        message = expected[f"{name[0]} message"]
        is_written = "outputs" in between
        is_other_mode = between == "model.eval()" and expected[f"{name[0]} raised"] == "CheckpointError"
        return is_other_mode or (is_written and IN_PLACE in message)
    if (expected[name], found[name]) == ("end", "backward"):
        reads_statistics = any("running_" in line for line in program.lines)
        is_written = "args" in between or "outputs" in between  # and kept, in place of what plain keeps
        return (reads_statistics or is_written) and IN_PLACE in found[f"{name[0]} message"]
    return False


def is_no_gradient(program: Program, name: str, value: Any, other: Any) -> bool:
    """None for one and zeros for the other, in a double backward: a norm whose result was written over."""
    is_double = program.steps[int(name[0])].backward == "second" and " gradient " in name
    return is_double and all([t is None or (isinstance(t, Tensor) and not t.any()) for t in (value, other)])


def noise_of(value: Tensor, other: Any) -> float:
    return largest([value - other]) if isinstance(other, Tensor) and other.shape == value.shape else float("inf")


def of_step(numbers: Numbers, name: str) -> list[Tensor]:
    return [t for n, t in numbers.items() if isinstance(t, Tensor) and n[0] == name[0]]


def largest(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


# --- by hand ----------------------------------------------------------------------------------------


def cut_down(program: Program, **options: Any) -> Program:
    """Without the lines, the steps and what is done in them that the failure does not need."""
    for smaller in simpler(program):
        found = failure(smaller, **options)
        if found is not None and "NameError" not in found:
            return cut_down(smaller, **options)
    return program


def simpler(program: Program) -> Iterator[Program]:
    for i in reversed(range(len(program.lines))):
        yield replace(program, lines=program.lines[:i] + program.lines[i + 1 :])
    for i in reversed(range(len(program.steps))):
        if len(program.steps) > 1:
            yield replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
        for field in fields(Step):
            step = replace(program.steps[i], **{field.name: field.default})
            if step != program.steps[i]:
                yield replace(program, steps=(*program.steps[:i], step, *program.steps[i + 1 :]))


def main(count: int, first: int = 0, sub_batch: int = 0) -> None:
    options = {"serialize": normpass.passes.SerializeMinibatch(sub_batch=sub_batch)} if sub_batch else {}
    with raising():
        for seed in range(first, first + count):
            program = random_program(random.Random(seed))
            found = failure(program, **options)
            if found is not None:
                small = cut_down(program, **options)
                print(f"seed {seed}: {found}\ncut down: {failure(small, **options)}\n{small}\n", flush=True)
            if seed % 25 == 0:
                torch._dynamo.reset()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
