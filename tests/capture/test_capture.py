"""Forward's Python: read when it runs, written when it runs, called as often as written; and who must see it plain.

Each case is run plain and optimized from the same start, and gives the same numbers, or raises the same.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import random
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nested import leaves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import ConvNet, collected, image, loss_of, norms, spread

import normpass
from normpass.measure import kept_bytes
from normpass.optimized import state_of

C = 4
TOLERANCE = 1e-11


def block(inputs: int = C, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, C, 3, padding=1), nn.BatchNorm2d(C), activation())


class Net(nn.Module):
    """conv → norm → ReLU → conv; what a case does stands in its `forward`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.body, self.last = block(3), nn.Conv2d(C, C, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.last(self.body(x))


def net(forward: Callable = Net.forward, **attributes: Any) -> Callable[[], nn.Module]:
    """A factory of a `Net` with this forward; every call has a class and attributes of its own."""

    def make() -> nn.Module:
        return type("Case", (Net,), {"forward": forward})(**copy.deepcopy(attributes))

    return make


def images(*shape: int, seed: int = 0) -> Tensor:
    return image(*(shape or (2, 3, 6, 6)), seed=seed)


def steps(model: Callable, *args: Any, count: int = 2) -> list[Tensor]:
    """Outputs and gradients of steps without an optimizer, and the buffers afterwards."""
    numbers: list[Tensor] = []
    for _ in range(count):
        model.zero_grad()
        output = model(*(args or (images(),)))
        loss_of(output).backward()
        numbers += [t.detach().clone() for _, t in leaves(output)]
        numbers += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return numbers + [b.clone() for b in model.buffers()]


def then(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], list[Tensor]]:
    """A step, a change, a step."""

    def run(model: nn.Module) -> list[Tensor]:
        first = steps(model, count=1)
        change(model)
        return first + steps(model, count=1)

    return run


STATE = types.SimpleNamespace()
"""what forward reads and writes outside its module"""


def outcome(make: Callable[[], nn.Module], run: Callable, optimize: Callable) -> list[Tensor]:
    STATE.__dict__.update(factor=1.0, log=[], object=None)
    globals()["FACTOR"] = 1.0
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = optimize(spread(make()))
    return [torch.as_tensor(n).double() for n in run(model)]


def assert_equal(plain: Iterable[Tensor], ours: Iterable[Tensor]) -> None:
    plain, ours = list(plain), list(ours)
    assert len(plain) == len(ours)
    for a, b in zip(plain, ours, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(a.nan_to_num().abs().max()) if a.numel() else 0.0)
        torch.testing.assert_close(b, a, rtol=0, atol=scale * TOLERANCE, equal_nan=True)


def assert_same(make: Callable[[], nn.Module], run: Callable = steps, norms: int = 1) -> int:
    """Plain and optimized give the same; at least so many norms were rewritten. Returns the number of graphs."""
    graphs: list[Any] = []

    def optimize(model: nn.Module) -> nn.Module:
        optimized = normpass.optimize(model)
        state_of(optimized).observers.append(lambda rewritten, inputs: graphs.append(rewritten))
        return optimized

    assert_equal(outcome(make, run, lambda model: model), outcome(make, run, optimize))
    assert sum(choice.rewrite is not None for graph in graphs for choice in graph.choices) >= norms
    return len(graphs)


