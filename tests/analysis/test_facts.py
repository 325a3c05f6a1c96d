"""What one forward makes, reads, writes and keeps, found out without memory: the same as for real."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import captured
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import ConvNet, image

from normpass.analysis.facts import Facts, Step
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_operators import _fake_batch_norm, _native_batch_norm
from normpass.analysis.fake_run import facts_of
from normpass.analysis.stand_ins import STAND_INS
from normpass.collect import captured_graphs
from normpass.graph.nodes import is_state, name_of
from normpass.pipeline import Request
from normpass.runtime.functional import split_norm_act
from normpass.runtime.prelu import split_norm_prelu
from normpass.runtime.sample_norms import split_sample_norm_act
from normpass.runtime.sharing import producer_statistics, shared_norm_act


def facts(function: Callable, *inputs: Any) -> Facts:
    graph_module, real = captured(function, *inputs)
    return facts_of(graph_module, FakeInputs(real))


def steps_by_name(function: Callable, *inputs: Any) -> dict[str, Step]:
    return {name_of(step.target): step for step in facts(function, *inputs).steps}


X = torch.randn(2, 3, 6, 6)


def test_the_facts_of_a_small_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    found = facts(model, X)
    conv, pool, flat, linear = found.steps
    assert [s.key for s in found.steps] == ["0", "1", "2", "3"]
    assert found.sizes == [2 * 4 * 4 * 4 * 4, 2 * 4 * 2 * 2 * 4, 2 * 5 * 4]
    assert (conv.flops, linear.flops) == (2 * 2 * 4 * 4 * 4 * 27, 2 * 2 * 16 * 5)
    assert (conv.saves, pool.saves, linear.saves) == ((), (0,), (1,))
    assert pool.internals == 2 * 4 * 2 * 2 * 8  # the indices
    assert flat.passes and not flat.makes and flat.reads == (1,) and found.outputs == {2}
    assert (conv.weights, conv.groups, linear.weights) == (3 * 4 * 9 * 4, 1, (16 * 5 + 5) * 4)
    assert found.maker() == [0, 1, 3] and found.value_of(flat.node) == 1
    assert found.plain_kept == found.sizes[0] + found.sizes[1] + pool.internals
    placeholders = [n for n in conv.node.graph.nodes if n.op == "placeholder"]
    assert [is_state(n) for n in placeholders] == [True, False, True, True]
    nothing = fact_sums(torch.no_grad()(model), X)
    assert nothing == (0, 0)


def fact_sums(function: Callable, *inputs: Any) -> tuple[int, int]:
    found = facts(function, *inputs)
    return found.plain_kept, sum(len(s.saves) for s in found.steps)


# --- kept for real --------------------------------------------------------------------------------


def really_kept(graph_module: fx.GraphModule, inputs: list[Any]) -> int:
    """Bytes of the storages that autograd keeps in a real run, beside the graph's inputs and outputs."""
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.detach()), lambda _: None):
        output = graph_module(*inputs)
    apart = {t.untyped_storage()._cdata for t in (*inputs, *output) if isinstance(t, Tensor)}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in packed}
    return sum(size for storage, size in storages.items() if storage not in apart)


