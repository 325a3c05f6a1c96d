"""Norms that read concatenations of the same tensors: what matches, what it computes, how often."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_with, quietly
from identity import Layout
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import assert_equal, assert_trains_alike, collected, image, reasons, rewrites, spread, train

import normpass
from normpass import kernels as library
from normpass.measure import kept_bytes, peak_bytes
from normpass.runtime import sharing
from normpass.runtime.functional import split_norm_act
from normpass.runtime.sharing import WITHOUT_RECIPE, producer_statistics, shared_norm_act


class Layer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, growth, 3, padding=1, bias=False)

    def forward(self, features):
        h = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(h)))


class Dense(nn.Module):
    """A DenseNet of two blocks, as torchvision writes it: every concatenation anew from all features."""

    def __init__(self, stem=5, growth=3, depth=3):
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.block1 = nn.ModuleList(Layer(stem + i * growth, growth) for i in range(depth))
        self.norm, self.conv = nn.BatchNorm2d(stem + depth * growth), nn.Conv2d(stem + depth * growth, 4, 1)
        self.block2 = nn.ModuleList(Layer(4 + i * growth, growth) for i in range(2))
        self.last = nn.BatchNorm2d(4 + 2 * growth)
        self.fc = nn.Linear(4 + 2 * growth, 3)

    def forward(self, x):
        x = self.block(self.block1, self.stem(x))
        x = F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)
        x = F.relu(self.last(self.block(self.block2, x)), inplace=True)
        return self.fc(x.mean((2, 3)))

    def block(self, layers, x):
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class Nested(nn.Module):
    """The other way of writing it: each concatenation contains the one before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(4))

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([conv(F.silu(norm(x))), x], 1) if conv is not self.convs[-1] else conv(F.silu(norm(x)))
        return x


