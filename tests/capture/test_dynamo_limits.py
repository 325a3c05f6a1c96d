"""What Dynamo alone gets wrong is right while `capturing`: the same numbers as plain after every change."""

from __future__ import annotations

import collections
import functools
import os
import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo import config, convert_frame, guards, symbolic_convert

from normpass.capture.dynamo_limits import capturing

X = torch.arange(1.0, 5.0, dtype=torch.float64)
VARIABLE = "NORMPASS_TEST_VARIABLE"


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every frame is captured as ours are."""
    original = convert_frame.ConvertFrame.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with capturing():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(convert_frame.ConvertFrame, "__call__", call)
    monkeypatch.delenv(VARIABLE, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Computes `function(self, x)`."""

    def __init__(self, function: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def results(make: Callable[[], nn.Module], changes: Any, compiled: bool) -> list[Tensor]:
    model = make()
    called = torch.compile(model, backend="eager") if compiled else model
    found = []
    for change in changes:
        change(model)
        found.append(called(X.clone()))
    return found


def assert_as_plain(make: Callable[[], nn.Module], *changes: Callable[[nn.Module], object]) -> None:
    """Call, change and call again, plain and captured; signs of zeros and dtypes count."""
    steps = (lambda model: None, *changes)
    expected, found = results(make, steps, False), results(make, steps, True)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert [t.signbit().tolist() for t in found] == [t.signbit().tolist() for t in expected]


def nothing(model: nn.Module) -> None:
    """Call again as it is."""


def put(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, value)


# --- random ---------------------------------------------------------------------------------------

RNG = random.Random(0)
DRAWS = {
    "own": lambda m, x: x * m.rng.random(),
    "own_methods": lambda m, x: x * m.rng.uniform(1, 2) + m.rng.randint(0, 999) + m.rng.gauss(0, 1),
    "own_choice": lambda m, x: x * m.rng.choice(range(1, 99)),
    "own_state": lambda m, x: x * sum(m.rng.getstate()[1]),
    "global": lambda m, x: x * RNG.random(),
    "made_in_forward": lambda m, x: x * random.Random(3).random(),
    "module": lambda m, x: x * random.random() + random.randint(0, 99) + random.uniform(0, 1) + random.randrange(9),
    "module_sample": lambda m, x: x * random.sample(range(100), 1)[0],
    "module_gauss": lambda m, x: x * random.gauss(0, 1),
    "module_instance": lambda m, x: x * random._inst.random(),
    "generator_expression": lambda m, x: x * sum(random.random() for _ in range(3)),
    "branch": lambda m, x: x * 2 if random.random() < 0.5 else x,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws(name: str) -> None:
    def make() -> nn.Module:
        random.seed(0)
        RNG.seed(0)
        return Net(DRAWS[name], rng=random.Random(0))

    assert_as_plain(make, *[nothing] * 5)


def test_shuffle_and_seed_in_forward() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        random.shuffle(model.order)
        x = x * model.order[0]
        random.seed(len(model.order))
        return x + random.random()

    def make() -> nn.Module:
        random.seed(0)
        return Net(forward, order=list(range(20)))

    assert_as_plain(make, *[nothing] * 3)


def test_a_new_generator_is_new_at_every_call() -> None:
    compiled = torch.compile(Net(lambda m, x: x * random.Random().random()), backend="eager")
    assert len({compiled(X).sum().item() for _ in range(4)}) == 4


# --- what is read outside the model ---------------------------------------------------------------

READS = {
    "getenv": lambda m, x: x * float(os.getenv(VARIABLE, "7")),
    "get": lambda m, x: x * float(os.environ.get(VARIABLE, "7")),
    "in": lambda m, x: x * 2 if VARIABLE in os.environ else x,
}


@pytest.mark.parametrize("name", READS)
def test_environment(name: str) -> None:
    set_to = [lambda m, v=v: os.environ.__setitem__(VARIABLE, v) for v in ("2", "3")]

    def make() -> nn.Module:
        os.environ.pop(VARIABLE, None)
        return Net(READS[name])

    assert_as_plain(make, *set_to, lambda m: os.environ.pop(VARIABLE))


def test_environment_written_in_forward() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        os.environ[VARIABLE] = str(int(os.environ.get(VARIABLE, "0")) + 1)
        return x * float(os.environ[VARIABLE])

    def make() -> nn.Module:
        os.environ.pop(VARIABLE, None)
        return Net(forward)

    assert_as_plain(make, nothing, nothing)


def first_of(model: Any, x: Tensor) -> Tensor:
    for values in model.maps:
        try:
            return x * values["scale"]
        except KeyError:
            continue
    return x


def test_a_key_that_comes_later() -> None:
    add = [lambda m, i=i: m.maps[i].__setitem__("scale", 2.0 + i) for i in (1, 0)]
    assert_as_plain(lambda: Net(first_of, maps=[{}, {}]), *add, lambda m: m.maps[0].clear())
    chain = [lambda m, i=i: m.chain.maps[i].__setitem__("scale", 2.0 + i) for i in (1, 0)]
    make = lambda: Net(lambda m, x: x * m.chain["scale"], chain=collections.ChainMap({}, {"scale": 1.0}))  # noqa: E731
    assert_as_plain(make, *chain)


@functools.lru_cache
def cached(key: str) -> float:
    CALLS.append(key)
    return float(len(CALLS))


CALLS: list[str] = []


def test_a_cached_function_runs_once() -> None:
    def make() -> nn.Module:
        CALLS.clear()
        cached.cache_clear()
        return Net(lambda m, x: x * cached("a"))

    assert_as_plain(make, nothing, lambda m: cached.cache_clear(), nothing)
    assert len(CALLS) == 2


class Counted:
    """What is no module, with a method that is cached."""

    @functools.cache  # noqa: B019
    def of(self, key: str) -> torch.Tensor:
        CALLS.append(key)
        return torch.tensor(float(len(CALLS)))


class OfCachedMethods(Net):
    @functools.lru_cache(maxsize=2)  # noqa: B019
    def scale(self, key: str) -> torch.Tensor:
        CALLS.append(key)
        return torch.tensor(float(len(CALLS)))


def test_a_cached_method_runs_once() -> None:
    def make() -> nn.Module:
        CALLS.clear()
        OfCachedMethods.scale.cache_clear()
        return OfCachedMethods(lambda m, x: x * m.scale("a") + m.counted.of("b") * m.scale("a"), counted=Counted())

    assert_as_plain(make, nothing, lambda m: OfCachedMethods.scale.cache_clear(), nothing)
    assert CALLS == ["a", "b", "a"]


# --- equal, but not the same ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        (0.0, -0.0, 0.0),
        (-0.0, 0.0, float("nan"), -0.0),
        ((0.0, 1.0), (-0.0, 1.0)),
        (((0.0,),), ((-0.0,),)),
        ((True,), (1,), (1.0,), (True,)),
        (frozenset({1}), frozenset({True}), frozenset({1.0})),
    ],
    ids=str,
)
def test_equal_values_of_another_kind(values: tuple) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        value = model.value
        while isinstance(value, (tuple, frozenset)):
            value = list(value)[0]
        return (x > 1) * value

    assert_as_plain(lambda: Net(forward, value=values[0]), *(put("value", value) for value in values[1:]))