def cases(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


# --- what forward reads ---------------------------------------------------------------------------


class Factors(Enum):
    ONE = 1
    THREE = 3


@dataclasses.dataclass(slots=True)
class Settings:
    scale: float = 1.0


class WithProperty(Net):
    @property
    def flag(self) -> float:
        return self.scale + 1

    def forward(self, x):
        return self.last(self.body(x)) * self.flag


def with_closure() -> nn.Module:
    factor = 1.0

    class Closed(Net):
        def forward(self, x):
            return self.last(self.body(x)) * factor

        def change(self):
            nonlocal factor
            factor = 3.0

    return Closed()


def multiplied(factor: Callable) -> Callable:
    return lambda self, x: self.last(self.body(x)) * factor(self)


def set_class_flag(model: nn.Module) -> None:
    next(c for c in type(model).__mro__ if "flags" in vars(c)).flags = [3.0]


def with_class_list() -> nn.Module:
    return type("Case", (Net,), {"flags": [1.0], "forward": multiplied(lambda self: self.flags[0])})()


FACTOR = 1.0
READ = {
    "attribute": (net(multiplied(lambda self: self.flag), flag=1.0), lambda m: setattr(m, "flag", 3.0)),
    "sign of zero": (
        net(lambda self, x: self.last(self.body(x)) + 1 / torch.full((), self.flag).clamp(-1, 1).exp(), flag=0.5),
        lambda m: setattr(m, "flag", -0.5),
    ),
    "class attribute": (with_class_list, set_class_flag),
    "class list": (with_class_list, lambda m: m.flags.__setitem__(0, 3.0)),
    "property": (lambda: WithProperty(scale=1.0), lambda m: setattr(m, "scale", 3.0)),
    "enum": (
        net(multiplied(lambda self: self.flag.value), flag=Factors.ONE),
        lambda m: setattr(m, "flag", Factors.THREE),
    ),
    "list": (net(multiplied(lambda self: self.flags[0]), flags=[1.0]), lambda m: m.flags.__setitem__(0, 3.0)),
    "tuple in a dict": (
        net(multiplied(lambda self: self.table["scale"][0]), table={"scale": (1.0,)}),
        lambda m: m.table.update(scale=(3.0,)),
    ),
    "slots": (
        net(multiplied(lambda self: self.settings.scale), settings=Settings()),
        lambda m: setattr(m.settings, "scale", 3.0),
    ),
    "namespace": (
        net(multiplied(lambda self: self.config.inner.scale), config=types.SimpleNamespace(inner=Settings())),
        lambda m: setattr(m.config.inner, "scale", 3.0),
    ),
    "global": (net(multiplied(lambda self: FACTOR)), lambda m: globals().update(FACTOR=3.0)),
    "field of a global": (net(multiplied(lambda self: STATE.factor)), lambda m: setattr(STATE, "factor", 3.0)),
    "closure": (with_closure, lambda m: m.change()),
    "function": (net(lambda self, x: self.act(self.body[:2](x)), act=F.relu), lambda m: setattr(m, "act", torch.tanh)),
    "partial": (
        net(lambda self, x: self.act(self.body[:2](x)), act=functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda m: setattr(m, "act", functools.partial(F.leaky_relu, negative_slope=0.7)),
    ),
    "numpy": (
        net(multiplied(lambda self: float(self.values.sum())), values=np.ones(2)),
        lambda m: m.values.__setitem__(0, 5.0),
    ),
    "key that comes later": (
        net(multiplied(lambda self: self.table.get("scale", 1.0)), table={}),
        lambda m: m.table.update(scale=3.0),
    ),
    "hasattr": (
        net(multiplied(lambda self: 3.0 if hasattr(self, "extra") else 1.0)),
        lambda m: setattr(m, "extra", True),
    ),
    "tensor attribute": (
        net(multiplied(lambda self: self.scale), scale=torch.ones((), dtype=torch.float64)),
        lambda m: m.scale.mul_(3),
    ),
    "eps": (net(), lambda m: setattr(m.body[1], "eps", 0.3)),
    "momentum": (net(), lambda m: setattr(m.body[1], "momentum", 0.7)),
    "cumulative average": (net(), lambda m: setattr(m.body[1], "momentum", None)),
    "frozen norm": (net(), lambda m: m.body[1].eval()),
    "requires_grad": (net(), lambda m: m.body[0].weight.requires_grad_(False)),
    "option of an activation": (
        lambda: nn.Sequential(*block(3, nn.LeakyReLU), nn.Conv2d(C, 2, 1)),
        lambda m: setattr(m[2], "negative_slope", 0.5),
    ),
    "approximation": (
        lambda: nn.Sequential(*block(3, nn.GELU), nn.Conv2d(C, 2, 1)),
        lambda m: setattr(m[2], "approximate", "tanh"),
    ),
    # what stands where
    "layer replaced": (net(), lambda m: m.body.__setitem__(2, nn.Softplus())),
    "norm replaced": (net(), lambda m: m.body.__setitem__(1, nn.Identity())),
    "layer appended": (net(), lambda m: m.body.append(nn.Softplus())),
    "layer deleted": (net(), lambda m: m.body.__delitem__(2)),
    "forward of a layer": (net(), lambda m: setattr(m.body[2], "forward", lambda x: F.relu(x) * 2)),
    "forward of the model": (
        net(),
        lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.last(x[:, :1].repeat(1, C, 1, 1)), m)),
    ),
    "hook": (net(), lambda m: m.body[0].register_forward_hook(lambda layer, args, y: y * 2)),
    "hook of the model": (net(), lambda m: m.register_forward_hook(lambda layer, args, y: y * 2)),
    "hook of the norm": (net(), lambda m: m.body[1].register_forward_pre_hook(lambda layer, args: (args[0].exp(),))),
    "parameter": (net(), lambda m: setattr(m.last, "weight", nn.Parameter(m.last.weight.detach() * 3))),
    "parametrisation": (net(), lambda m: nn.utils.parametrizations.weight_norm(m.last)),
}