class Read(nn.Module):
    """Two convolutions, whose results `read(self, a, b)` concatenates and normalizes."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.norm, self.other = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.last = nn.Conv2d(5, 2, 1)
        self.read = read

    def forward(self, x):
        return self.read(self, self.a(x), self.b(x))


WITH_RECIPE = {without: function for function, without in WITHOUT_RECIPE.items()}


def counts(model, x):
    """How often each function is called, whether its result is kept or not."""
    (graph,) = collected(model, x).graphs
    assert not any("statistics" in name for name in graph.rebuilt)  # moments are computed once a step
    return Counter(WITH_RECIPE.get(n.target, n.target) for n in graph.runs.graph.nodes)


@pytest.fixture(params=["kernels", "reference"])
def kernels(request):
    with library.disabled() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def test_a_dense_net_trains_the_same(kernels):
    torch.manual_seed(0)
    layout = torch.channels_last if kernels == "kernels" else torch.contiguous_format
    model = Dense().to(memory_format=layout)
    optimized = assert_trains_alike(model, image(2, 3, 8, 8, requires_grad=True), prepare=spread)
    assert Layout.of(optimized) == Layout.of(model)


def test_the_graph_of_a_dense_net():
    x = image(2, 3, 8, 8)
    found = rewrites(Dense().double(), x)
    shared = {path for path, rewrite in found.items() if rewrite == "share_statistics"}
    # Of two concatenations of one tensor torchvision's form has none at the start of a block but `cat([x])`.
    assert shared == {path for path in found if "norm2" not in path}
    found = counts(Dense().double(), x)
    assert found[shared_norm_act] == 3 + 1 + 2 + 1 and found[split_norm_act] == 5
    assert found[producer_statistics] == 4 + 3  # each tensor once
    assert torch.cat not in found


def test_nested_concatenations_train_the_same(kernels):
    torch.manual_seed(0)
    model = Nested()
    x = image(2, 3, 6, 6, requires_grad=True)
    assert_trains_alike(model, x, prepare=spread)
    if kernels == "kernels":
        assert list(rewrites(model.train(), x).values()) == ["split_bn", *["share_statistics"] * 3]
        found = counts(model, x)
        assert found[producer_statistics] == 4 and torch.cat not in found


class Moments:
    """Counts channels whose moments are computed, and tensors that are concatenated."""

    def __init__(self, monkeypatch):
        self.channels = self.concatenated = 0
        functions = {"moments_with_update": (sharing, normpass.runtime.functional), "plain_norm_act": (sharing,)}
        for name, modules in functions.items():
            for module in modules:
                monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, function):
        def call(*args):
            if function.__name__ == "moments_with_update":
                self.channels += args[1].shape[1]
            else:
                self.concatenated += 1
            return function(*args)

        return call


def test_moments_are_computed_once_for_every_channel(monkeypatch):
    model = Dense().double()
    optimized = normpass.optimize(model)
    optimized(image(2, 3, 8, 8))
    norms2 = 5 * 6
    own = (5 + 3 * 3) + (4 + 2 * 3)  # channels that convolutions and the pooling make
    read = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) - norms2
    counted = Moments(monkeypatch)
    optimized(image(2, 3, 8, 8)).sum().backward()
    assert counted.channels == own + norms2 and counted.concatenated == 0
    assert own < read
    optimized.eval()
    optimized(image(2, 3, 8, 8))
    assert counted.channels == own + norms2  # none in eval mode
    monkeypatch.undo()


def test_keeps_no_more_and_peaks_no_higher(monkeypatch):
    model = Dense(16, 16, depth=2)
    x = torch.randn(2, 3, 32, 32)
    shared = normpass.optimize(copy.deepcopy(model))
    found = [kept_bytes(shared, x), peak_bytes(shared, x)]
    others = tuple(r for r in normpass.passes.SITES if r.name != "share_statistics")
    monkeypatch.setattr(normpass.passes, "SITES", others)
    split = normpass.optimize(model)
    for ours, theirs in zip(found, [kept_bytes(split, x), peak_bytes(split, x)], strict=True):
        assert ours <= theirs


REFUSED = [
    (lambda m, a, b: m.last(F.relu(m.norm(torch.cat((a, b)[:1] * 2, 0)))), "no concatenation", 3),
    (lambda m, a, b: m.last(F.relu(m.norm(c := torch.cat((a, b), 1))) + c), "another consumer, `add`", 5),
    (lambda m, a, b: m.last(F.relu(m.norm(torch.cat((b, a[:, 2:], b), 1)))), "is twice in the concatenation", 5),
    (lambda m, a, b: m.last(F.relu(m.norm(torch.cat((a, b), 1)).add_(1))), "", 5),
    (lambda m, a, b: m.last(F.relu(m.norm(torch.cat((a, b), 1)) + F.pad(a, (0, 0, 0, 0, 0, 2)))), "a residual", 5),
    (lambda m, a, b: (m.last(F.relu(m.norm(torch.cat((a, b), 1)))), a.mul_(2))[0], "changed in place later", 5),
    (lambda m, a, b: m.last(F.silu(m.norm(torch.cat((a, b), 1))).mul_(2)), "", 5),
    (lambda m, a, b: m.last(F.relu(m.norm(torch.cat((a, b), 1))).mul_(2)), "", 5),
]


@pytest.mark.parametrize("read, reason, channels", REFUSED, ids=[r[1] or "in place" for r in REFUSED])
def test_refuses(read, reason, channels):
    model = Read(read)
    if channels == 3:
        model.norm, model.last = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
    x = image(2, 3, 6, 6)
    spread(model)
    choices = [c for graph in collected(model, x).graphs for c in graph.choices]
    told = [r.reason for c in choices for r in c.refusals if r.rewrite == "share_statistics"]
    assert choices and (not reason or (told and reason in told[0]))
    if trains(model, x):
        assert_trains_alike(model, x)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            normpass.optimize(model)(x).sum().backward()


def trains(model, x):
    """Whether plain's backward runs: what is written to what it saves makes it raise."""
    try:
        copy.deepcopy(model)(x).sum().backward()
    except RuntimeError:
        return False
    return True


def test_two_norms_of_one_concatenation(kernels):
    def read(m, a, b):
        c = torch.cat((a, b), dim=1)
        return m.last(F.relu(m.norm(c)) * torch.sigmoid(m.other(c)))

    model = Read(read)
    x = image(2, 3, 6, 6, requires_grad=True)
    assert_trains_alike(model, x, prepare=spread)
    if kernels == "kernels":
        assert set(rewrites(model.train(), x).values()) == {"share_statistics"}


def test_pieces_that_are_rebuilt_themselves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.norm = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(7)
            self.last = nn.Conv2d(7, 2, 1)

        def forward(self, x):
            z = F.relu(self.norm_a(self.a(x)))
            return self.last(F.relu(self.norm(torch.cat((z, self.b(z)), 1))))

    model = Net()
    x = image(2, 3, 32, 32)
    optimized = assert_trains_alike(model, x, prepare=spread)
    assert rewrites(model.train(), x) == {"norm_a": "split_bn", "norm": "share_statistics"}
    kept = kept_bytes(optimized.train(), x)
    assert kept < 1.1 * (4 + 3 + 3) * x[:, :1].numel() * 8  # a(x), b(z) and x


