"""`optimize(model, x, serialize=…)`: the option around `normpass.passes.SerializeMinibatch`."""

import copy
import pickle

import pytest
import torch
from torch import nn

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
    optimised = normpass.optimize(copy.deepcopy(plain), X.double(), serialize=SMALL)
    for found, expected in zip(gradients(optimised, X.double()), gradients(plain, X.double()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert list(optimised.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        peaks = [forward_peak_bytes(m, X.double()) for m in (optimised, plain)]
    assert peaks[0] < 0.7 * peaks[1] if make is Frozen else peaks[0] <= peaks[1]  # the batch norm's is the peak in Net


def test_the_report_names_regions_and_what_runs_whole():
    report = normpass.explain(Net(), X, serialize=SMALL)
    rewrites = {row.path: row.rewrite for row in report.rows}
    assert rewrites["norm_a"] == rewrites["norm_c"] == "serialize_minibatch"
    assert rewrites["middle"] == "split_bn"
    text = str(report)
    assert "sub-batches of" in text
    assert "b runs whole: `middle`: it normalises with the statistics of the whole batch" in text
    assert report.to_json()["regions"] == report.regions


def test_copies_and_pickles_are_serialised_too():
    optimised = normpass.optimize(Net(), X, serialize=SMALL)
    for again in (copy.deepcopy(optimised), pickle.loads(pickle.dumps(optimised))):
        assert normpass.module.part_of(again).programs[0][1].regions.groups
        torch.testing.assert_close(again(X), optimised(X))


def test_the_default_buffer_is_the_devices_cache():
    optimised = normpass.optimize(Net(), X, serialize=True)  # which holds all of so small a batch
    assert normpass.module.part_of(optimised).programs[0][1].regions.groups == ()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"serialize": True}, "`serialize` needs `example_inputs`"),
        ({"serialize": True, "example_inputs": X, "memory_budget": 0.5}, "either `serialize` or `memory_budget`"),
        ({"serialize": 3, "example_inputs": X}, "is True, False or a SerializeMinibatch, not 3"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(normpass.InvalidInputError, match=message):
        normpass.optimize(Net(), **options)
