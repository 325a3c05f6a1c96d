"""Whoever looks on, copies or takes apart an optimized model: the plain forward, or an optimized model of its own."""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from training import ConvNet, assert_equal, image, loss_of, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.optimized import state_of

X = image()
CHANGED = "this model was optimized with `changes=`, which are made in its captured graph, and "


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A plain model and an optimized one that share nothing."""
    torch.manual_seed(0)
    model = spread(ConvNet())
    return model, normpass.optimize(copy.deepcopy(model))


def block(inputs: int = 3, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def captures_of(optimized: nn.Module) -> list:
    """Grows with every graph that is captured from now on."""
    seen: list = []
    state_of(optimized).observers.append(lambda rewritten, inputs: seen.append(rewritten))
    return seen


def is_ours(optimized: nn.Module) -> bool:
    """Whether a step of training runs rewritten graphs."""
    seen = captures_of(optimized)
    optimized.train()(image(3, 3, 6, 6))
    return any(choice.rewrite == "split_bn" for graph in seen for choice in graph.choices)


# --- exporters and tracers ------------------------------------------------------------------------

LOADS = """
import sys, torch
sys.modules["normpass"] = None
if sys.argv[1].endswith(".pt2"):
    run = torch.export.load(sys.argv[1]).module()
else:
    run = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(run(x), expected)