class Sampler(nn.Module):
    """Operators that save their input, their result, both, a part, a copy, indices, a mask or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.group, self.linear = nn.GroupNorm(2, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        a, b = self.group(y).chunk(2, 1)
        y = torch.cat([F.silu(a), b.sigmoid() * a, F.dropout(b, 0.5)], 1)
        y = F.max_pool2d(y, 2, 1)[:, 1:5] + F.adaptive_avg_pool2d(F.hardswish(b * 1, inplace=True).exp(), 1).repeat(
            1, 2, 1, 1
        )
        y = F.interpolate(y, size=(2, 2))
        y = y.flatten(1).softmax(1)
        return self.linear(y * y.detach()).log_softmax(1).clone()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_kept_is_what_a_real_run_keeps(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Sampler().to(memory_format=memory_format)
    graph_module, inputs = captured(model, X.contiguous(memory_format=memory_format))
    assert facts_of(graph_module, FakeInputs(inputs)).plain_kept == really_kept(graph_module, inputs) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_of_tensors_without_memory_returns_what_a_real_one_does(
    dtype: torch.dtype, has_parameters: bool, training: bool
) -> None:
    for dims, memory_format in ((3, torch.contiguous_format), (4, torch.contiguous_format), (4, torch.channels_last)):
        x = torch.randn((2, 4, 5, 6)[:dims]).to(dtype).contiguous(memory_format=memory_format)
        one = torch.ones(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        given = [one if has_parameters else None] * 2 + [one if has_parameters or not training else None] * 2
        arguments = x, *given, training, 0.1, 1e-5
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            found = _fake_batch_norm(*fakes)
        for fake, real in zip(found, _native_batch_norm(*arguments), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(7, 2, 1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(self.a(x)))
        return self.c(F.silu(self.second(torch.cat([a, self.b(a)], 1))))


@pytest.mark.parametrize("make", [ConvNet, Dense])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_stands_for_our_functions_has_the_facts_of_these(make: type[nn.Module], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    graphs: list[tuple[Any, Any]] = []
    observer = lambda rewritten, inputs: graphs.append((rewritten, inputs))  # noqa: E731
    captured_graphs(model, ((image().to(dtype),), {}), Request(), observer)
    ((rewritten, inputs),) = graphs
    graph = rewritten.graph_module.graph
    for node in graph.nodes:  # as it was before recipes were noted
        node.meta.setdefault("key", node.name)
    assert {split_norm_act, producer_statistics, shared_norm_act} & {n.target for n in graph.nodes}
    # The last runs no kernel on fake tensors: what it keeps is measured in tests/runtime/test_sample_norms.py.
    splits = {split_norm_act, split_sample_norm_act, split_norm_prelu}
    assert set(STAND_INS) == {*splits, producer_statistics, shared_norm_act}
    stood, real = (facts_of(rewritten.graph_module, FakeInputs(inputs), stand_ins) for stand_ins in (STAND_INS, None))
    assert stood.plain_kept == real.plain_kept > 0
    for a, b in zip(stood.steps, real.steps, strict=True):
        assert a.internals == b.internals and len(a.reads) <= len(b.reads), a.key
        assert [stood.sizes[v] for v in a.saves] == [real.sizes[v] for v in b.saves], a.key
        assert len(a.writes) == len(b.writes) and a.differentiable == b.differentiable, a.key
        assert not b.is_foreign and not b.is_random
        if a.target is producer_statistics:
            assert not a.makes  # its moments are of no concern to backward
        else:
            assert [stood.sizes[v] for v in a.makes] == [real.sizes[v] for v in b.makes], a.key
    for node in graph.nodes:
        a, b = stood.results.get(node), real.results.get(node)
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), node


# --- who writes -----------------------------------------------------------------------------------


def written(write: Callable[[Tensor], Any], is_leaf: bool = False) -> tuple[Facts, Step]:
    """The facts of a write to what exp makes, and the step that writes."""
    weight = torch.randn(4, 4, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        write(y)
        return y.sin()

    found = facts(forward, weight)
    first = found.steps[0].node
    writer = found.writer_after(first, first)
    assert writer is not None
    return found, found.step_of()[writer]


WRITES: dict[str, tuple[Callable, str]] = {
    "method": (lambda y: y.mul_(2), "mul_"),
    "operator": (lambda y: operator.iadd(y, 1), "iadd"),
    "view": (lambda y: y.view(-1).add_(1), "add_"),
    "ravel": (lambda y: y.ravel().add_(1), "add_"),
    "diagonal": (lambda y: y.diagonal().zero_(), "zero_"),
    "transpose": (lambda y: y.T.neg_(), "neg_"),
    "item": (lambda y: y.__setitem__(0, 1.0), "setitem"),
    "foreach": (lambda y: torch._foreach_mul_([y[0], y[1:]], 2.0), "_foreach_mul_"),
    "index": (lambda y: y.index_fill_(0, torch.tensor([1]), 0.0), "index_fill_"),
    "function": (lambda y: F.relu(y, inplace=True), "relu"),
    "out": (lambda y: torch.sin(y.detach() * 1, out=y.detach()), "sin"),
}


@pytest.mark.parametrize("write, name", WRITES.values(), ids=WRITES.keys())
def test_a_write_is_seen_through_any_view(write: Callable, name: str) -> None:
    found, step = written(write)
    assert name_of(step.target) == name
    assert 0 in found.overwritten
    assert (0 in found.unseen) == (name == "_foreach_mul_")  # whose versions modes do not see: it stays with autograd
    assert len(step.makes) == 1 and step.makes[0] not in found.overwritten  # the same storage, another value
    sin = found.steps[-1]
    assert sin.saves == step.makes == sin.reads


def test_a_write_behind_autograds_back() -> None:
    found, step = written(lambda y: y.data.mul_(2))
    assert name_of(step.target) == "mul_" and 0 in found.overwritten


def test_copies_of_what_is_overwritten() -> None:
    x = torch.randn(3, requires_grad=True)
    assert steps_by_name(lambda x: F.silu(x * 1, inplace=True), x)["silu"].copies
    assert steps_by_name(lambda x: F.hardswish(x * 1, inplace=True), x)["hardswish"].copies
    for keeps in (lambda x: F.relu(x * 1, inplace=True), lambda x: (x * 1).sigmoid_(), lambda x: (x * 1).add_(1)):
        assert not any(step.copies for step in facts(keeps, x).steps)


def test_what_lies_between_reads_and_writes() -> None:
    def forward(x: Tensor, state: Tensor) -> Tensor:
        a = x * 1
        b = a.exp()
        state.add_(1)
        c = b + state
        return c * a.view(-1).view(3)

    found = facts(forward, torch.randn(3, requires_grad=True), torch.zeros(3))
    a, b, add, c, *_, last = (step.node for step in found.steps)
    assert found.toucher_between([b], b, last) is c and found.toucher_between([b], b, c) is None
    (state,) = found.storages[[n for n in a.graph.nodes if n.op == "placeholder"][1]]
    assert found.written_outside == {state} and found.step_of()[c].reads_outside == (state,)
    assert found.writer_after(add.args[0], a) is add and found.writer_after(add.args[0], a, until=add) is None


# --- what an operator is --------------------------------------------------------------------------


def test_random_and_unknown_operators() -> None:
    with torch.library._scoped_library("facts_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        found = steps_by_name(
            lambda x: (F.dropout(x, 0.5), torch.ops.facts_test.twice(x.detach()), x.sigmoid().bernoulli(), x.exp()), X
        )
    assert [name for name, step in found.items() if step.is_random] == ["dropout", "bernoulli"]
    assert [name for name, step in found.items() if step.is_foreign] == ["twice"]


def test_running_statistics_are_written_in_training_alone() -> None:
    norm = nn.BatchNorm2d(3)
    found = facts(norm, X)
    assert len(found.written_outside) == 3  # and the counter
    assert len(found.steps[-1].writes) == 2 and found.steps[-1].internals == 2 * 3 * 4
    assert not facts(norm.eval(), X).written_outside


def test_a_python_float_that_became_an_input_is_a_number() -> None:
    graph = fx.Graph()
    x, slope = graph.placeholder("x"), graph.placeholder("slope")
    number = graph.call_method("item", (slope,))
    graph.output((graph.call_function(F.leaky_relu, (x, number)),))
    inputs = [torch.randn(3, requires_grad=True), torch.tensor(0.3, dtype=torch.float64)]
    found = facts_of(fx.GraphModule(nn.Module(), graph), FakeInputs(inputs))
    assert found.results[number] == 0.3
    assert [step.saves for step in found.steps] == [(), ()] and found.outputs == {0}


def test_inputs_of_one_storage_share_one() -> None:
    base = torch.randn(4, 4)

    def forward(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a.mul_(2)
        return b.exp() + c

    graph = fx.Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    write = graph.call_method("mul_", (a, 2))
    graph.output((graph.call_function(torch.add, (b, c)),))
    found = facts_of(fx.GraphModule(nn.Module(), graph), FakeInputs([base[:2], base.T[1:], torch.randn(3, 4)]))
    assert set(found.step_of()[write].writes) == found.storages[b] == found.written_outside
    assert found.storages[a] == found.storages[b] != found.storages[c]


def test_nothing_stays_of_a_run() -> None:
    x = torch.randn(3, 3, requires_grad=True)
    found = facts(lambda x: (x * 2).exp(), x)
    graph_module, inputs = captured(lambda x: (x * 2).exp(), x)
    mode = weakref.ref(FakeInputs(inputs))
    assert mode() is None and found.plain_kept == 0  # what exp saves is returned
    assert torch._C._autograd._saved_tensors_hooks_is_enabled() and torch._C._len_torch_dispatch_stack() == 0
