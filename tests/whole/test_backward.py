"""Backward in every order and from every place, with hooks, threads and errors on its way."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from conv_blocks import C, block
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import ConvNet, assert_equal, image, loss_of, spread, train

import normpass
from normpass.recipe import notes
from normpass.recipe import recipes as recipe


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
        self.a, self.b, self.c = block(inplace=True), block(C, C, inplace=True), nn.Conv2d(7, 7, 1)

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
