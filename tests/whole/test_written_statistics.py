"""Running statistics that somebody writes to between forward and backward: refused where plain refuses it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import ConvNet, image, spread

import normpass

C = 4


def conv(inputs: int = C, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, C, 3, padding=1, **options)


def chain(**options: Any) -> nn.Module:
    norms = [nn.BatchNorm2d(C, **options) for _ in range(2)]
    return nn.Sequential(conv(3), norms[0], nn.ReLU(), conv(groups=C), norms[1], nn.ReLU(), conv())


class Mixed(nn.Module):
    """A residual of another dtype: the plain functions run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.end = conv(3), nn.BatchNorm2d(C), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.end(F.relu(self.norm(y) + y.detach().float()))


class Dense(nn.Module):
    """Norms of concatenations, of which one is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.other, self.end = (
            conv(3),
            conv(3),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            conv(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.end(F.relu(self.norm(both))) + self.end(F.relu(self.other(both)))


class WritesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        with torch.no_grad():
            self.body[1].running_mean.mul_(0.5)
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "chain": (chain, {}),
    "cumulative": (lambda: chain(momentum=None), {}),
    "without weights": (lambda: chain(affine=False), {}),
    "its output is kept": (chain, {"allow_lossy": True}),
    "residual joins": (ConvNet, {}),
    "concatenations": (Dense, {}),
    "another dtype": (Mixed, {}),
    "in sub-batches": (chain, {"serialize": normpass.passes.SerializeMinibatch(sub_batch=1)}),
    "block by block": (chain, {"serialize": normpass.passes.SerializeNorms(paths=("3",), block_bytes=1)}),
    "a budget": (chain, {"memory_budget": 1.0}),
}


def outcome(model: nn.Module, path: str, between: Callable[[Tensor], object]) -> str:
    """What backward raises when `between` was done to the buffer at `path`."""
    y = model(image(2, 3, 8, 8, requires_grad=True))
    with torch.no_grad():
        between(dict(model.named_buffers())[path])
    try:
        y.square().sum().backward()
    except RuntimeError as error:
        return str(error).partition("is at version")[0]
    return "nothing"


def nothing(buffer: Tensor) -> None:
    """Nobody writes."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_refused_as_plain_refuses_it(case: str, training: bool) -> None:
    make, options = CASES[case]
    torch.manual_seed(0)
    plain = spread(make()).train(training)
    options = dict(options, example_inputs=image()) if "memory_budget" in options else options
    optimized = normpass.optimize(copy.deepcopy(plain), **options)
    paths = [path for path, _ in plain.named_buffers()]
    expected, found = ([outcome(m, p, lambda t: t.add_(1)) for p in paths] for m in (plain, optimized))
    assert found == expected
    assert any("inplace" in text for text in found)
    untouched = ([outcome(m, p, nothing) for p in paths[:1]] for m in (plain, optimized))
    assert list(untouched) == [["nothing"], ["nothing"]]


def test_written_by_forward_itself() -> None:
    torch.manual_seed(0)
    plain = spread(WritesItself())
    optimized = normpass.optimize(copy.deepcopy(plain))
    expected, found = (outcome(m, "body.1.running_var", nothing) for m in (plain, optimized))
    assert found == expected != "nothing"


@pytest.mark.parametrize("case", ["chain", "residual joins", "concatenations", "another dtype"])
def test_other_forwards_may_move_them(case: str) -> None:
    """In train mode, before and after somebody writes; the gradients are plain's."""
    torch.manual_seed(0)
    plain = spread(CASES[case][0]())
    optimized = normpass.optimize(copy.deepcopy(plain))
    for model in (plain, optimized):
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
        losses = [model(image(seed=seed)).square().sum() for seed in range(3)]
        torch.stack(losses[::-1]).sum().backward()
    for p, q in zip(plain.parameters(), optimized.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9 * float(p.grad.abs().max() + 1))


def test_other_threads_may_move_them() -> None:
    """No move is taken for somebody else's, whenever threads take turns."""
    model, errors = normpass.optimize(spread(chain())), []
    model(image())

    def train() -> None:
        try:
            for _ in range(30):
                model(image()).sum().backward()
        except RuntimeError as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_moved_under_a_norm_in_eval_mode() -> None:
    """Plain computes such a gradient with other statistics than forward's; here it is refused, with advice."""
    model = normpass.optimize(spread(chain()))
    y = model.eval()(image(requires_grad=True))
    z = model.train()(image(seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*a forward in train mode has moved them"):
        (y.sum() + z.sum()).backward()


def test_what_is_no_statistic_gets_no_such_advice() -> None:
    model = normpass.optimize(spread(chain()))
    y = model(image())
    with torch.no_grad():
        model[3].weight.add_(1)
    with pytest.raises(RuntimeError) as raised:
        y.sum().backward()
    assert "running statistics" not in str(raised.value)
