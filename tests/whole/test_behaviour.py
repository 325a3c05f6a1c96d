"""What a training script may do with a model goes on working with the optimized one, with the plain model's numbers."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import ConvNet, assert_equal, assert_trains_alike, image, loss_of, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.recipe import notes
from normpass.recipe import recipes as recipe

C = 4


def block(inputs: int = 3, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return spread(ConvNet())


@pytest.fixture
def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A plain model and an optimized one that share nothing."""
    return model, normpass.optimize(copy.deepcopy(model))


# --- state and structure -----------------------------------------------------------------------------


def test_state_dict_loads_both_ways(model: nn.Module) -> None:
    optimized = normpass.optimize(model)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert all(optimized.state_dict(keep_vars=True)[k] is v for k, v in model.state_dict(keep_vars=True).items())
    assert [n for n, _ in optimized.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in model.named_modules()]
    torch.manual_seed(5)
    other = spread(ConvNet())
    optimized(image())
    optimized.load_state_dict(other.state_dict(), strict=True)
    copied = ConvNet().double()
    copied.load_state_dict(optimized.state_dict(), strict=True)
    numbers = train(other, (image(),))
    assert_equal(numbers, train(optimized, (image(),)))
    assert_equal(numbers, train(copied, (image(),)))


def test_the_given_model_is_untouched(model: nn.Module) -> None:
    model.stem[0].register_forward_hook(lambda *_: None)
    model.note = ["list"]

    def snapshot() -> list:
        return [
            (type(m), sorted(vars(m)), {k: id(v) for k, v in vars(m).items()}, dict(m._modules), dict(m._forward_hooks))
            for m in model.modules()
        ]

    before, state = snapshot(), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    optimized = normpass.optimize(model, image())
    normpass.explain(model, image())
    assert snapshot() == before
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert optimized.note is model.note


def test_restore_gives_the_plain_model_with_current_values(pair) -> None:
    plain, optimized = pair
    assert_equal(train(plain, (image(),)), train(optimized, (image(),)))
    restored = normpass.restore(optimized)
    assert type(restored) is ConvNet and not any(isinstance(m, normpass.Optimized) for m in restored.modules())
    assert all(a is b for a, b in zip(restored.parameters(), optimized.parameters(), strict=True))
    assert_equal(train(plain, (image(),)), train(restored, (image(),)))
    assert isinstance(normpass.optimize(restored), normpass.Optimized)


def test_norms_are_found_and_converted(pair) -> None:
    plain, optimized = pair
    assert sum(isinstance(m, nn.BatchNorm2d) for m in optimized.modules()) == 2
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(optimized).eval()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 2
    torch.testing.assert_close(converted(image()), plain.eval()(image()))