CHANGES = {
    "one frozen": lambda m: m.block1[1].norm1.eval(),
    "first and last frozen": lambda m: (m.block1[0].norm1.eval(), m.norm.eval()),
    "all of a block frozen": lambda m: m.block1.eval(),
    "momentum None": lambda m: setattr(m.block1[1].norm1, "momentum", None),
    "frozen parameters": lambda m: [p.requires_grad_(False) for p in m.block1.parameters()],
    "frozen trunk": lambda m: [p.requires_grad_(False) for p in m.stem.parameters()],
}


def changed_in_the_middle(change: Callable) -> Callable:
    """Two steps, a change, two more and a forward in eval mode."""

    def run(model: nn.Module, x: Any) -> dict[str, Any]:
        numbers = {f"before {name}": t for name, t in train(model, (x,), steps=1).items()}
        change(model.train())
        return numbers | train(model, (x,))

    return run


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_changed_at_run_time(change):
    torch.manual_seed(0)
    model = spread(Dense(depth=2))
    run = changed_in_the_middle(CHANGES[change])
    assert_equal(*(run(net, image(2, 3, 8, 8)) for net in (copy.deepcopy(model), normpass.optimize(model))))


def test_a_hook_that_comes_later_is_called():
    model, seen = spread(Dense(depth=2)), []
    optimized = normpass.optimize(copy.deepcopy(model))
    for net in (model, optimized):
        net(image(2, 3, 8, 8))
        net.block1[1].norm1.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    assert_equal(*(train(net, (image(2, 3, 8, 8),)) for net in (model, optimized)))
    assert len(seen) == 2 * 3 and len(set(seen)) == 1  # plain and optimized: two steps and an eval forward each


def test_batches_without_values_or_with_one():
    model = Dense().double()
    optimized = normpass.optimize(copy.deepcopy(model))
    empty = image(2, 3, 8, 8)[:0]
    torch.testing.assert_close(optimized.eval()(empty), model.eval()(empty))
    one = Read(lambda m, a, b: m.norm(torch.cat((a, b), 1))).double()
    for net in (one, normpass.optimize(copy.deepcopy(one))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            net(image(1, 3, 1, 1))


def test_under_checkpoint_and_without_gradients():
    def run(model, x):
        with torch.no_grad():
            model(x)
        return checkpoint(model, x, use_reentrant=False)

    assert_trains_alike(Dense(), image(2, 3, 8, 8, requires_grad=True), prepare=spread, run=run)


def test_gradients_accumulate_over_two_forwards():
    def run(model, x):
        return model(x) + model(x.flip(0) * 2)

    assert_trains_alike(Dense(), image(3, 3, 8, 8, requires_grad=True), prepare=spread, run=run)


def test_bf16_and_autocast():
    torch.manual_seed(0)
    model = Dense(8, 8)
    optimized = normpass.optimize(copy.deepcopy(model))
    x = torch.randn(4, 3, 16, 16)
    gradients = []
    for net in (model, optimized):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


def test_second_derivatives():
    model = spread(Dense())
    optimized = normpass.optimize(copy.deepcopy(model))
    found = []
    for net in (model, optimized):
        x = image(2, 3, 8, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, net.block1[0].norm1.weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))


def test_reason_in_the_report():
    x = image(2, 3, 8, 8)
    assert (
        reasons(Read(REFUSED[1][0]).double(), x)["norm"]
        == "the concatenation that it reads has another consumer, `add`"
    )
    assert reasons(Dense(depth=1).double(), x)["block1.0.norm2"] == ""  # what reads no concatenation is not told so


def test_train_and_eval_by_turns():
    model = spread(Dense())
    optimized = normpass.optimize(copy.deepcopy(model))
    x = image(2, 3, 8, 8)
    for training in (False, True, False, True):
        assert_equal(train(model.train(training), (x,)), train(optimized.train(training), (x,)))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiles_in_one_graph_and_trains_the_same(fresh_dynamo, inner):
    model = spread(Dense(depth=2))
    other = copy.deepcopy(model)
    x = image(2, 3, 8, 8, requires_grad=True)
    expected = train(model, (x,))
    compiled = compile_with(other, inner)
    assert_equal(expected, train(other, (x,), run=lambda _, x: quietly(compiled, x)))


def test_compiled_keeps_what_eager_keeps(fresh_dynamo):
    model = Dense(16, 16, depth=2)
    x = torch.randn(2, 3, 32, 32)
    plain, eager = (kept_bytes(m, x) for m in (model, normpass.optimize(model)))
    kept = quietly(kept_bytes, compile_with(model, "aot_eager"), x)
    assert kept <= 1.12 * eager < 0.55 * plain
