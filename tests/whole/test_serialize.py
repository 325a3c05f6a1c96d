"""`optimize(model, x, serialize=…)`: the option around `normpass.passes.SerializeMinibatch`."""

import copy
import pickle
import random

import pytest
import torch
from random_modules import Program, Step, random_program
from random_training import failure
from sub_batches import small_resnet
from torch import nn
from training import assert_equal, captures_of, image, spread, train

import normpass
from normpass.measure import forward_peak_bytes
from normpass.passes import SerializeMinibatch

X = torch.randn(12, 3, 24, 24, generator=torch.Generator().manual_seed(0))
SMALL = SerializeMinibatch(buffer_bytes=200_000)


class Net(nn.Module):
    """Two blocks with group norms; a batch norm between them, which must see the whole batch."""

    def __init__(self, norm=lambda c: nn.GroupNorm(2, c)):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 16, 3, padding=1), norm(16)
        self.b, self.norm_b = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.middle = nn.BatchNorm2d(16)
        self.c, self.norm_c = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norm_a(self.a(x)))
        x = self.middle(torch.relu(self.norm_b(self.b(x))))
        return self.head(torch.relu(self.norm_c(self.c(x))).mean((2, 3)))


class Frozen(nn.Module):
    """No norm that `optimize` would otherwise look at."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("make", [Net, Frozen])
def test_same_numbers_with_less_memory_in_forward(make):
    torch.manual_seed(0)
    plain = make().double()
    optimized = normpass.optimize(copy.deepcopy(plain), X.double(), serialize=SMALL)
    for found, expected in zip(gradients(optimized, X.double()), gradients(plain, X.double()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert list(optimized.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        peaks = [forward_peak_bytes(m, X.double()) for m in (optimized, plain)]
    assert peaks[0] < 0.7 * peaks[1] if make is Frozen else peaks[0] <= peaks[1]  # the batch norm's is the peak in Net


def test_the_report_names_regions_and_what_runs_whole():
    report = normpass.explain(Net(), X, serialize=SMALL)
    rewrites = {row.path: row.rewrite for row in report.rows}
    assert rewrites["norm_a"] == rewrites["norm_c"] == "serialize_minibatch"
    assert rewrites["middle"] == "split_bn"
    text = str(report)
    assert "sub-batches of" in text
    assert "b runs whole: `middle`: it normalizes with the statistics of the whole batch" in text
    assert report.to_json()["regions"] == report.regions


def regions_of(model, x):
    """What `SerializeMinibatch` finds in each graph of one call of an optimized model."""
    graphs = captures_of(model)
    model(x)
    return [graph.regions for graph in graphs]


def test_copies_and_pickles_are_serialized_too():
    optimized = normpass.optimize(Net(), X, serialize=SMALL)
    for again in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        (regions,) = regions_of(again, X)
        assert regions.groups
        torch.testing.assert_close(again(X), optimized(X))


def test_the_default_buffer_is_the_devices_cache():
    (regions,) = regions_of(normpass.optimize(Net(), X, serialize=True), X)  # which holds all of so small a batch
    assert regions.groups == ()


class TwoResults(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        h = self.a(x)
        return self.b(h), h


class FineTuned(nn.Module):
    """Frozen layers below, trained ones above; a batch norm in train mode between two regions."""

    def __init__(self):
        super().__init__()
        self.first, self.below = nn.Conv2d(3, 8, 1), small_resnet("eval").layer1
        self.conv, self.bn, self.act = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()
        self.above = small_resnet("group").layer2

    def train(self, mode=True):
        super().train(mode)
        self.below.eval()
        return self

    def forward(self, x):
        h = self.act(self.bn(self.conv(self.below(self.first(x)))))
        return self.above(h).mean((2, 3))


@pytest.mark.parametrize("make, groups", [(TwoResults, ["a", "b"]), (FineTuned, ["first to below", "above to mean"])])
def test_trains_alike_beside_the_other_rewrites(make, groups):
    """Steps, then a forward in eval mode, whose graph is another, and another size of the batch."""
    plain, x = spread(make()).train(), image(6, 3, 12, 12, requires_grad=True)
    optimized = normpass.optimize(copy.deepcopy(plain), x.detach(), serialize=SerializeMinibatch(sub_batch=2))
    found = regions_of(copy.deepcopy(optimized), x)
    assert [group.name for group in found[0].groups] == groups
    assert_equal(train(plain, (x,)), train(optimized, (x,)))
    for batch in (7, 2, 9):
        torch.testing.assert_close(optimized(image(batch, 3, 12, 12)), plain(image(batch, 3, 12, 12)))


def test_a_norm_put_into_train_mode_later_sees_the_whole_batch():
    model = spread(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))).eval()
    optimized = normpass.optimize(copy.deepcopy(model), image(6, 3, 8, 8), serialize=SerializeMinibatch(sub_batch=2))
    for mode in (False, True, False):
        for each in (model, optimized):
            each[1].train(mode)
        torch.testing.assert_close(optimized(image(6, 3, 8, 8)), model(image(6, 3, 8, 8)))
    assert_equal(*({name: b for name, b in each.named_buffers()} for each in (model, optimized)))


CHANGED_LATER = {
    "the input": Program((), ("v = (x[..., 1:-1].contiguous() * 2).sin()",), "v", (Step(between="args[0].add_(0.3)"),)),
    "a bias": Program(
        ("nn.GroupNorm(2, 4)",), ("v = F.gelu(self.l0(x * 2))",), "v", (Step(between="model.l0.bias.add_(0.5)"),) * 2
    ),
    "a bias, second derivatives": Program(
        ("nn.GroupNorm(2, 4)",), ("v = F.gelu(self.l0(x * 2))",), "v", (Step(backward="second"),)
    ),
}


@pytest.mark.parametrize("name", CHANGED_LATER)
def test_what_plain_layers_do_not_keep_may_change_before_backward(name):
    assert failure(CHANGED_LATER[name], serialize=SerializeMinibatch(sub_batch=1)) is None


def test_random_modules_train_the_same_in_sub_batches():
    """Chunks, several results, views and writes are among them; `random_training` runs others by hand."""
    for seed in range(1000, 1015):
        program = random_program(random.Random(seed), lines=4)
        found = failure(program, serialize=SerializeMinibatch(sub_batch=1))
        assert found is None, f"{found}\n{program}"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"serialize": True, "example_inputs": X, "memory_budget": 0.5}, "either `serialize` or `memory_budget`"),
        ({"serialize": 3, "example_inputs": X}, "a SerializeMinibatch or a SerializeNorms, not 3"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(normpass.InvalidInputError, match=message):
        normpass.optimize(Net(), **options)