@cases(READ)
def test_what_forward_reads_is_read_at_every_call(case) -> None:
    make, change = case
    assert_same(make, then(change))
    changed = outcome(make, then(change), lambda model: model)
    with pytest.raises(AssertionError):  # the change matters
        assert_equal(changed, outcome(make, then(lambda model: None), lambda model: model))


# --- what forward writes --------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.shapes: list = []

    def hook(self, module, inputs, output) -> None:
        self.shapes.append(output.shape)


def hooked() -> nn.Module:
    model, model_recorder = Net(), Recorder()
    model.body.register_forward_hook(model_recorder.hook)
    STATE.object = model_recorder
    return model


def append_to_global(self, x):
    STATE.log.append(len(STATE.log))
    return self.last(self.body(x)) * len(STATE.log)


def set_attribute(self, x):
    self.seen = self.body(x)
    self.calls = self.calls + 1
    return self.last(self.seen)


def count_in_a_list(self, x):
    self.count[0] += 1
    return self.last(self.body(x)) * self.count[0]


def fill_a_dict(self, x):
    self.table.setdefault(x.shape[0], []).append(x.mean())
    return self.last(self.body(x))


def remember(self, x):
    self.seen.append(self.body(x))
    return self.last(self.seen[-1])


def write_a_tensor(self, x):
    self.scale.mul_(2)
    return self.last(self.body(x)) * self.scale


class Buffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.written.add_(1)
        self.replaced = self.replaced + 1
        return self.last(self.body(x)) * (self.written + self.replaced)


WRITTEN = {
    "global list": (net(append_to_global), lambda m: [*steps(m), len(STATE.log)]),
    "attributes": (net(set_attribute, calls=0), lambda m: [*steps(m), m.seen.detach(), m.calls]),
    "counter": (net(count_in_a_list, count=[0]), lambda m: [*steps(m), m.count[0]]),
    "dict": (net(fill_a_dict, table={}), lambda m: [*steps(m), *m.table[2]]),
    "activations in a list": (net(remember, seen=[]), lambda m: [*steps(m), *(t.detach() for t in m.seen)]),
    "tensor attribute": (
        net(write_a_tensor, scale=torch.ones((), dtype=torch.float64)),
        lambda m: [*steps(m), m.scale],
    ),
    "buffers": (Buffers, steps),
    "object of a hook": (hooked, lambda m: [*steps(m), len(STATE.object.shapes)]),
}


@cases(WRITTEN)
def test_what_forward_writes_is_written_at_every_call(case) -> None:
    assert_same(*case)


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


# --- what writes to what --------------------------------------------------------------------------


class Two(nn.Module):
    """Two convolutions; `write` gets their results before the norm reads their concatenation."""

    def __init__(self, write: Callable) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), nn.BatchNorm2d(2 * C)
        self.last, self.write = nn.Conv2d(2 * C, 2, 1), write

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        self.write(a)
        return self.last(F.relu(self.norm(torch.cat([a, b], 1))))


WRITES = {
    "ravel": lambda a: a.ravel().mul_(0.5),
    "diagonal": lambda a: a.diagonal(0, 2, 3).add_(1),
    "foreach": lambda a: torch._foreach_mul_([a, a[:1].detach().clone()], 0.5),
    "foreach of views": lambda a: torch._foreach_add_([a[0], a[1, 2:]], 1.0),
    "out": lambda a: torch.mul(a.detach(), 0.5, out=a.detach()),
    "data": lambda a: a.data.mul_(0.5),
    "item": lambda a: a.__setitem__((slice(None), 0), 0.25),
    "transpose": lambda a: a.mT.neg_(),
    "narrow": lambda a: a.narrow(1, 1, 2).tanh_(),
    "as_strided": lambda a: a.as_strided((2, 2), (1, 3)).zero_(),
}


