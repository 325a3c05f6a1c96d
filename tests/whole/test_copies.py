"""Copies, slices and other instances of an optimized model: optimized models of their own, or plain ones."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from conv_blocks import block
from torch import fx, nn
from training import ConvNet, assert_equal, captures_of, image, loss_of, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.optimized import state_of

X = image()


def is_ours(optimized: nn.Module) -> bool:
    """Whether a step of training runs rewritten graphs."""
    seen = captures_of(optimized)
    optimized.train()(image(3, 3, 6, 6))
    return any(choice.rewrite == "split_bn" for graph in seen for choice in graph.choices)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_copy_is_optimized_and_on_its_own(pair) -> None:
    optimized = pair[1]
    optimized.layer_decay = 0.5
    optimized(X), pair[0](X)
    before = {k: v.clone() for k, v in optimized.state_dict().items()}
    expected = train(pair[0], (X,))
    for again in (copy.deepcopy, through_pickle, through_torch_save):
        other = again(optimized)
        assert isinstance(other, normpass.Optimized) and type(other) is type(optimized)
        assert isinstance(other, ConvNet) and other.layer_decay == 0.5 and other.training
        assert_equal(expected, train(other, (X,)))
        assert kept_bytes(other.train(), X) < 0.8 * kept_bytes(pair[0].train(), X)
        assert not again(optimized.eval()).training
        optimized.train()
    torch.testing.assert_close(dict(optimized.state_dict()), before, rtol=0, atol=0)


def test_a_copy_keeps_what_was_asked_for() -> None:
    model = spread(nn.Sequential(*block(), nn.Conv2d(4, 2, 1)))
    optimized = normpass.optimize(model, changes=("leaky_relu",), allow_lossy=True)
    other = through_pickle(copy.deepcopy(optimized))
    assert state_of(other).request == state_of(optimized).request
    numbers = [train(copy.deepcopy(m), (X,), steps=1) for m in (model, optimized, other)]
    assert_equal(*numbers[1:])
    with pytest.raises(AssertionError):
        assert_equal(*numbers[:2])
    assert type(normpass.restore(other)[2]) is nn.ReLU


def test_a_shallow_copy_and_a_copy_of_a_trainer(pair) -> None:
    optimized = pair[1]
    optimizer = torch.optim.SGD(optimized.parameters(), lr=0.1)
    copied, copied_optimizer = copy.deepcopy((optimized, optimizer))
    assert [id(p) for p in copied.parameters()] == [id(p) for p in copied_optimizer.param_groups[0]["params"]]
    shallow = copy.copy(optimized)
    assert all(a is b for a, b in zip(shallow.parameters(), optimized.parameters(), strict=True))
    averaged = [torch.optim.swa_utils.AveragedModel(m) for m in pair]
    for m in averaged:
        m.update_parameters(pair[0])
    torch.testing.assert_close(averaged[1].eval()(X), averaged[0].eval()(X))


def test_slices_and_what_is_made_of_the_class(pair) -> None:
    """Plain modules, that can be run, copied, stored and optimized again."""
    torch.manual_seed(0)
    model = spread(nn.Sequential(*block(), *block(4, 4), nn.Conv2d(4, 2, 1)))
    optimized = normpass.optimize(model)
    seen = captures_of(optimized)
    optimized(X)
    made = {
        "slice": (optimized[:3], model[:3]),
        "sum": (optimized[:2] + optimized[2:4], model[:4]),
        "class": (type(optimized)(*model), model),
    }
    for other, plain in made.values():
        plain = copy.deepcopy(plain)
        other = through_pickle(copy.deepcopy(other))
        torch.testing.assert_close(other(X), plain(X))
        assert isinstance(other, nn.Sequential) and len(seen) == 1
        again = normpass.optimize(other)
        assert_equal(train(plain, (X,), steps=1), train(again, (X,), steps=1))
        assert is_ours(again)
    of_class = type(pair[1])(channels=2).double()
    assert isinstance(of_class, ConvNet) and of_class.stem[0].out_channels == 2
    of_class.load_state_dict(ConvNet(2).double().state_dict())
    assert_equal(*(train(m, (X,), steps=1) for m in (copy.deepcopy(of_class), normpass.optimize(of_class))))


def test_a_sequential_whose_layers_change() -> None:
    pair = [spread(nn.Sequential(*block(), nn.Conv2d(4, 4, 1))) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    pair[1] = normpass.optimize(pair[1])
    changes = {
        "append": lambda m, layer: m.append(layer),
        "insert": lambda m, layer: m.insert(1, layer),
        "extend": lambda m, layer: m.extend([layer, nn.Tanh()]),
        "set": lambda m, layer: m.__setitem__(0, nn.Sequential(m[0], layer)),
        "delete": lambda m, layer: m.__delitem__(-1),
    }
    pair[1](X), pair[0](X)
    for change in changes.values():
        results = []
        for m in pair:
            torch.manual_seed(2)
            change(m, nn.BatchNorm2d(4).double())
            m.zero_grad()
            y = m(X)
            loss_of(y).backward()
            results.append([y, [p.grad for p in m.parameters()], list(m.buffers())])
        torch.testing.assert_close(results[1], results[0])


def test_graph_modules() -> None:
    """Optimized as any other; `recompile` after a change of the graph is seen, copies are optimized."""
    torch.manual_seed(0)
    plain = fx.symbolic_trace(spread(ConvNet()))
    optimized = normpass.optimize(copy.deepcopy(plain))
    assert_equal(train(plain, (X,)), train(optimized, (X,)))
    for m in (plain, optimized):
        m.train()
        (output,) = (n for n in m.graph.nodes if n.op == "output")
        with m.graph.inserting_before(output):
            output.args = (m.graph.call_function(torch.mul, (output.args[0], 3.0)),)
        m.recompile()
    assert "torch.mul" in optimized.code and isinstance(optimized, normpass.Optimized)
    for again in (copy.deepcopy, through_pickle, through_torch_save):
        other = again(optimized)
        assert_equal(train(copy.deepcopy(plain), (X,), steps=1), train(other, (X,), steps=1))
        assert is_ours(other)
    for m in (plain, optimized):
        m.graph = fx.symbolic_trace(ConvNet()).graph
    assert_equal(train(plain, (X,), steps=1), train(optimized, (X,), steps=1))


def test_nothing_holds_a_model_that_is_gone() -> None:
    optimized = normpass.optimize(spread(ConvNet()))
    loss_of(optimized(X)).backward()
    gone = weakref.ref(optimized)
    del optimized
    gc.collect()
    assert gone() is None
