"""An optimized module under somebody else's torch.compile: the plain forward, the plain numbers, one warning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import quietly
from conv_blocks import Functional
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from training import assert_equal, captures_of, image, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.optimized import _warn_of_compiler


@pytest.fixture(autouse=True)
def fresh_warning(fresh_dynamo: None) -> None:
    _warn_of_compiler.cache_clear()


def by(forward: Callable) -> Callable:
    """For `train`: the call goes through `forward`, without what torch itself warns of while it compiles."""
    return lambda model, *args: quietly(forward, *args)


class ReadsAValue(nn.Module):
    """Ends the graph in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        h = self.first(x)
        return self.last(h * h.detach().mean().item())


def test_one_graph_the_same_numbers_and_one_warning(pair) -> None:
    plain, optimized = pair
    expected = train(plain, (image(),), steps=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimized, backend=counter, fullgraph=True)
    captured = captures_of(optimized)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert_equal(expected, train(optimized, (image(),), steps=4, run=lambda m, x: compiled(x)))
    ours = [str(w.message) for w in caught if "normpass" in str(w.message)]
    assert len(ours) == 1 and 'torch.compile(model, backend="normpass")' in ours[0]
    assert counter.frame_count == 2  # one for training, one without gradients
    assert not captured
    assert_equal(*(train(m.train(), (image(),)) for m in pair))  # not compiled: ours
    assert captured


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graph_breaks_and_a_cumulative_average(backend: str) -> None:
    model = spread(ReadsAValue())
    optimized = normpass.optimize(copy.deepcopy(model))
    compiled = torch.compile(optimized, backend=backend)
    x = image(requires_grad=True)
    assert_equal(train(model, (x,)), train(optimized, (x,), run=by(compiled)))


def test_a_part_of_what_is_compiled(pair) -> None:
    """Optimized before or inside somebody's compiled trainer, called as a module, as a function and as a method."""
    x = image(requires_grad=True)
    plain, optimized = pair
    expected = train(nn.Sequential(copy.deepcopy(plain), nn.Tanh()), (x,))
    whole = nn.Sequential(copy.deepcopy(optimized), nn.Tanh())
    assert_equal(expected, train(whole, (x,), run=by(torch.compile(whole, backend="aot_eager"))))
    whole = nn.Sequential(optimized, nn.Tanh())
    whole.compile(backend="eager")
    assert_equal(expected, train(whole, (x,), run=by(whole)))


def test_by_our_own_backend_nobody_is_warned(pair) -> None:
    plain, optimized = pair
    x = image()
    options: dict[str, Any] = {"inner": "eager"}
    compiled = torch.compile(optimized, backend="normpass", options=options, fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        compiled(x)
    assert not [w for w in caught if "normpass" in str(w.message)]
    plain(x)
    assert_equal(train(plain, (x,)), train(optimized, (x,), run=lambda m, x: compiled(x)))
    plain.train(), optimized.train()
    assert kept_bytes(compiled, x) == kept_bytes(optimized, x) < 0.8 * kept_bytes(plain, x)


def test_a_changed_model_is_not_compiled_as_the_plain_one() -> None:
    optimized = normpass.optimize(spread(Functional()), changes=("leaky_relu",))
    for model in (optimized, nn.Sequential(optimized)):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(normpass.StaleChangeError, match="somebody else's torch.compile sees it"):
            quietly(compiled, image())