"""


def loads_without_normpass(file: Path, expected: torch.Tensor) -> None:
    torch.save((X, expected), file.parent / "values")
    subprocess.run([sys.executable, "-c", LOADS, str(file), str(file.parent / "values")], check=True, timeout=120)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(pair, strict: bool, tmp_path: Path) -> None:
    plain, optimized = (m.eval() for m in pair)
    seen = captures_of(optimized)
    programs = [torch.export.export(m, (X,), strict=strict) for m in pair]
    assert [str(node.target) for node in programs[1].graph.nodes] == [str(n.target) for n in programs[0].graph.nodes]
    torch.testing.assert_close(programs[1].module()(X), plain(X))
    assert not seen
    if not strict:
        torch.export.save(programs[1], tmp_path / "model.pt2")
        loads_without_normpass(tmp_path / "model.pt2", plain(X))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_jit_trace(pair, tmp_path: Path) -> None:
    plain, optimized = (m.eval() for m in pair)
    optimized(X)  # captured before: tracing must not see the captured graph either
    traced = [torch.jit.trace(m, X) for m in pair]
    assert [n.kind() for n in traced[1].inlined_graph.nodes()] == [n.kind() for n in traced[0].inlined_graph.nodes()]
    torch.testing.assert_close(traced[1](image(3, 3, 8, 8)), plain(image(3, 3, 8, 8)))
    torch.jit.save(traced[1], tmp_path / "model.pt")
    loads_without_normpass(tmp_path / "model.pt", plain(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export(pair, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    operators = []
    for m in pair:
        file = io.BytesIO()
        if dynamo:
            torch.onnx.export(m.eval(), (X,), dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(m.eval(), (X,), file, dynamo=False)
        model = onnx.load_from_string(file.getvalue())
        assert not model.functions
        operators.append([(node.domain, node.op_type) for node in model.graph.node])
    assert operators[1] == operators[0]


def test_symbolic_trace_and_make_fx(pair) -> None:
    plain, optimized = (m.eval() for m in pair)
    seen = captures_of(optimized)
    for trace in (fx.symbolic_trace, *(make_fx_of(mode) for mode in ("real", "symbolic"))):
        graphs = [trace(m) for m in pair]
        assert [str(n.target) for n in graphs[1].graph.nodes] == [str(n.target) for n in graphs[0].graph.nodes]
        assert "normpass" not in graphs[1].code
        torch.testing.assert_close(graphs[1](X), plain(X))
    assert not seen


def make_fx_of(mode: str) -> Callable[[nn.Module], fx.GraphModule]:
    return lambda model: make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(X)


def test_make_fx_of_a_step(pair) -> None:
    """Forward and backward in one graph, as AOTAutograd and ahead-of-time trainers trace it."""
    graphs = []

    def gradients(m, values, x):
        loss = loss_of(torch.func.functional_call(m, values, (x,)))
        return torch.autograd.grad(loss, list(values.values()))

    for m in pair:
        parameters = dict(m.named_parameters())
        graphs.append(make_fx(functools.partial(gradients, m))(parameters, X))
    assert [str(n.target) for n in graphs[1].graph.nodes] == [str(n.target) for n in graphs[0].graph.nodes]


def test_fake_and_meta_tensors(pair) -> None:
    _, optimized = pair
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert optimized(mode.from_tensor(X)).fake_mode is mode
    mode = FakeTensorMode()
    with mode:
        made_of_fakes = normpass.optimize(ConvNet())
    made_of_fakes(mode.from_tensor(X.float())).sum().backward()
    assert made_of_fakes.fc.weight.grad.fake_mode is mode
    on_meta = normpass.optimize(copy.deepcopy(pair[0]).to("meta"))
    on_meta(X.to("meta")).sum().backward()
    assert on_meta.fc.weight.grad.is_meta


# --- transforms and modes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_func_transforms_and_forward_mode(pair) -> None:
    """Before and after a graph was captured."""
    tangent = image(seed=1)
    for m in pair:
        m.eval()
    seen = captures_of(pair[1])
    for _ in range(2):
        results = []
        for m in pair:
            values = {name: p.detach() * 1.5 for name, p in m.named_parameters()}

            def loss(values, m=m):
                return loss_of(torch.func.functional_call(m, values, (X,)))

            with forward_ad.dual_level():
                dual = m(forward_ad.make_dual(X, tangent))
                results.append([forward_ad.unpack_dual(dual).tangent])
            results[-1] += [
                torch.func.grad(loss)(values),
                torch.func.jvp(m, (X,), (tangent,)),
                torch.func.vjp(m, X)[1](torch.ones(2, 5, dtype=torch.float64)),
                torch.func.jacrev(m)(X),
                torch.func.jacfwd(m)(X[:, :, :3, :3]),
                torch.func.vmap(m)(X[:, None]),
                torch.func.hessian(lambda x, m=m: m(x[None]).square().sum())(X[0, :, :2, :2]),
            ]
        torch.testing.assert_close(results[1], results[0])
        assert len(seen) < 2  # the one that was captured in between
        pair[1](X)


def test_functional_call(pair) -> None:
    """Other tensors in the place of the parameters, with gradients of their own: captured as every call."""
    results = []
    for m in pair:
        values = {name: (p.detach() * 1.5).requires_grad_() for name, p in m.named_parameters()}
        buffers = {name: b.clone() for name, b in m.named_buffers()}
        out = torch.func.functional_call(m, (values, buffers), (X,))
        results.append([out, *torch.autograd.grad(loss_of(out), list(values.values())), *buffers.values()])
        assert m.bn.num_batches_tracked == 0 and m.bn.weight.grad is None
    torch.testing.assert_close(results[1], results[0])


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_see_the_plain_forward(pair) -> None:
    pair[1](X), pair[0](X)
    for make in (SeesFunctions, SeesOperators):
        modes = [make(), make()]
        for m, mode in zip(pair, modes, strict=True):
            with mode:
                m(X)
        assert modes[1].seen == modes[0].seen and len(modes[0].seen) > 5
    counts = []
    for m in pair:
        with FlopCounterMode(display=False) as counter:
            loss_of(m(X)).backward()
        counts.append(counter.get_flop_counts())
    assert counts[1] == counts[0]


DISABLED = """
import copy, torch
from training import ConvNet, assert_equal, image, spread, train
import normpass
model = spread(ConvNet())
optimized = normpass.optimize(copy.deepcopy(model))
normpass.optimized.state_of(optimized).observers.append(lambda *_: 1 / 0)
assert_equal(train(model, (image(),)), train(optimized, (image(),)))
changed = normpass.optimize(model, changes=("leaky_relu",))
assert not torch.equal(changed.eval()(image()), model.eval()(image()))
"""


def test_where_dynamo_is_switched_off() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", DISABLED], check=True, timeout=120, env=environment)


def test_where_dynamo_is_switched_off_for_a_while(pair) -> None:
    plain, optimized = pair
    seen = captures_of(optimized)
    with torch.compiler.set_stance("force_eager"):
        assert_equal(train(plain, (X,)), train(optimized, (X,)))
    assert not seen
    for m in pair:
        m.train()
    torch.testing.assert_close(optimized(X), plain(X))
    assert len(seen) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(optimized(X), plain(X))


# --- hooks for all modules --------------------------------------------------------------------------


def test_hooks_for_all_modules(pair) -> None:
    """They see every module of the plain model, also of one that was captured before; afterwards it is ours again."""
    for m in pair:
        m(X)
    kinds = {
        "forward_pre": (global_hooks.register_module_forward_pre_hook, lambda m, args: None),
        "forward": (global_hooks.register_module_forward_hook, lambda m, args, out: out * 1.5),
        "backward": (
            global_hooks.register_module_full_backward_hook,
            lambda m, g, out: tuple(v if v is None else v * 2 for v in g),
        ),
    }
    for m in pair:
        m.act.inplace = False
    for register, hook in kinds.values():
        results = []
        for m in pair:
            m.zero_grad()
            called: list[str] = []
            with register(
                lambda layer, *a, seen=called, hook=hook: seen.append(type(layer).__name__) or hook(layer, *a)
            ):
                loss_of(m(image(requires_grad=True))).backward()
            results.append([called, [p.grad for p in m.parameters()], list(m.buffers())])
        assert results[1][0] == results[0][0] and set(results[0][0]) >= {"Conv2d", "BatchNorm2d", "ConvNet"}
        torch.testing.assert_close(results[1][1:], results[0][1:])
    seen = captures_of(pair[1])
    torch.testing.assert_close(*(loss_of(m(X)) for m in pair))
    assert kept_bytes(pair[1], X) < 0.8 * kept_bytes(pair[0], X)
    assert len(seen) <= 1


# --- checkpoint -------------------------------------------------------------------------------------


def wide(layers: nn.Sequential) -> nn.Sequential:
    """With a convolution behind, which keeps what the layers make."""
    return layers.append(nn.Conv2d(4, 4, 1))


class Checkpointed(nn.Module):
    """Four blocks; the second and third are each a region of `checkpoint`."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = wide(block()), block(4, 4), block(4, 4)
        self.last, self.reentrant = wide(block(4, 4)), reentrant
        spread(self)

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(self.second, h, use_reentrant=self.reentrant)
        h = checkpoint(lambda h, by: F.dropout(self.third(h) * by, 0.2), h, 0.5, use_reentrant=self.reentrant)
        return self.last(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(reentrant: bool) -> None:
    """The regions are the user's: run again, statistics moved as plain moves them. What is beside them is ours."""
    model = Checkpointed(reentrant)
    optimized = normpass.optimize(copy.deepcopy(model))
    seen = captures_of(optimized)
    x = image(requires_grad=True)
    assert_equal(train(model, (x,)), train(optimized, (x,)))
    rewritten = {choice.site.path for graph in seen for choice in graph.choices if choice.rewrite}
    assert {"first.1", "last.1"} <= rewritten
    kept = [kept_bytes(m.train(), x) for m in (model, optimized)]
    assert kept[1] < kept[0]


class Reentrant(Checkpointed):
    """The first region has no input with a gradient, so nothing in it has one; the second has a region in it."""

    def __init__(self) -> None:
        super().__init__(True)

    def forward(self, x):
        h = checkpoint(self.first, x, use_reentrant=True)
        inner = lambda h: checkpoint(self.third, F.dropout(h, 0.2), use_reentrant=True) * 2  # noqa: E731
        return self.last(checkpoint(inner, self.second(h), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_reentrant() -> None:
    """No gradient where plain has none, running statistics moved as often, `autograd.grad` refused."""
    model = Reentrant()
    optimized = normpass.optimize(copy.deepcopy(model))
    assert_equal(train(model, (image(),)), train(optimized, (image(),)))
    assert optimized.first[0].weight.grad is None
    for each in (model.train(), optimized.train()):
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            torch.autograd.grad(each(image()).sum(), each.second[0].weight)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around(pair, reentrant: bool) -> None:
    x = image(requires_grad=True)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    assert_equal(*(train(m, (x,), run=run) for m in pair))
    around = [Around(m.train(), reentrant) for m in pair]
    assert kept_bytes(around[1], x) == kept_bytes(around[0], x)
    assert_equal(*(train(m.train(), (x,)) for m in pair))  # and on its own again
    assert kept_bytes(pair[1].train(), x) < 0.8 * kept_bytes(pair[0].train(), x)


class Around(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def keep_convolutions(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operator is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint(pair) -> None:
    """Around the model, and around a part of it."""
    x = image(requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_convolutions)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    assert_equal(*(train(m, (x,), run=run) for m in pair))


def test_checkpoint_wrappers_put_in_later(pair) -> None:
    """What a trainer does to a model that has run: captured again, with the regions in it."""
    x = image(requires_grad=True)
    for m in pair:
        m(X)
        apply_activation_checkpointing(m, check_fn=lambda layer: isinstance(layer, nn.Sequential))
    assert_equal(*(train(m, (x,)) for m in pair))
    torch.manual_seed(0)
    plain = spread(timm.create_model("resnet10t", num_classes=3))
    optimized = normpass.optimize(copy.deepcopy(plain))
    optimized.set_grad_checkpointing(), plain.set_grad_checkpointing()
    x = image(2, 3, 32, 32)
    assert_equal(*(train(m, (x,), steps=1) for m in (plain, optimized)))


# --- copies, slices, other instances ------------------------------------------------------------------


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


# --- changes that are made in the graph -----------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


def in_mode(model: nn.Module) -> torch.Tensor:
    with SeesOperators():
        return model(X)


def test_a_changed_model_is_not_run_as_the_plain_one() -> None:
    model = spread(Functional())
    optimized = normpass.optimize(model, changes=("leaky_relu",))
    assert optimized(X).min() < 0 <= model(X).min()
    by = {
        "it is being exported or traced": lambda: torch.export.export(optimized, (X,)),
        "a torch mode is active": lambda: in_mode(optimized),
        "a torch.func transform": lambda: torch.func.vmap(optimized)(X[:, None]),
    }
    for mode in (True, False):
        optimized.train(mode)
        for words, run in by.items():
            with pytest.raises(normpass.StaleChangeError, match=CHANGED + words):
                run()
    assert checkpoint(optimized, X, use_reentrant=False).min() < 0  # which keeps nothing there anyway