def test_a_negative_zero_in_other_places() -> None:
    settings = types.SimpleNamespace(scale=0.0)

    def write(value: float) -> Callable[[nn.Module], None]:
        def change(model: Any) -> None:
            settings.scale = model.values[0] = model.table["a"] = value

        return change

    def forward(model: Any, x: Tensor) -> Tensor:
        return torch.stack([x * settings.scale, x * model.values[0], x * model.table["a"]])

    make = lambda: Net(forward, values=[0.0], table={"a": 0.0})  # noqa: E731
    settings.scale = 0.0
    assert_as_plain(make, write(-0.0), write(0.0), write(-0.0), write(0.0))


def test_what_is_equal_and_the_same_is_not_captured_again() -> None:
    graphs: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    model = Net(lambda m, x: x * m.scale + m.shape[0], scale=0.0, shape=(1, 2.0))
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        model.scale, model.shape = float("0"), tuple([1, float("2")])
        compiled(X)
    assert len(graphs) == 1


# --- hooks, what a model asks ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_comes_later(kind: str) -> None:
    handles: list[Any] = []

    def add(model: nn.Module) -> None:
        hook = (lambda m, args: (args[0] * 3,)) if "pre" in kind else (lambda m, args, out: out * 3)
        handles.append(getattr(model[0], kind)(hook))

    assert_as_plain(lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), add, lambda m: handles.pop().remove())


@pytest.mark.filterwarnings("ignore:.*is_compiling.* is deprecated")
@pytest.mark.parametrize("ask", [torch.compiler.is_compiling, torch._dynamo.is_compiling, torch._utils.is_compiling])
def test_a_model_that_asks_whether_it_is_compiled(ask: Callable[[], bool]) -> None:
    assert_as_plain(lambda: Net(lambda m, x: x * 2 if ask() else x))


def test_guards_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(guards, "profile_guard_manager", lambda *args: timed.append(args) or 0.0)
    assert_as_plain(lambda: Net(lambda m, x: x * 2))
    assert not timed


# --- nobody else is touched -----------------------------------------------------------------------


def test_everything_is_put_back_and_held_alone() -> None:
    before = symbolic_convert.is_stdlib, config.skip_nnmodule_hook_guards
    taken: list[bool] = []

    def try_lock() -> None:
        taken.append(convert_frame.compile_lock.acquire(blocking=False))

    with pytest.raises(ValueError, match="stop"), capturing(), capturing():
        assert symbolic_convert.is_stdlib is not before[0] and not config.skip_nnmodule_hook_guards
        other = threading.Thread(target=try_lock)
        other.start()
        other.join()
        raise ValueError("stop")
    assert (symbolic_convert.is_stdlib, config.skip_nnmodule_hook_guards) == before
    assert taken == [False]


def test_a_network_stays_one_graph() -> None:
    graphs: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0)).double()
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(torch.ones(2, 3, 8, 8, dtype=torch.float64))
    assert len(graphs) == 1
