"""What forward reads is read at every call, as the plain model does."""

from __future__ import annotations

import dataclasses
import functools
import types
from enum import Enum

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forwards import STATE, C, Net, assert_equal, assert_same, block, cases, multiplied, net, outcome, then
from torch import nn


class Factors(Enum):
    ONE = 1
    THREE = 3


@dataclasses.dataclass(slots=True)
class Settings:
    scale: float = 1.0


class WithProperty(Net):
    @property
    def flag(self) -> float:
        return self.scale + 1

    def forward(self, x):
        return self.last(self.body(x)) * self.flag


def with_closure() -> nn.Module:
    factor = 1.0

    class Closed(Net):
        def forward(self, x):
            return self.last(self.body(x)) * factor

        def change(self):
            nonlocal factor
            factor = 3.0

    return Closed()


def set_class_flag(model: nn.Module) -> None:
    next(c for c in type(model).__mro__ if "flags" in vars(c)).flags = [3.0]


def with_class_list() -> nn.Module:
    return type("Case", (Net,), {"flags": [1.0], "forward": multiplied(lambda self: self.flags[0])})()


FACTOR = 1.0


def with_global() -> nn.Module:
    globals()["FACTOR"] = 1.0
    return net(multiplied(lambda self: FACTOR))()


READ = {
    "attribute": (net(multiplied(lambda self: self.flag), flag=1.0), lambda m: setattr(m, "flag", 3.0)),
    "sign of zero": (
        net(lambda self, x: self.last(self.body(x)) + 1 / torch.full((), self.flag).clamp(-1, 1).exp(), flag=0.5),
        lambda m: setattr(m, "flag", -0.5),
    ),
    "class attribute": (with_class_list, set_class_flag),
    "class list": (with_class_list, lambda m: m.flags.__setitem__(0, 3.0)),
    "property": (lambda: WithProperty(scale=1.0), lambda m: setattr(m, "scale", 3.0)),
    "enum": (
        net(multiplied(lambda self: self.flag.value), flag=Factors.ONE),
        lambda m: setattr(m, "flag", Factors.THREE),
    ),
    "list": (net(multiplied(lambda self: self.flags[0]), flags=[1.0]), lambda m: m.flags.__setitem__(0, 3.0)),
    "tuple in a dict": (
        net(multiplied(lambda self: self.table["scale"][0]), table={"scale": (1.0,)}),
        lambda m: m.table.update(scale=(3.0,)),
    ),
    "slots": (
        net(multiplied(lambda self: self.settings.scale), settings=Settings()),
        lambda m: setattr(m.settings, "scale", 3.0),
    ),
    "namespace": (
        net(multiplied(lambda self: self.config.inner.scale), config=types.SimpleNamespace(inner=Settings())),
        lambda m: setattr(m.config.inner, "scale", 3.0),
    ),
    "global": (with_global, lambda m: globals().update(FACTOR=3.0)),
    "field of a global": (net(multiplied(lambda self: STATE.factor)), lambda m: setattr(STATE, "factor", 3.0)),
    "closure": (with_closure, lambda m: m.change()),
    "function": (net(lambda self, x: self.act(self.body[:2](x)), act=F.relu), lambda m: setattr(m, "act", torch.tanh)),
    "partial": (
        net(lambda self, x: self.act(self.body[:2](x)), act=functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda m: setattr(m, "act", functools.partial(F.leaky_relu, negative_slope=0.7)),
    ),
    "numpy": (
        net(multiplied(lambda self: float(self.values.sum())), values=np.ones(2)),
        lambda m: m.values.__setitem__(0, 5.0),
    ),
    "key that comes later": (
        net(multiplied(lambda self: self.table.get("scale", 1.0)), table={}),
        lambda m: m.table.update(scale=3.0),
    ),
    "hasattr": (
        net(multiplied(lambda self: 3.0 if hasattr(self, "extra") else 1.0)),
        lambda m: setattr(m, "extra", True),
    ),
    "tensor attribute": (
        net(multiplied(lambda self: self.scale), scale=torch.ones((), dtype=torch.float64)),
        lambda m: m.scale.mul_(3),
    ),
    "eps": (net(), lambda m: setattr(m.body[1], "eps", 0.3)),
    "momentum": (net(), lambda m: setattr(m.body[1], "momentum", 0.7)),
    "cumulative average": (net(), lambda m: setattr(m.body[1], "momentum", None)),
    "frozen norm": (net(), lambda m: m.body[1].eval()),
    "requires_grad": (net(), lambda m: m.body[0].weight.requires_grad_(False)),
    "option of an activation": (
        lambda: nn.Sequential(*block(3, nn.LeakyReLU), nn.Conv2d(C, 2, 1)),
        lambda m: setattr(m[2], "negative_slope", 0.5),
    ),
    "approximation": (
        lambda: nn.Sequential(*block(3, nn.GELU), nn.Conv2d(C, 2, 1)),
        lambda m: setattr(m[2], "approximate", "tanh"),
    ),
    # what stands where
    "layer replaced": (net(), lambda m: m.body.__setitem__(2, nn.Softplus())),
    "norm replaced": (net(), lambda m: m.body.__setitem__(1, nn.Identity())),
    "layer appended": (net(), lambda m: m.body.append(nn.Softplus())),
    "layer deleted": (net(), lambda m: m.body.__delitem__(2)),
    "forward of a layer": (net(), lambda m: setattr(m.body[2], "forward", lambda x: F.relu(x) * 2)),
    "forward of the model": (
        net(),
        lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.last(x[:, :1].repeat(1, C, 1, 1)), m)),
    ),
    "hook": (net(), lambda m: m.body[0].register_forward_hook(lambda layer, args, y: y * 2)),
    "hook of the model": (net(), lambda m: m.register_forward_hook(lambda layer, args, y: y * 2)),
    "hook of the norm": (net(), lambda m: m.body[1].register_forward_pre_hook(lambda layer, args: (args[0].exp(),))),
    "parameter": (net(), lambda m: setattr(m.last, "weight", nn.Parameter(m.last.weight.detach() * 3))),
    "parametrisation": (net(), lambda m: nn.utils.parametrizations.weight_norm(m.last)),
}


@cases(READ)
def test_what_forward_reads_is_read_at_every_call(case) -> None:
    make, change = case
    assert_same(make, then(change))
    changed = outcome(make, then(change), lambda model: model)
    with pytest.raises(AssertionError):  # the change matters
        assert_equal(changed, outcome(make, then(lambda model: None), lambda model: model))
