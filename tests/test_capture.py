"""A graph is used only where it says what forward would do: what it relies on is guarded, the rest is refused."""

from __future__ import annotations

import copy
import random
import threading
import types
import warnings
from collections import OrderedDict
from enum import Enum

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from training import ConvNet, assert_equal, assert_trains_alike, image, rewrites, spread, train

import normpass
from normpass.capture import find_parts
from normpass.module import part_of

C = 4


def block(inputs: int = 3, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Two blocks; subclasses say in `run` what stands around them."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.a, self.b = block(), block(C, C)
        for name, value in attributes.items():
            setattr(self, name, value)
        spread(self)

    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return self.b(self.a(x))


def why_untraceable(model: nn.Module) -> str:
    """Why the model's own forward cannot be traced; its parts must be optimised all the same."""
    report = normpass.explain(model)
    assert [row.rewrite for row in report.rows] == ["split_bn", "split_bn"]
    return report.untraceable[""]


def programs(optimised: nn.Module) -> int:
    return len(part_of(optimised).programs)


# --- what forward read ----------------------------------------------------------------------------


class ReadsFlag(Net):
    def run(self, x):
        h = self.b(self.a(x))
        return h * self.flag


class ReadsClassFlag(ReadsFlag):
    flag = 1.0


class ReadsProperty(ReadsFlag):
    @property
    def flag(self):
        return self.scale + 1


class Factors(Enum):
    ONE = 1
    THREE = 3


class ReadsEnum(Net):
    def run(self, x):
        return self.b(self.a(x)) * self.factor.value


class ReadsContainers(Net):
    def run(self, x):
        factor = self.numbers[0] * self.table["scale"][0] * self.config.scale
        return self.b(self.a(x)) * factor


def containers() -> ReadsContainers:
    return ReadsContainers(numbers=[1.0], table={"scale": (1.0,)}, config=types.SimpleNamespace(scale=1.0))


def set_item(name, key, value):
    return lambda model: getattr(model, name).__setitem__(key, value)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (lambda: ReadsFlag(flag=1.0), lambda m: setattr(m, "flag", 3.0)),
        (ReadsClassFlag, lambda m: setattr(m, "flag", 3.0)),
        (lambda: ReadsProperty(scale=1.0), lambda m: setattr(m, "scale", 3.0)),
        (lambda: ReadsEnum(factor=Factors.ONE), lambda m: setattr(m, "factor", Factors.THREE)),
        (containers, set_item("numbers", 0, 3.0)),
        (containers, set_item("table", "scale", (3.0,))),
        (containers, lambda m: setattr(m.config, "scale", 3.0)),
        (lambda: Net(), lambda m: setattr(m.a[1], "eps", 0.3)),
        (lambda: Net(), lambda m: setattr(m.a[1], "momentum", 0.7)),
        (lambda: Net(), lambda m: setattr(m.a[1], "momentum", None)),
    ],
    ids="flag class_flag property enum list dict_of_tuple object eps momentum cumulative".split(),
)
def test_a_changed_value_is_read(model, change) -> None:
    plain = model()
    before = train(copy.deepcopy(plain), (image(),))
    assert_trains_alike(plain, image(), after=change)
    with pytest.raises(AssertionError):  # the change matters
        assert_equal(before, train(plain, (image(),)))


def test_a_changed_class_attribute_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ReadsClassFlag()
    assert_trains_alike(model, image(), after=lambda m: monkeypatch.setattr(ReadsClassFlag, "flag", 3.0))