@cases(WRITES)
def test_a_write_through_any_view_is_seen(case) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            first = model(images())
        return [first, *steps(model, count=1)]

    assert_same(lambda: Two(case), run)


def read_statistics(self, x):
    h = self.body[0](x)
    y = self.body[1](h)
    seen = self.body[1].running_mean.clone()
    return self.last(F.relu(y + h)) + seen.view(1, -1, 1, 1)


def write_weight(self, x):
    h = self.body[0](x)
    y = self.body[1](h)
    with torch.no_grad():
        self.body[1].bias.add_(1)
    return self.last(F.relu(y + h) + self.body[1].bias.view(1, -1, 1, 1))


def write_input(self, x):
    h = self.body[0](x)
    y = self.body[1](h.clone())
    h.mul_(2)
    return self.last(F.relu(y + h))


@cases({"read": read_statistics, "weight": write_weight, "residual": write_input})
def test_what_stands_between_a_norm_and_its_addition(case) -> None:
    assert_same(net(case))


def mask_in_place(self, x):
    z = self.body(x)
    y = self.last(z)
    z[z > 0.5] = 0.0
    return y


def weight_in_place(self, x):
    y = self.last(self.body(x))
    with torch.no_grad():
        self.last.weight.mul_(2)
    return y


@cases({"masked": mask_in_place, "weight": weight_in_place})
def test_what_plain_refuses_in_backward_is_refused(case) -> None:
    for optimize in (lambda model: model, normpass.optimize):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outcome(net(case), steps, optimize)


# --- other modules than those that are called -----------------------------------------------------


def test_a_graph_module_that_is_recompiled() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        first = steps(model, count=1)
        node = next(n for n in model.graph.nodes if n.target == "body.2")
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)
        model.recompile()
        return first + steps(model, count=1)

    assert_same(lambda: torch.fx.symbolic_trace(Net()), run)


def test_a_slice_of_an_optimized_sequential() -> None:
    assert_same(lambda: nn.Sequential(*block(3), nn.Conv2d(C, C, 1)), lambda m: steps(m[:2]) + steps(m), norms=1)


def test_an_activation_that_a_list_holds() -> None:
    def make() -> nn.Module:
        model = net(remember, seen=[])()
        model.seen.append(model.last(torch.zeros(1, C, 2, 2)))
        return model

    assert_same(make)


def test_models_of_one_class_have_graphs_of_their_own() -> None:
    models = [spread(net(multiplied(lambda self: self.flag), flag=float(i))()) for i in (1, 2)]
    for model, optimized in [(m, normpass.optimize(m)) for m in models]:
        assert_equal([model(images()).detach()], [optimized(images()).detach()])


# --- errors ---------------------------------------------------------------------------------------


def raise_one(self, x):
    if x.shape[0] == 1:
        raise LookupError(f"one sample of {x.shape[1]} channels")
    return self.last(self.body(x))


ERRORS = {
    "channels": (net(), lambda m: m(images(2, 5, 6, 6))),
    "one value": (net(), lambda m: m(images(1, 3, 1, 1))),
    "eps": (net(), lambda m: (setattr(m.body[1], "eps", -1.0), m(images()))),
    "dimensions": (net(), lambda m: m(images(2, 6))),
    "raised": (net(raise_one), lambda m: m(images(1, 3, 6, 6))),
    "too few arguments": (net(), lambda m: m()),
    "unknown argument": (net(), lambda m: m(images(), unknown=1)),
    "no tensor": (net(), lambda m: m("image")),
    "dtype": (net(), lambda m: m(images().float())),
}


@cases(ERRORS)
@pytest.mark.parametrize("is_first", [True, False], ids=["first call", "later"])
def test_an_error_is_plains_and_the_next_call_is_captured(case, is_first: bool) -> None:
    make, call = case
    found = []
    model = spread(make())
    optimized = normpass.optimize(copy.deepcopy(model))
    if not is_first:
        model(images())
        optimized(images())
    graphs: list = []
    state_of(optimized).observers.append(lambda rewritten, inputs: graphs.append(rewritten))
    for m in (model, optimized):
        with pytest.raises(Exception) as caught:
            call(m)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    for m in (model, optimized):
        m.body[1].eps = 0.1
    assert_equal(steps(model, images(3, 3, 5, 5)), steps(optimized, images(3, 3, 5, 5)))
    assert any(c.rewrite for g in graphs for c in g.choices)