def test_an_optimizer_built_before(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    results = []
    for m, change in ((plain, lambda m: m), (model, normpass.optimize)):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        trained = change(m)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(trained(image())).backward()
            optimizer.step()
        results.append([p.detach() for p in m.parameters()])
    torch.testing.assert_close(results[1], results[0])


# --- modes and freezing ---------------------------------------------------------------------------


def test_train_and_eval_in_turn(pair) -> None:
    for step in range(5):
        outputs, gradients = [], []
        for m in pair:
            m.train(step % 2 == 0).zero_grad()
            outputs.append(m(image(seed=step)))
            loss_of(outputs[-1]).backward()
            gradients.append([p.grad for p in m.parameters()])
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(dict(pair[1].named_buffers()), dict(pair[0].named_buffers()))


class Deep(nn.Module):
    """As `ConvNet`, of several plain blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = block()
        self.blocks = nn.Sequential(*(block(C, C) for _ in range(blocks)))
        self.bn = nn.BatchNorm2d(C)
        self.fc = nn.Linear(C, 5)

    def forward(self, x):
        return self.fc(self.bn(self.blocks(self.stem(x))).mean((2, 3)))


FROZEN = {
    "norms": lambda name, module: isinstance(module, nn.BatchNorm2d),
    "convolutions": lambda name, module: isinstance(module, nn.Conv2d),
    "stem": lambda name, module: name.startswith("stem"),
    "all but the head": lambda name, module: bool(name) and name != "fc",
    "everything": lambda name, module: True,
    "weights of norms": lambda name, module: False,
}


def freeze(model: nn.Module, what: str) -> None:
    for name, module in model.requires_grad_(True).named_modules():
        if FROZEN[what](name, module):
            module.requires_grad_(False)
        elif what == "weights of norms" and isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)


NETS = pytest.mark.nets


@pytest.mark.parametrize(
    "make, evaluating",
    [(ConvNet, False), (Deep, True), pytest.param(ConvNet, True, marks=NETS), pytest.param(Deep, False, marks=NETS)],
)
def test_without_gradients_for_some(make, evaluating: bool) -> None:
    """The same numbers, and never more kept than plain keeps, whatever is frozen after whatever else."""
    torch.manual_seed(0)
    plain = spread(make()).train(not evaluating)
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = image(2, 3, 16, 16, requires_grad=evaluating == (make is Deep))
    for what in FROZEN:
        numbers = []
        for m in (plain, optimized):
            freeze(m, what)
            m.zero_grad()
            y = m(x)
            x.grad = None
            if y.requires_grad:
                loss_of(y).backward()
            numbers.append([y, x.grad, [p.grad for p in m.parameters()], [b.clone() for b in m.buffers()]])
        torch.testing.assert_close(numbers[1], numbers[0])
        kept = [kept_bytes(m, x) for m in (plain, optimized)]
        assert kept[1] <= kept[0] + 512, (what, kept)


def test_freezing_step_by_step(pair) -> None:
    for m in pair:
        m(image())
    for name in ("stem.1", "bn", "stem", "conv"):
        numbers = []
        for m in pair:
            m.train().get_submodule(name).requires_grad_(False).eval()
            numbers.append(train(m, (image(),), steps=1))
        assert_equal(*numbers)


# --- parts, attributes, classes -------------------------------------------------------------------


def test_a_part_called_alone(pair) -> None:
    for path in ("stem", "bn", "act", "conv"):
        x = image(2, 3 if path == "stem" else C, 8, 8)
        numbers = []
        for m in pair:
            part = m.get_submodule(path)
            z = part(x.clone().requires_grad_() * 1)
            z.sum().backward()
            numbers.append([z, *(p.grad for p in part.parameters()), *part.buffers()])
        torch.testing.assert_close(numbers[1], numbers[0])


def test_layers_that_are_replaced_later(pair) -> None:
    for m in pair:
        m(image())
        torch.manual_seed(1)
        m.fc = nn.Linear(C, 3).double()
        m.stem = nn.Sequential(nn.Conv2d(3, C, 1), nn.GroupNorm(2, C), nn.GELU()).double()
    assert_equal(*(train(m, (image(requires_grad=True),)) for m in pair))


def test_timm_methods() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=4, drop_rate=0.2).double()
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = image(2, 3, 32, 32)
    torch.testing.assert_close(optimized.forward_features(x), plain.forward_features(x))
    for m in (plain, optimized):
        torch.manual_seed(1)
        m.reset_classifier(3)
        m.double()
    assert optimized.num_classes == 3
    assert_equal(train(plain, (x,), steps=1), train(optimized, (x,), steps=1))


def test_dtype_and_memory_format(pair) -> None:
    plain, optimized = (m.float() for m in pair)
    x = image().float()
    torch.testing.assert_close(optimized(x), plain(x))
    for m in pair:
        m.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    expected, found = plain.stem(x), optimized.stem(x)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.stride() == expected.stride()
    torch.testing.assert_close(optimized(x), plain(x))
    expected, found = plain.bfloat16()(x.bfloat16()), optimized.bfloat16()(x.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pair, context) -> None:
    plain, optimized = pair
    with context():
        expected, found = plain(image()), optimized(image())
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad and found.is_inference() == expected.is_inference() and not vars(found)
    torch.testing.assert_close(optimized(image()), plain(image()))


# --- backward in every order ----------------------------------------------------------------------


def gradients_of(model: nn.Module, backward) -> list:
    model.zero_grad()
    result = backward(model)
    return [result, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def accumulate(m):
    for seed in range(3):
        loss_of(m(image(seed=seed))).backward()


def two_forwards_then_backward(m):
    first, second = loss_of(m(image(seed=0))), loss_of(m(image(seed=1)))
    first.backward()
    second.backward()


def backward_in_reverse(m):
    first, second = loss_of(m(image(seed=0))), loss_of(m(image(seed=1)))
    second.backward()
    first.backward()


def backward_of_the_sum(m):
    (loss_of(m(image(seed=0))) * loss_of(m(image(seed=1)))).backward()


def retained(m):
    loss = loss_of(m(image()))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def output_used_twice(m):
    out = m(image())
    (out.square().sum() + out.exp().sum()).backward()


def expanded_gradient(m):
    m(image()).sum().backward()


def first_some_then_the_rest(m):
    loss = loss_of(m(image()))
    parameters = list(m.parameters())
    some = torch.autograd.grad(loss, parameters[2:4], retain_graph=True)
    more = torch.autograd.grad(loss, parameters[:1], retain_graph=True)
    loss.backward()
    return [*some, *more]


def from_the_middle(m):
    h = m.stem(image())
    z = m.act(m.bn(m.conv(h)) + h)
    (g,) = torch.autograd.grad(z.sum(), h, retain_graph=True)
    (z * 2).sum().backward()
    return g


def one_output_row_at_a_time(m):
    out = m(image())
    for row in out:
        row.sum().backward(retain_graph=True)


def batched_gradient(m):
    out = m(image())
    vectors = torch.eye(5, dtype=torch.float64)[:, None].expand(5, 2, 5)
    return torch.autograd.grad(out, [m.conv.weight, m.stem[0].weight], vectors, is_grads_batched=True)


def gradient_penalty(m):
    x = image(requires_grad=True)
    (g,) = torch.autograd.grad(loss_of(m(x)), x, create_graph=True)
    (loss_of(m(x)) + g.square().sum()).backward()
    return x.grad


def third_derivative(m):
    x = image(1, 3, 4, 4, requires_grad=True)
    out = m.eval()(x.tanh()).square().sum()
    (g,) = torch.autograd.grad(out, x, create_graph=True)
    (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    g.sum().backward()
    m.train()
    return x.grad


def hook_on_the_output(m):
    out = m(image())
    out.register_hook(lambda g: g * 3)
    loss_of(out).backward()


def hook_on_parameters(m):
    handles = [p.register_hook(lambda g: g.clamp(-0.1, 0.1)) for p in m.parameters()]
    loss_of(m(image())).backward()
    for handle in handles:
        handle.remove()


def backward_in_threads(m):
    losses = [loss_of(m(image(seed=seed))) for seed in range(3)]
    threads = [threading.Thread(target=torch.autograd.grad, args=(loss, list(m.parameters()))) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loss_of(m(image())).backward()


def user_hooks(m):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        out = m(image())
    loss_of(out).backward()


def on_cpu(m):
    with torch.autograd.graph.save_on_cpu():
        out = m(image())
    loss_of(out).backward()


def user_hooks_disabled(m):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        out = m(image())
    loss_of(out).backward()


def checkpointed_part(m):
    h = checkpoint(m.stem, image(requires_grad=True), use_reentrant=False)
    (h.sum() + loss_of(m(image()))).backward()


def after_a_failed_backward(m):
    out = m(image())

    def fail(g):
        raise ValueError("stop")

    handle = m.stem[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        loss_of(out).backward(retain_graph=True)
    handle.remove()
    m.zero_grad()
    loss_of(out).backward()


@pytest.mark.parametrize(
    "backward",
    [
        accumulate,
        two_forwards_then_backward,
        backward_in_reverse,
        backward_of_the_sum,
        retained,
        output_used_twice,
        expanded_gradient,
        first_some_then_the_rest,
        from_the_middle,
        one_output_row_at_a_time,
        batched_gradient,
        gradient_penalty,
        third_derivative,
        hook_on_the_output,
        hook_on_parameters,
        backward_in_threads,
        user_hooks,
        on_cpu,
        user_hooks_disabled,
        checkpointed_part,
        after_a_failed_backward,
    ],
    ids=lambda function: function.__name__,
)
def test_backward(trained_pair, backward) -> None:
    plain, optimized = trained_pair
    for training in (True, False):
        numbers = [gradients_of(m.train(training), backward) for m in trained_pair]
        torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-9, atol=1e-9)
    with recipe.Rebuilds() as rebuilds:
        loss_of(optimized.train()(image())).backward()
    plain.train()(image())
    assert rebuilds.total > 0 and rebuilds.most == 1  # still ours
    assert not recipe._unfinished


class Stopped(torch.autograd.Function):
    """Gives its input no gradient: not zeros, which weight decay and momentum would act on, but none."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return None


class Stopping(nn.Module):
    """Our functions between the parameters and a `Stopped`: a depthwise and a 3×3 convolution, norms, a pool."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.depthwise = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32) for _ in range(3)])
        self.cat_norm, self.per_sample = nn.BatchNorm2d(64), nn.GroupNorm(2, 32)
        self.conv, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(64, 2, 1)

    def forward(self, x):
        first, second, third = self.norms
        h = F.relu(first(self.wide(x)))
        h = F.relu(second(self.conv(h)) + third(self.depthwise(F.silu(h))))
        h = F.max_pool2d(self.per_sample(h), 3, 1, 1)
        return self.last(Stopped.apply(F.relu(self.cat_norm(torch.cat([h, h * 2], 1)))))


@pytest.mark.parametrize("options", [{}, {"serialize": True}, {"allow_lossy": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_gradient_is_none_and_not_zeros(options, dtype) -> None:
    model = Stopping().to(dtype, memory_format=torch.channels_last)
    x = image(4, 3, 16, 16).to(dtype)
    for each in (model, normpass.optimize(copy.deepcopy(model), **options)):
        each.zero_grad()
        each(x).sum().backward()
        assert {name for name, p in each.named_parameters() if p.grad is not None} == {"last.weight", "last.bias"}


@pytest.fixture(scope="module")
def trained_pair() -> tuple[nn.Module, nn.Module]:
    """One for all ways of backward: the graphs are captured once."""
    torch.manual_seed(0)
    model = spread(ConvNet())
    return model, normpass.optimize(copy.deepcopy(model))


def test_threads_run_one_model(pair) -> None:
    """Each of them may be the first, which captures."""
    plain, optimized = pair
    expected, found = plain.eval()(image()), []

    def work() -> None:
        for _ in range(10):
            out = optimized(image())
            loss_of(out).backward()
            found.append(out.detach())

    optimized.eval()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    for out in found:
        torch.testing.assert_close(out, expected)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(), block(C, C), nn.Conv2d(7, 7, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_an_exception_in_forward_leaves_nothing_behind() -> None:
    optimized = normpass.optimize(Fails().double())
    with pytest.raises(RuntimeError, match="expected input"):
        optimized(image())
    assert not notes.is_recording() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    optimized.c = nn.Conv2d(C, 2, 1).double()
    plain = copy.deepcopy(normpass.restore(optimized))
    assert_equal(train(plain, (image(),)), train(copy.deepcopy(optimized), (image(),)))


# --- hooks registered later -----------------------------------------------------------------------


HOOKS = {
    "forward_pre": lambda layer, change: layer.register_forward_pre_hook(lambda _, args: change(args)),
    "forward": lambda layer, change: layer.register_forward_hook(lambda _, args, out: change(out)),
    "full_backward_pre": lambda layer, change: layer.register_full_backward_pre_hook(lambda _, g: change(g)),
    "full_backward": lambda layer, change: layer.register_full_backward_hook(lambda _, g, out: change(g)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_registered_later_run(pair, kind: str) -> None:
    """On every module of a model that has run; and no more once they are removed."""
    x = image(requires_grad=True)
    called: list[list[str]] = [[], []]
    handles = []
    for m, paths in zip(pair, called, strict=True):
        m.act.inplace = m.stem[2].inplace = False
        m(x)
        for path, layer in m.named_modules():

            def change(value, path=path, paths=paths):
                paths.append(path)
                if isinstance(value, tuple):
                    return tuple(None if v is None else v * 1.5 for v in value)
                return value * 1.5

            handles.append(HOOKS[kind](layer, change))
    assert_equal(*(train(m, (x,)) for m in pair))
    assert called[1] == called[0] and set(called[0]) == {path for path, _ in pair[0].named_modules()}
    for handle in handles:
        handle.remove()
    assert_equal(*(train(m.train(), (x,), steps=1) for m in pair))
    assert called[1] == called[0]


def test_a_hook_that_is_removed_again(pair) -> None:
    plain, optimized = pair
    handle = optimized.stem.register_forward_hook(lambda m, args, out: out * 0)
    assert optimized(image()).std(0).max() < 1e-12
    handle.remove()
    plain(image())
    torch.testing.assert_close(optimized(image()), plain(image()))
    assert kept_bytes(optimized, image()) < 0.8 * kept_bytes(plain, image())


# --- outputs and arguments ------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


class Outputs(nn.Module):
    """Two blocks whose results come back in a structure."""

    def __init__(self, structure) -> None:
        super().__init__()
        self.a, self.b, self.structure = block(), block(C, C), structure

    def forward(self, x):
        h = self.a(x)
        return self.structure(h, self.b(h))


def as_dict(h, z):
    return {"ordered": OrderedDict(h=h, z=z, n=3), "list": [h, (z, None), "name"], "pair": Pair(z, [h]), "z": z}


def as_pair(h, z):
    return Pair({"a": h}, OrderedDict(b=Pair(z, [h])))


@pytest.mark.parametrize("structure", [as_dict, as_pair], ids=lambda s: s.__name__)
def test_outputs_keep_their_types(structure) -> None:
    model = spread(Outputs(structure))
    optimized = assert_trains_alike(model, image(requires_grad=True))
    expected, found = model(image()), optimized(image())

    def types(value):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return type(value), [types(item) for item in items]

    assert types(found) == types(expected)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    assert not any(vars(leaf) for leaf in leaves)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(), block(C, C), block(C, C)
        self.drop, self.spatial = nn.Dropout(0.3), nn.Dropout2d(0.3, inplace=True)
        self.depth = torchvision.ops.StochasticDepth(0.4, "row")
        self.path = timm.layers.DropPath(0.4)

    def forward(self, x):
        h = self.drop(self.a(x))
        h = self.depth(self.b(h)) + h
        h = F.dropout(self.spatial(h), 0.2, self.training)
        return self.path(self.c(h)) + h


def test_random_layers_draw_the_same() -> None:
    """And leave the generator where plain leaves it."""
    model = spread(Random())
    states = []
    for m in (model, assert_trains_alike(model, image())):
        torch.manual_seed(0)
        m.train()(image())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- memory ---------------------------------------------------------------------------------------


def test_repeated_steps_leave_nothing(pair) -> None:
    _, optimized = pair
    for _ in range(2):
        optimized.train()
        loss_of(optimized(image())).backward()
        optimized.eval()(image())
    before = tensors_and_recipes()
    for _ in range(5):
        optimized.train()
        loss_of(optimized(image())).backward()
        optimized.eval()(image())
    assert tensors_and_recipes() <= before


def tensors_and_recipes() -> int:
    gc.collect()
    return sum(type(o) in (torch.Tensor, recipe.Recipe, recipe.Kept) for o in gc.get_objects())


# --- DistributedDataParallel ----------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    worker = Path(__file__).parents[1] / "support" / "ddp_worker.py"
    path = os.pathsep.join([str(worker.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "same gradients" in output
