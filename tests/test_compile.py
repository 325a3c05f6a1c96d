"""An optimised module under torch.compile: one graph, the same numbers, the same memory, with a plan and without."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from compiled import largest_difference, quietly
from compiled import train as train_fully
from networks import TINY_DENSENET
from torch import nn

import normpass
from normpass.measure import kept_bytes


class Net(nn.Module):
    """A residual block, a concatenation, a gate, a dropout: one of each thing that is rebuilt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.norm_a(self.a(x)) + x)
        y = F.silu(self.norm_b(self.b(torch.cat((x, y), 1))))
        y = y * self.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        return self.head(F.dropout(y, 0.5, self.training)).mean((2, 3))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def models():
    torch.manual_seed(0)
    plain = Net().double()
    return copy.deepcopy(plain), normpass.optimize(plain)


def train(model, forward, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch itself warns of while it compiles
            y = forward(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs, dict(model.state_dict())


def test_aot_eager_trains_the_same_in_one_graph(models):
    plain, optimised = models
    expected = train(plain, plain)
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(train(optimised, compiled), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "backend, options", [("eager", None), ("normpass", {"inner": "eager"}), ("normpass", {"inner": "aot_eager"})]
)
def test_other_backends_train_the_same(models, backend, options):
    plain, optimised = models
    compiled = torch.compile(optimised, backend=backend, options=options, fullgraph=True)
    torch.testing.assert_close(train(optimised, compiled), train(plain, plain), rtol=0, atol=1e-12)


def test_compiled_keeps_what_eager_keeps(models):
    plain, optimised = models
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    eager = kept_bytes(optimised, x)
    assert kept_bytes(compiled, x) <= 1.12 * eager
    assert eager < 0.6 * kept_bytes(plain, x)


def test_eval_mode_and_a_switch_of_modes(models):
    plain, optimised = models
    train(plain, plain)
    compiled = torch.compile(optimised, backend="aot_eager", fullgraph=True)
    train(optimised, compiled)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain.eval(), optimised.eval()
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-12)


def test_no_recompilation_between_steps(models):
    _, optimised = models
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimised, backend=counter, fullgraph=True)
    train(optimised, compiled, steps=4)
    assert counter.frame_count == 1


def test_channels_last_survives(models):
    _, optimised = models
    optimised = optimised.to(memory_format=torch.channels_last)
    block = torch.compile(optimised.stem, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


# --- planned for a memory budget ------------------------------------------------------------------


class Planned(nn.Module):
    """`Net` behind a max pool, whose indices a tight budget looks for again."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.shrink, self.net = nn.Conv2d(8, 3, 1), Net()

    def forward(self, x):
        return self.net(self.shrink(self.enter(x)))


def planned_inputs(step):
    return (torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step)),)


@pytest.mark.parametrize("make, budget", [(Planned, 0.6), (Planned, 0.2), (TINY_DENSENET.make, 0.3)])
def test_a_planned_model_keeps_and_computes_the_same(make, budget):
    torch.manual_seed(0)
    plain, x = make().double().train(), planned_inputs(0)[0]
    plan = normpass.plan(plain, x, budget)
    assert plan.decisions.rebuilt
    optimised = normpass.optimize(copy.deepcopy(plain), plan=plan)
    kept = kept_bytes(optimised, x)
    assert kept <= budget * kept_bytes(plain, x)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimised, backend=counter, fullgraph=True)
    found = train_fully(optimised, compiled, planned_inputs, torch.float64, steps=3)
    expected = train_fully(plain, plain, planned_inputs, torch.float64, steps=3)
    assert largest_difference(found, expected) < 1e-12  # buffers among it: statistics that moved once
    assert counter.frame_count == 1
    print(f"budget {budget}: {quietly(kept_bytes, compiled, x) / kept:.3f} of eager's kept bytes")
    assert quietly(kept_bytes, compiled, x) <= 1.12 * kept


def test_a_tight_plan_of_a_pooling_is_among_them():
    plan = normpass.plan(Planned().double(), planned_inputs(0)[0], 0.2)
    assert plan.decisions.replayed == {"enter.3"} and "enter.0" in plan.decisions.rebuilt


def test_the_eager_backend_says_that_a_plan_is_not_kept():
    torch.manual_seed(0)
    plain, x = Planned().double().train(), planned_inputs(0)[0]
    optimised = normpass.optimize(copy.deepcopy(plain), x, memory_budget=0.4)
    with pytest.warns(UserWarning, match="the backend `eager` runs the graph as it is"):
        torch.compile(optimised, backend="eager", fullgraph=True)(x)
    plain(x)
    torch.testing.assert_close(dict(optimised.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=1e-12)
