"""Errors, sizes that change, where a graph ends and what stays as it was: the plain model's, at every call."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
from forwards import C, Net, assert_equal, assert_same, block, cases, images, multiplied, net, steps
from torch import Tensor, nn
from training import ConvNet, captures_of, collected, image, loss_of, norms, spread

import normpass
from normpass.measure import kept_bytes

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
    graphs = captures_of(optimized)
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
