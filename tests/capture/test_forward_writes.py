"""What forward writes is written at every call: Python's objects, tensors, and through which view it may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from forwards import STATE, C, Net, assert_same, cases, images, net, outcome, steps
from torch import Tensor, nn

import normpass

# --- what forward writes --------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.shapes: list = []

    def hook(self, module, inputs, output) -> None:
        self.shapes.append(output.shape)


def hooked() -> nn.Module:
    model, model_recorder = Net(), Recorder()
    model.body.register_forward_hook(model_recorder.hook)
    STATE.object = model_recorder
    return model


def append_to_global(self, x):
    STATE.log.append(len(STATE.log))
    return self.last(self.body(x)) * len(STATE.log)


def set_attribute(self, x):
    self.seen = self.body(x)
    self.calls = self.calls + 1
    return self.last(self.seen)


def count_in_a_list(self, x):
    self.count[0] += 1
    return self.last(self.body(x)) * self.count[0]


def fill_a_dict(self, x):
    self.table.setdefault(x.shape[0], []).append(x.mean())
    return self.last(self.body(x))


def remember(self, x):
    self.seen.append(self.body(x))
    return self.last(self.seen[-1])


def write_a_tensor(self, x):
    self.scale.mul_(2)
    return self.last(self.body(x)) * self.scale


class Buffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.written.add_(1)
        self.replaced = self.replaced + 1
        return self.last(self.body(x)) * (self.written + self.replaced)


WRITTEN = {
    "global list": (net(append_to_global), lambda m: [*steps(m), len(STATE.log)]),
    "attributes": (net(set_attribute, calls=0), lambda m: [*steps(m), m.seen.detach(), m.calls]),
    "counter": (net(count_in_a_list, count=[0]), lambda m: [*steps(m), m.count[0]]),
    "dict": (net(fill_a_dict, table={}), lambda m: [*steps(m), *m.table[2]]),
    "activations in a list": (net(remember, seen=[]), lambda m: [*steps(m), *(t.detach() for t in m.seen)]),
    "tensor attribute": (
        net(write_a_tensor, scale=torch.ones((), dtype=torch.float64)),
        lambda m: [*steps(m), m.scale],
    ),
    "buffers": (Buffers, steps),
    "object of a hook": (hooked, lambda m: [*steps(m), len(STATE.object.shapes)]),
}


@cases(WRITTEN)
def test_what_forward_writes_is_written_at_every_call(case) -> None:
    assert_same(*case)


# --- what writes to what --------------------------------------------------------------------------


class Two(nn.Module):
    """Two convolutions; `write` gets their results before the norm reads their concatenation."""

    def __init__(self, write: Callable) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), nn.BatchNorm2d(2 * C)
        self.last, self.write = nn.Conv2d(2 * C, 2, 1), write

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        self.write(a)
        return self.last(F.relu(self.norm(torch.cat([a, b], 1))))


WRITES = {
    "ravel": lambda a: a.ravel().mul_(0.5),
    "diagonal": lambda a: a.diagonal(0, 2, 3).add_(1),
    "foreach": lambda a: torch._foreach_mul_([a, a[:1].detach().clone()], 0.5),
    "foreach of views": lambda a: torch._foreach_add_([a[0], a[1, 2:]], 1.0),
    "out": lambda a: torch.mul(a.detach(), 0.5, out=a.detach()),
    "data": lambda a: a.data.mul_(0.5),
    "item": lambda a: a.__setitem__((slice(None), 0), 0.25),
    "transpose": lambda a: a.mT.neg_(),
    "narrow": lambda a: a.narrow(1, 1, 2).tanh_(),
    "as_strided": lambda a: a.as_strided((2, 2), (1, 3)).zero_(),
}


@cases(WRITES)
def test_a_write_through_any_view_is_seen(case) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            first = model(images())
        return [first, *steps(model, count=1)]

    assert_same(lambda: Two(case), run)


def read_statistics(self, x):
    h = self.body[0](x)
    y = self.body[1](h)
    seen = self.body[1].running_mean.clone()
    return self.last(F.relu(y + h)) + seen.view(1, -1, 1, 1)


def write_weight(self, x):
    h = self.body[0](x)
    y = self.body[1](h)
    with torch.no_grad():
        self.body[1].bias.add_(1)
    return self.last(F.relu(y + h) + self.body[1].bias.view(1, -1, 1, 1))


def write_input(self, x):
    h = self.body[0](x)
    y = self.body[1](h.clone())
    h.mul_(2)
    return self.last(F.relu(y + h))


@cases({"read": read_statistics, "weight": write_weight, "residual": write_input})
def test_what_stands_between_a_norm_and_its_addition(case) -> None:
    assert_same(net(case))


def mask_in_place(self, x):
    z = self.body(x)
    y = self.last(z)
    z[z > 0.5] = 0.0
    return y


def weight_in_place(self, x):
    y = self.last(self.body(x))
    with torch.no_grad():
        self.last.weight.mul_(2)
    return y


@cases({"masked": mask_in_place, "weight": weight_in_place})
def test_what_plain_refuses_in_backward_is_refused(case) -> None:
    for optimize in (lambda model: model, normpass.optimize):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outcome(net(case), steps, optimize)


def test_an_activation_that_a_list_holds() -> None:
    def make() -> nn.Module:
        model = net(remember, seen=[])()
        model.seen.append(model.last(torch.zeros(1, C, 2, 2)))
        return model

    assert_same(make)
