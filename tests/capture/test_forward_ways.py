"""What forward calls and which way it goes, by values, shapes, modes and generators."""

from __future__ import annotations

import functools
import os
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from forwards import STATE, C, Net, assert_same, cases, images, multiplied, net, outcome, steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normpass

# --- what is called -------------------------------------------------------------------------------


class Doubling(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


def doubled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, C, 3), Doubling(C), nn.ReLU(), nn.Conv2d(C, C, 3))


def wrapped() -> nn.Module:
    model = Net()
    original = model.forward
    model.forward = lambda *arguments: original(*arguments)
    return model


def either(condition: Callable) -> Callable:
    return lambda self, x: self.last(self.body(x)) if condition(self) else self.last(self.body(x) * 3)


def draw_noise(self, x):
    return self.last(self.body(x) + torch.randn(1, C, 1, 1, dtype=torch.float64))


many = functools.partial(steps, count=5)


def own_generator() -> nn.Module:
    return net(lambda self, x: self.last(self.body(x)) * torch.rand((), generator=self.generator[0]))()


def with_generator() -> nn.Module:
    model = own_generator()
    model.generator = [torch.Generator().manual_seed(1)]
    return model


@functools.lru_cache
def cached(key: int) -> float:
    STATE.log.append(key)
    return float(len(STATE.log))


CALLED = {
    "call overridden": (doubled, steps),
    "numpy generator": (net(either(lambda m: m.rng.random() < 0.5), rng=np.random.default_rng(0)), many),
    "numpy": (net(either(lambda m: np.random.rand() < 0.5)), many),
    "python": (net(either(lambda m: random.random() < 0.5)), many),
    "python generator": (net(either(lambda m: m.rng.random() < 0.5), rng=random.Random(0)), many),
    "torch": (net(either(lambda m: torch.rand(()) < 0.5)), many),
    "torch generator": (with_generator, steps),
    "noise": (net(draw_noise), steps),
    "dropout": (net(lambda self, x: self.last(F.dropout(self.body(x), 0.3))), steps),
    "environment": (
        net(multiplied(lambda self: float(os.environ.get("NORMPASS_TEST", "1")))),
        lambda m: [*steps(m, count=1), *with_environment(m)],
    ),
}


def with_environment(model: nn.Module) -> list[Tensor]:
    os.environ["NORMPASS_TEST"] = "3"
    try:
        return steps(model, count=1)
    finally:
        del os.environ["NORMPASS_TEST"]


@cases(CALLED)
def test_what_forward_calls_is_called_as_often(case) -> None:
    assert_same(*case)


def test_a_forward_wrapped_on_the_instance_runs() -> None:
    assert_same(wrapped, lambda m: steps(m.eval()), norms=0)


# --- which way forward goes -----------------------------------------------------------------------


def read_value_inside_try(self, x):
    y = self.body(x)
    try:
        scale = float(y.detach().abs().max())
    except (TypeError, ValueError):
        scale = 1.0
    return self.last(y * scale)


def iterate(self, x):
    for layer in self.body:
        x = layer(x)
    return self.last(x)


def make_a_layer(self, x):
    return self.last(nn.ReLU(inplace=True)(self.body[:2](x)))


def ask_for_shapes(self, x):
    if x.shape[-1] % 2 or len(x.shape) != 4 or x.dtype == torch.float16:
        return self.last(self.body(F.pad(x, (0, 1))))
    return self.last(self.body(x))[..., : int(x.shape[-1])]


def chunk(self, x):
    parts = list(self.body(x).chunk(2, 1))
    parts.append(parts[-1])
    return self.last(torch.cat([parts[0], parts[2]], 1))


def without_gradients(self, x):
    with torch.no_grad():
        h = self.body(x)
    return self.last(h)


def by_gradient_mode(self, x):
    return self.last(self.body(x)) if torch.is_grad_enabled() else self.last(x[:, [0, 1, 2, 0]])


def by_value(self, x):
    h = self.body(x)
    return self.last(h) if h.mean() > 100 else self.last(h * 2)


def by_type(self, x):
    return self.last(self.body(x)) * (3 if type(x) is nn.Parameter else 1)


def checkpointed(self, x):
    return self.last(checkpoint(self.body, x, use_reentrant=False))


def on_the_cpu(self, x):
    with torch.autograd.graph.save_on_cpu():
        return self.last(self.body(x))


def two_in_training(self, x):
    h = self.body(x)
    return (self.last(h), h) if self.training else self.last(h)


class OwnDict(OrderedDict):
    pass


class Pair(NamedTuple):
    x: Any
    scale: float


class Inner(nn.Module):
    """A namespace: its children are called and it never is itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Net(), nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.last(self.inner.body(x))


class TwoNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleList([self.body])
        self.parent = weakref.ref(self)

    def forward(self, x):
        return self.last(self.body(x) + self.again[0](x))


def both_modes(model: nn.Module) -> list[Tensor]:
    numbers = []
    for training in (True, False, True, False):
        numbers += steps(model.train(training), count=1)
    with torch.no_grad():
        numbers.append(model(images()))
    with torch.inference_mode():
        return [*numbers, model(images()).clone(), *steps(model.train(), count=0)]


WAYS = {
    "value inside try": (net(read_value_inside_try), steps),
    "iterated": (net(iterate), steps),
    "layer made in forward": (net(make_a_layer), steps),
    "shapes": (net(ask_for_shapes), lambda m: [*steps(m), *steps(m, images(2, 3, 5, 5))]),
    "chunks": (net(chunk), steps),
    "gradients off": (net(without_gradients), steps),
    "gradient mode": (net(by_gradient_mode), both_modes),
    "value": (net(by_value), steps),
    "type of the input": (net(by_type), lambda m: [*steps(m), *steps(m, nn.Parameter(images()))]),
    "own dict": (net(lambda self, x: OwnDict(out=self.last(self.body(x)))), steps),
    "namespace": (Inner, steps),
    "two names": (TwoNames, steps),
    "modes": (net(two_in_training), both_modes),
    "arguments": (
        net(lambda self, *xs, **options: self.last(self.body(sum(xs))) * options.get("scale", 1.0)),
        lambda m: [*steps(m, images(), images(seed=1)), *steps(functools.partial(m, scale=2.0).func, images())],
    ),
    "containers": (
        net(lambda self, pair: self.last(self.body(pair.x["image"][0])) * pair.scale),
        lambda m: [*steps(m, Pair({"image": [images()]}, 1.0)), *steps(m, Pair({"image": (images(),)}, 3.0))],
    ),
}


@cases(WAYS)
def test_forward_goes_the_way_it_goes(case) -> None:
    assert_same(*case)


@cases({"checkpoint": checkpointed, "save_on_cpu": on_the_cpu})
def test_hooks_for_saved_tensors_inside_forward_are_in_charge(case) -> None:
    assert_same(net(case), norms=0)


def test_autocast_inside_forward() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(images().float())
        y.sum().backward()
        return [y.dtype == torch.float32, y.detach(), model.last.weight.grad]

    def island(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.last(self.body(x.float()))

    plain, ours = (outcome(net(island), run, optimize) for optimize in (lambda m: m, normpass.optimize))
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert plain[0]