# --- shapes and numbers that change ---------------------------------------------------------------


def test_sizes_and_numbers_that_change_keep_the_saving() -> None:
    sizes = [(2, 3, n, n + 2) for n in (6, 9, 7, 8, 11)] + [(3, 3, 6, 6)]
    assert assert_same(net(), lambda m: [n for size in sizes for n in steps(m, images(*size), count=1)]) <= 3

    def scale(model: nn.Module) -> list[Tensor]:
        numbers = []
        for step in range(6):
            model.flag = 1.0 + step / 8
            numbers += steps(model, count=1)
        return numbers

    assert assert_same(net(multiplied(lambda self: self.flag), flag=1.0), scale) <= 2

    def schedule(model: nn.Module) -> list[Tensor]:
        numbers = steps(model, count=1)
        for momentum in (0.2, 0.3):
            model.body[1].momentum, model.body[1].eps = momentum, momentum / 100
            numbers += steps(model, count=1)
        return numbers

    assert_same(net(), schedule, norms=3)


def test_other_sizes_keep_as_little() -> None:
    model = normpass.optimize(net()())
    for size in (32, 48):
        x = torch.randn(2, 3, size, size)
        kept = kept_bytes(model, x)
    fresh = normpass.optimize(net()())
    assert kept == kept_bytes(fresh, x) < 0.8 * kept_bytes(net()(), x)


# --- where the graph ends -------------------------------------------------------------------------


class Parts(nn.Module):
    """A break between two blocks, and a part that cannot be captured at all."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.last = block(3), block(), nn.Conv2d(C, 2, 1)

    def forward(self, x):
        h = self.before(x)
        torch._dynamo.graph_break()
        return self.last(self.after(h))


def test_a_break_costs_what_crosses_it_and_is_told() -> None:
    assert assert_same(Parts, norms=2) == 2
    found = collected(Parts().double(), images())
    assert "graph_break" in found.graphs[0].ends and "test_capture.py" in found.graphs[0].ends
    assert [g.ends for g in found.graphs[1:]] == [""]
    assert [c.rewrite for g in found.graphs for c in g.choices] == ["split_bn", "split_bn"]
    x = torch.randn(2, 3, 32, 32)
    plain = kept_bytes(Parts(), x)
    crosses = 2 * C * 32 * 32 * 4
    kept = kept_bytes(normpass.optimize(Parts()), x)
    whole = kept_bytes(normpass.optimize(nn.Sequential(block(3), block(), nn.Conv2d(C, 2, 1))), x)
    assert kept <= whole + crosses + 1024 < plain


class Opaque(nn.Module):
    """What Dynamo refuses to look into."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    @torch._dynamo.disable
    def forward(self, x):
        return self.body(x)


class Loop(nn.Module):
    """Layers in a list, one of which cannot be captured: the others are captured one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Opaque(), nn.Conv2d(C, 3, 1), Net()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_cannot_be_captured_is_left_out_and_told() -> None:
    assert_same(Loop, norms=2)
    rows = norms(Loop().double(), images())
    found = {path: (row.rewrite, row.reason) for path, row in rows.items()}
    assert found["layers.1.body.1"] == (None, "no captured graph calls it")
    assert [found[f"layers.{i}.body.1"][0] for i in (0, 3)] == ["split_bn", "split_bn"]


# --- what stays as it was -------------------------------------------------------------------------


def draw_and_count(self, x):
    self.count[0] += 1
    return self.last(self.body(x)) if np.random.rand() + random.random() < torch.rand(()) else self.body(x)


def test_explaining_draws_nothing_and_writes_nothing() -> None:
    model = net(draw_and_count, count=[0])()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    normpass.explain(model, images().float())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert model.count == [0] and model.body[1].num_batches_tracked == 0


def test_threads_may_run_while_another_one_captures() -> None:
    model = spread(ConvNet()).eval()
    optimized, expected = normpass.optimize(model), model(image()).detach()
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(5):
                assert_equal([expected], [optimized(image()).detach()])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    other = normpass.optimize(spread(ConvNet()))
    loss_of(other(image())).backward()
    for thread in threads:
        thread.join()
    assert not errors
