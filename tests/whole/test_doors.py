"""Whoever looks on an optimized model: exporters, tracers, transforms and modes get the plain forward."""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_blocks import Functional
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from training import ConvNet, assert_equal, captures_of, image, loss_of, spread, train

import normpass

CHANGED = "this model was optimized with `changes=`, which are made in its captured graph, and "

X = image()


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


# --- changes that are made in the graph -----------------------------------------------------------------


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