@pytest.mark.parametrize(
    ("activation", "name", "value"),
    [
        (nn.LeakyReLU(0.1), "negative_slope", 0.5),
        (nn.ELU(1.0), "alpha", 0.3),
        (nn.Hardtanh(-1, 1), "max_val", 0.2),
        (nn.Softplus(1.0), "beta", 3.0),
        (nn.GELU(), "approximate", "tanh"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_changed_option_of_an_absorbed_activation_is_read(activation, name, value) -> None:
    model = spread(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), activation, nn.Conv2d(C, 2, 1)))
    assert_trains_alike(model, image(), after=lambda m: setattr(m[2], name, value))


class TrainingBranch(Net):
    """As GoogLeNet: another output in training."""

    def run(self, x):
        h = self.a(x)
        h = F.dropout(h, 0.3, training=self.training)
        return (self.b(h), h) if self.training else self.b(h)


def test_training_flags_switch_between_two_programs() -> None:
    model = TrainingBranch()
    optimised = normpass.optimize(model)
    plain = copy.deepcopy(model)
    for step in range(6):
        training = step % 2 == 0
        outputs = []
        for m in (plain, optimised):
            torch.manual_seed(step)
            outputs.append(m.train(training)(image()))
        assert isinstance(outputs[1], tuple) == training
        torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(dict(optimised.named_buffers()), dict(plain.named_buffers()))
    assert programs(optimised) == 2


# --- what stands where ----------------------------------------------------------------------------


class Listed(Net):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Namespace(Net):
    """A module whose children are called and which is never called itself."""

    def run(self, x):
        return self.inner.b(self.inner.a(x))


def replace(path: str, new: nn.Module):
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copy.deepcopy(new))

    return change


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (Net, replace("a.2", nn.GELU())),
        (Net, replace("a.0", nn.Conv2d(3, C, 1).double())),
        (Net, replace("a.1", nn.Identity())),
        (Net, replace("b", nn.Sequential(nn.Softplus(), nn.BatchNorm2d(C)).double())),
        (Net, lambda m: m.a.append(nn.Softplus())),
        (Net, lambda m: m.a.insert(1, nn.Softplus())),
        (Net, lambda m: m.b.__delitem__(2)),
        (lambda: Listed(layers=nn.ModuleList([block(), block(C, C)])), lambda m: m.layers.append(nn.Softplus())),
        (lambda: Listed(layers=nn.ModuleList([block(), block(C, C)])), lambda m: m.layers.pop(1)),
        (lambda: Namespace(inner=Net()), replace("inner.a.2", nn.Softplus())),
        (lambda: Namespace(inner=Net()), replace("inner.b", nn.Softplus())),
    ],
    ids="activation conv norm block append insert delete list_append list_pop nested namespace".split(),
)
def test_a_replaced_layer_runs(model, change) -> None:
    torch.manual_seed(0)
    assert_trains_alike(model(), image(), after=change)


@pytest.mark.parametrize("path", ["a", "a.2", "a.1"])
def test_a_forward_replaced_later_runs(path: str) -> None:
    def change(model: nn.Module) -> None:
        layer = model.get_submodule(path)
        layer.forward = lambda x: type(layer).forward(layer, x) * 2

    assert_trains_alike(Net(), image(), after=change)


def test_global_hooks_see_every_layer() -> None:
    model, seen = spread(ConvNet()), []
    optimised = normpass.optimize(model)
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        expected = model(image())
        of_plain = list(seen)
        seen.clear()
        torch.testing.assert_close(optimised(image()), expected)
    finally:
        handle.remove()
    assert seen == of_plain


# --- what a graph cannot say ----------------------------------------------------------------------


class NoGrad(Net):
    def run(self, x):
        with torch.no_grad():
            h = self.a(x)
        return self.b(h)


class NoGradMethod(Net):
    @torch.no_grad()
    def features(self, x):
        return self.a(x)

    def run(self, x):
        return self.b(self.features(x))


class Checkpointed(Net):
    def run(self, x):
        return checkpoint(self.b, self.a(x), use_reentrant=False)


class CheckpointedReentrant(Net):
    def run(self, x):
        return checkpoint(self.b, self.a(x), use_reentrant=True)


class CheckpointedSequential(Net):
    def run(self, x):
        return checkpoint_sequential([self.a, self.b], 2, x, use_reentrant=False)


