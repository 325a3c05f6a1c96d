"""Random modules, as Python source: what `random_training` trains plain and optimized.

random_program(rng)  draws lines of `random_lines`, one by one; a line that plain torch refuses is mostly dropped
Program.source()     the module as text, which can be run, read and cut down by hand; `str()` has the steps as well
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import random
import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from random_lines import BACKWARDS, BEFORE, BETWEEN, LAYOUTS, SECONDS, TEMPLATES, WEIGHTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Step:
    """One training step."""

    before: str = ""
    between: str = ""
    backward: str = "squares"
    samples: int = 2
    layout: str = "contiguous"
    second: str = "other"
    """what the second argument is"""


@dataclass(frozen=True)
class Program:
    """A module and what is done with it."""

    layers: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    returns: str = "x"
    steps: tuple[Step, ...] = (Step(), Step(), Step())

    def source(self) -> str:
        body = "\n".join(self.lines).splitlines()
        layers = [f"self.l{i} = {layer}" for i, layer in enumerate(self.layers)]
        return "\n".join(
            [
                "class Net(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                "        self.alpha, self.depth, self.flag, self.scales = 0.7, 1, True, [0.5, 1.5]",
                "        self.seen, self.count = None, 0",
                '        self.register_buffer("total", torch.tensor(0.5))',
                *(f"        {line}" for line in layers),
                "",
                "    def forward(self, x, z):",
                *(f"        {line}" for line in body),
                f"        return {self.returns}",
                "",
            ]
        )

    def build(self) -> nn.Module:
        """The module in float64, its norms' parameters and statistics away from 1 and 0."""
        source, name = self.source(), f"<random module {next(_numbers)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint}
        space |= {"Frozen": Frozen, "grad_scale": grad_scale}
        exec(compile(source, name, "exec"), space)
        torch.manual_seed(0)
        model: nn.Module = space["Net"]().double()
        for path, tensor in model.state_dict().items():
            layer = model.get_submodule(path.rpartition(".")[0])
            if type(layer).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Frozen")) and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        return model

    def __str__(self) -> str:
        return "\n".join([self.source(), *map(repr, self.steps)])


_numbers = itertools.count(1)


class Frozen(nn.Module):
    """A batch norm of constants, as torchvision's."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.view(1, -1, 1, 1) * (self.running_var.view(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


def grad_scale(x: Tensor) -> Tensor:
    return GradScale.apply(x)


# --- drawing ----------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Draws a program line by line; each is tried out at once."""

    rng: random.Random
    program: Program = field(default_factory=Program)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (2, 4, 8, 8), "z": (2, 4, 8, 8)})

    def write(self, lines: int) -> Program:
        for _ in range(3 * lines):
            if len(self.program.lines) < lines:
                self._draw_line()
        program = replace(self.program, returns=self._returns())
        return replace(program, steps=self._steps())

    def _draw_line(self) -> None:
        texts = [text for text, weight in WEIGHTS.items() for _ in range(weight)]
        template = self.rng.choice(TEMPLATES[self.rng.choice(texts)])
        filled = self._filled(template)
        if filled is None:
            return
        line, layers = filled
        program = replace(self.program, layers=layers, lines=(*self.program.lines, line))
        shapes = _tried(program)
        if shapes is None and (layers != self.program.layers or self.rng.randrange(40)):
            return
        self.program = program
        self.shapes = shapes or self.shapes

    def _filled(self, template: str) -> tuple[str, tuple[str, ...]] | None:
        first = self._value()
        shape = self.shapes[first]
        same = [name for name, other in self.shapes.items() if other == shape]
        number = len(self.program.lines)
        words = {"a": first, "b": self.rng.choice(same), "v": f"v{number}", "w": f"w{number}"}
        words |= dict(zip("CHW", map(str, shape[1:]), strict=True)) | self._layers()
        if not all(word in words for word in re.findall(r"{(\w)}", template)):
            return None
        text, layers = re.sub(r"{(\w)}", lambda m: words[m[1]], template), list(self.program.layers)
        for made in re.findall(r"<((?:nn\.|Frozen)[^<>]*)>", text):
            if made not in layers or self.rng.randrange(8):
                layers.append(made)
            index = len(layers) - 1 - layers[::-1].index(made)
            text = text.replace(f"<{made}>", f"self.l{index}", 1)
        return text, tuple(layers)

    def _layers(self, owner: str = "self") -> dict[str, str]:
        """A batch norm and a layer with a weight, where there are any."""
        found = {}
        for word, kinds in {"n": ("nn.BatchNorm",), "m": ("nn.Conv", "nn.Linear", "nn.BatchNorm", "nn.Gr")}.items():
            there = [i for i, layer in enumerate(self.program.layers) if layer.startswith(kinds)]
            if there:
                found[word] = f"{owner}.l{self.rng.choice(there)}"
        return found

    def _value(self) -> str:
        names = list(self.shapes)
        return names[-self.rng.choice((1, 1, 1, 2, 2, self.rng.randrange(len(names)) + 1))]

    def _returns(self) -> str:
        names = list(self.shapes)
        also = [name for name in names[:-1] if not self.rng.randrange(4)]
        form = self.rng.choice(("{0}, [{1}]", "[{0}, {1}]", "{{'out': {0}, 'others': ({1})}}"))
        others = "".join(f"{name}, " for name in also)
        return form.format(names[-1], others) if also else names[-1]

    def _steps(self) -> tuple[Step, ...]:
        pick = self.rng.choice
        first = Step(layout=pick(LAYOUTS), second=pick(SECONDS), samples=pick((2, 2, 3)))
        steps = []
        for index in range(3):
            between = self._action(BETWEEN, 3)
            before = self._action(BEFORE, 2) if index else ""
            step = replace(first, backward=pick(BACKWARDS), between=between, before=before)
            if index == 2 and not self.rng.randrange(4):
                step = replace(step, samples=4, layout=pick(LAYOUTS), second=pick(SECONDS))
            steps.append(step)
        if not self.rng.randrange(3):
            steps[2] = replace(steps[2], before="model.eval()")
        return tuple(steps)

    def _action(self, actions: list[str], every: int) -> str:
        template = self.rng.choice(actions)
        words = self._layers("model")
        if self.rng.randrange(every) or not all(word in words for word in re.findall(r"{(\w)}", template)):
            return ""
        return re.sub(r"{(\w)}", lambda m: words[m[1]], template)


def random_program(rng: random.Random, lines: int | None = None) -> Program:
    """A program of so many lines; 3 to 10 if none are given."""
    return _Writer(rng).write(lines or rng.randrange(3, 11))


def _tried(program: Program) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the values after one forward and backward; None where it raises or makes no good numbers."""
    torch.manual_seed(0)
    x, z = (torch.randn(2, 4, 8, 8, dtype=torch.float64).requires_grad_().mul(1) for _ in range(2))
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        model = replace(program, returns="dict(locals())").build()
        values = {k: v for k, v in model(x, z).items() if isinstance(v, Tensor) and v.is_floating_point()}
        if all(_is_good(v) for v in values.values()):
            sum(v.square().sum() for v in values.values() if v.requires_grad).backward()
            return {k: tuple(v.shape) for k, v in values.items()}
    return None


def _is_good(value: Tensor) -> bool:
    return value.dim() == 4 and value[0].numel() <= 2048 and bool(value.detach().abs().max() < 1e3)


__all__ = ["Program", "Step", "random_program"]