class SavesOnCpu(Net):
    def run(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.b(self.a(x))


class AsksGradMode(Net):
    def run(self, x):
        return self.b(self.a(x)) if torch.is_grad_enabled() else self.a(x)


class PythonRandom(Net):
    def run(self, x):
        return self.b(self.a(x)) if random.random() < 0.5 else self.a(x)


class NumpyRandom(Net):
    def run(self, x):
        return self.b(self.a(x)) * float(np.random.rand())


class TorchRandom(Net):
    def run(self, x):
        return self.b(self.a(x)) if torch.rand(()) < 0.5 else self.a(x)


class Noise(Net):
    def run(self, x):
        return self.b(self.a(x) + torch.randn(1, C, 1, 1, dtype=torch.float64))


class SetsAttribute(Net):
    def run(self, x):
        self.last = self.a(x)
        return self.b(self.last)


class Counts(Net):
    def run(self, x):
        self.count[0] += 1
        return self.b(self.a(x)) * self.count[0]


class Remembers(Net):
    def run(self, x):
        h = self.a(x)
        self.seen.append(h)
        return self.b(h)


class DependsOnValues(Net):
    def run(self, x):
        h = self.a(x)
        return self.b(h) if h.mean() > 0 else h


class OwnDict(OrderedDict):
    pass


class ReturnsOwnDict(Net):
    def run(self, x):
        return OwnDict(out=self.b(self.a(x)))


class Switch(nn.Module):
    """Returns a list where it is told to."""

    def forward(self, x):
        return [x] if x.mean() < 100 else x


class AsksForType(Net):
    def run(self, x):
        h = self.switch(self.a(x))
        return self.b(h[0] if isinstance(h, list) else h)


REFUSED = {
    NoGrad: "without gradients",
    NoGradMethod: "without gradients",
    Checkpointed: "under `checkpoint`",
    CheckpointedReentrant: "under `checkpoint`",
    CheckpointedSequential: "under `checkpoint`",
    SavesOnCpu: "saved-tensor hooks",
    AsksGradMode: "asks whether gradients are on",
    PythonRandom: "draws random numbers",
    NumpyRandom: "draws random numbers",
    TorchRandom: "draws random numbers",
    Noise: "sets `self._tensor_constant0`",
    SetsAttribute: "sets `self.last`",
    Counts: "changes `self.count`",
    Remembers: "changes `self.seen`",
    DependsOnValues: "control flow",
    ReturnsOwnDict: "makes a OwnDict",
    AsksForType: "asks for the type of `switch`",
}


def seeded(model, x):
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed)
    return model(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_a_graph_cannot_say_is_left_as_it_is(cls: type[Net]) -> None:
    model = cls(count=[0], seen=[], switch=Switch())
    assert REFUSED[cls] in why_untraceable(model)
    assert (model.count, model.seen) == ([0], [])
    assert_trains_alike(model, image(requires_grad=True), run=seeded)


def test_tracing_draws_nothing_and_leaves_nothing_patched() -> None:
    models = [cls(count=[0], seen=[], switch=Switch()) for cls in REFUSED]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    patched = nn.Module.__setattr__, torch.is_grad_enabled, torch.amp.autocast_mode.autocast.__enter__
    for model in models:
        normpass.optimize(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert (nn.Module.__setattr__, torch.is_grad_enabled, torch.amp.autocast_mode.autocast.__enter__) == patched
    assert "__getattribute__" not in vars(nn.Module)


class FloatIsland(Net):
    def run(self, x):
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(h.float())


def test_autocast_switched_inside_stays_switched() -> None:
    model = FloatIsland().float()
    optimised = normpass.optimize(model)
    assert "switches autocast" in why_untraceable(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(image().float()), optimised(image().float())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_no_grad_is_seen_when_it_is_traced_without_gradients() -> None:
    model = NoGrad(flag=True)
    with torch.no_grad():
        optimised = normpass.optimize(model)
    assert_equal(train(copy.deepcopy(model), (image(),)), train(optimised, (image(),)))


class TensorAttribute(Net):
    """A tensor that is neither parameter nor buffer, written and read."""

    def run(self, x):
        self.scale.mul_(2)
        return self.b(self.a(x)) * self.scale


def test_a_tensor_attribute_is_written_at_every_call() -> None:
    given = TensorAttribute(scale=torch.ones(()))
    plain = copy.deepcopy(given)
    optimised = normpass.optimize(given)
    assert given.scale == 1
    assert_equal(train(plain, (image(),)), train(optimised, (image(),)))
    assert optimised.scale == plain.scale == 8


class BufferCounter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def run(self, x):
        self.count.add_(1)
        return self.b(self.a(x)) * self.count


def test_a_buffer_that_forward_writes() -> None:
    assert_trains_alike(BufferCounter(), image())


# --- arguments ------------------------------------------------------------------------------------


class Arguments(Net):
    def forward(self, x, skip=None, scale=1.0, *, flag=False):
        h = self.a(x)
        h = h if skip is None else h + skip
        return {"out": self.b(h) * scale} if flag else self.b(h) * scale


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((image(),), {}),
        ((), {"x": image()}),
        ((image(), image(2, C, 8, 8)), {}),
        ((image(),), {"skip": image(2, C, 8, 8), "scale": 3.0}),
        ((image(), None, 2), {"flag": True}),
        ((image(),), {"flag": False, "scale": image(1)}),
    ],
)
def test_optional_arguments(args: tuple, kwargs: dict) -> None:
    optimised = assert_trains_alike(Arguments(), *args, **kwargs)
    assert all(program is not None for _, program in part_of(optimised).programs)


@pytest.mark.parametrize(
    "call", [lambda m: m(), lambda m: m(image(), image(2, C, 8, 8), 1.0, True), lambda m: m(image(), unknown=1)]
)
def test_a_wrong_call_raises_what_plain_raises(call) -> None:
    model = Arguments()
    with pytest.raises(TypeError) as expected:
        call(model)
    with pytest.raises(TypeError) as found:
        call(normpass.optimize(model))
    assert str(found.value) == str(expected.value)


class TakesBatch(Net):
    def forward(self, batch):
        if isinstance(batch, torch.Tensor):
            return self.b(self.a(batch))
        if isinstance(batch, dict):
            h = self.a(batch["x"])
            return self.b(h) if batch.get("mask") is None else self.b(h) * batch["mask"]
        x, *others = batch
        return self.b(self.a(x)) * (1 + len(others)) * (2 if None in others else 1)


class AsksWhatItHas(Net):
    def run(self, x):
        return self.b(self.a(x.values_of if hasattr(x, "values_of") else x * 2))


def test_a_tensor_has_what_a_tensor_has() -> None:
    model = AsksWhatItHas()
    assert normpass.explain(model).untraceable == {}
    assert_trains_alike(model, image())


@pytest.mark.parametrize(
    "batch",
    [
        image(),
        {"x": image()},
        {"x": image(), "mask": None},
        {"mask": image(2, 1, 8, 8), "x": image()},
        [image()],
        (image(), None),
        [image(), 2.0, "name"],
    ],
)
def test_an_argument_that_holds_tensors(batch: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimised = assert_trains_alike(TakesBatch(), batch)
    assert all(program is not None for _, program in part_of(optimised).programs)


class Scaled(Net):
    def forward(self, x, scale=1.0):
        factor = 5.0 if scale is True else float(np.sum(scale))
        return self.b(self.a(x)) * factor


def test_constants_that_are_equal_and_not_the_same() -> None:
    model = Scaled().eval()
    optimised = normpass.optimize(model)
    numbers = [1.0]
    for scale in (1, True, 1.0, numbers, np.ones(2), np.ones(3)):
        torch.testing.assert_close(optimised(image(), scale), model(image(), scale))
    numbers[0] = 7.0
    torch.testing.assert_close(optimised(image(), numbers), model(image(), numbers))


class CachesInEval(nn.Module):
    """As LeViT does: in eval mode forward fills a cache, so that it cannot be traced there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.cache: dict = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.cache["calls"] = self.cache.get("calls", 0) + 1
        return self.last(torch.relu(self.norm(self.conv(x))))


def test_a_mode_that_cannot_be_traced_leaves_the_other_optimised() -> None:
    optimised = normpass.optimize(CachesInEval().double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            optimised.eval()(x)  # no warning: nothing is kept without gradients
        program = part_of(optimised).programs[0][1]
        assert optimised.train()(x).grad_fn is not None
        assert program.guard.holds() and part_of(optimised).programs[0][1] is program
    with pytest.warns(UserWarning, match=r"changes `self.cache`"):
        optimised.eval()(x)
    optimised(x)  # only once


def test_sixteen_programs_then_plain_with_one_warning() -> None:
    model = Scaled().eval()
    optimised = normpass.optimize(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in range(30):
            torch.testing.assert_close(optimised(image(), float(scale)), model(image(), float(scale)))
    assert programs(optimised) == 16
    assert [str(w.message) for w in caught] == [
        "normpass: Scaled runs unoptimised for this call: it was traced 16 times for different flags or arguments"
    ]


class Variadic(Net):
    def forward(self, *images, **options):
        return self.b(self.a(sum(images))) * options.get("scale", 1.0)


def test_variadic_arguments_leave_the_parts() -> None:
    model = Variadic()
    assert why_untraceable(model) == "its forward takes `*images`"
    assert_trains_alike(model, image(), image(seed=1), scale=2.0)


# --- parts ----------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        h = self.inner(x)
        return h if h.mean() < 100 else h * 2


class Middle(nn.Module):
    """Traceable itself, around one block that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.odd, self.after = block(), Untraceable(block(C, C)), block(C, C)

    def forward(self, x):
        return self.after(self.odd(self.before(x)))


def test_an_untraceable_block_is_left_and_what_is_in_it_and_around_it_is_not() -> None:
    model = spread(Middle())
    parts = find_parts(model)
    assert set(parts.captures) == {"", "odd.inner"}
    assert list(parts.untraceable) == ["odd"]
    assert set(rewrites(model).values()) == {"split_bn"}
    assert_trains_alike(model, image(requires_grad=True))


def test_an_untraceable_root() -> None:
    model = spread(Untraceable(Untraceable(ConvNet())))
    assert set(find_parts(model).captures) == {"inner.inner"}
    assert_trains_alike(model, image(requires_grad=True))


def test_threads_may_train_while_another_one_traces() -> None:
    model, other = TrainingBranch(), spread(ConvNet())
    optimised = normpass.optimize(copy.deepcopy(model))
    expected = model.eval()(image())
    errors: list[Exception] = []

    def work() -> None:
        try:
            for index in range(20):
                other.scratch = index
                other(image())
                optimised.eval()
                torch.testing.assert_close(optimised(x=image()), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        normpass.optimize(model)
    for thread in threads:
        thread.join()
    assert not errors
