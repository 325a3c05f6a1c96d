"""Random modules train like the plain ones: convolutions, norms, joins, views, writes, Python.

`random_modules` writes them. Each is trained for three steps, plain and optimized, in float64, with what a training
loop may do in between. After every step outputs and their strides, gradients of parameters and inputs, inputs,
parameters, buffers and attributes are the same, and where one raises, so does the other, with the same class.

A number may differ by 1e-9 of the largest in its tensor, by 1e-11 of the largest of its step, or by 100 times what
plain differs from itself when its inputs move by one ulp. Four differences are meant:

- somebody writes to what plain keeps and ours does not (the result of an activation, after forward): plain raises in
  backward, ours gives its gradients;
- somebody writes to what ours reads and plain does not (an input that was concatenated; what something is made again
  from, where a part of the gradients is asked for): ours raises in backward;
- running statistics that a forward reads have moved before its backward: ours raises, plain does not notice;
- `model.eval()` between forward and the backward of a `checkpoint`: plain runs the region again as it is by then and
  raises, ours runs the captured one, and gives the gradients of what forward ran.

`support/random_training.py` trains and compares, and tries other seeds by hand.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_modules import Program, Step, random_program
from random_training import failure

from normpass.recipe import recipes as recipe

EXAMPLES = 150


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_random_modules_train_the_same(rng):
    program = random_program(rng)
    found = failure(program)
    assert found is None, f"{found}\n{program}"


ALIKE = Step()
FOUND = {
    "written to before it is concatenated": Program(
        ("nn.BatchNorm2d(8)",), ("z[z > 1] = 0.25", "v = self.l0(torch.cat([z, x * 2], 1)).relu()"), "v", (ALIKE,)
    ),
    "a part of channels_last": Program(
        ("nn.BatchNorm2d(2)",), ("v = F.dropout(self.l0(x[:, :2]), 0.3)",), "v", (Step(layout="channels_last"),)
    ),
    "a part of channels_last before a depthwise convolution": Program(
        ("nn.BatchNorm2d(2)", "nn.Conv2d(2, 2, 3, padding=1, groups=2)"),
        ("v = self.l1(F.relu(self.l0(x[:, :2])))",),
        "v",
        (Step(layout="channels_last"),),
    ),
    "a norm is called twice, once in two layouts": Program(
        ("nn.BatchNorm2d(4)", "nn.Conv2d(4, 4, 1)"),
        ("v = F.relu(x + self.l0(z.contiguous(memory_format=torch.channels_last)))", "v = F.relu(self.l0(self.l1(v)))"),
        "v",
        (ALIKE,),
    ),
    "a residual that somebody changes": Program(
        ("nn.BatchNorm2d(4)", "nn.PReLU()"),
        ("v = self.l0(z.exp())", "v += x", "v = self.l1(F.relu_(v))"),
        "v",
        (Step(between="args[0].add_(0.3)"),),
    ),
    "a sum lies as its first term": Program(
        ("nn.BatchNorm2d(4)",),
        ("v = self.l0(z.contiguous(memory_format=torch.channels_last))", "v = F.dropout(x + v, 0.3)"),
        "v",
        (ALIKE,),
    ),
    "a concatenation of parts": Program(
        ("nn.BatchNorm2d(4)", "nn.BatchNorm2d(4)"),
        ("v = self.l0(x)", "v = F.dropout(self.l1(torch.cat((v[:, 1:], v[:, :1]), 1)), 0.3)"),
        "v",
        (Step(layout="channels_last"),),
    ),
    "second derivative of a custom function": Program(
        ("nn.BatchNorm2d(4)",), ("v = grad_scale(self.l0(x * z))",), "v", (Step(backward="second"),)
    ),
    "a norm without gradients": Program(
        ("nn.BatchNorm2d(4)", "nn.LayerNorm([4, 8, 8])"),
        ("v = self.l1(self.l0(z.tanh()))",),
        "v + x",
        (Step("model.l0.requires_grad_(False)", "model.l0.weight.mul_(1.5)", second="detached"),),
    ),
    "an input in a list": Program(
        ("nn.BatchNorm2d(8)",),
        ("v = torch.cat([x, z], 1)", "v = self.l0(v.masked_fill(v < 0, 0.3))"),
        "v",
        (Step(between="args[0].add_(0.3)"),),
    ),
    "an output in a concatenation": Program(
        ("nn.BatchNorm2d(8)",),
        ("v = x * x", "w = F.relu(self.l0(torch.cat([x, v], 1)))"),
        "[w.square(), v]",
        (Step(between="outputs[-1].detach().add_(0.1)"),),
    ),
    "a dropped input that is written to": Program(
        ("nn.BatchNorm2d(4)",), ("v = F.dropout(z, 0.3)", "z *= 0.7", "v = self.l0(v)"), "v", (ALIKE,)
    ),
    "kept by what nobody reads": Program(
        ("nn.Conv2d(4, 4, 1)", "nn.BatchNorm2d(4)"),
        ("self.l0(x).lerp_(x, 0.4)", "self.l1(x)", "v = (1 - x).sigmoid()"),
        "v",
        (Step(between="args[0].add_(0.3)"),),
    ),
    "a norm that only a mask is made of": Program(
        ("nn.BatchNorm2d(4)",),
        ("v = z.masked_fill(F.relu(z + self.l0(z)) < 1, 0.3) * 2",),
        "v",
        (Step(between="model.l0.weight.mul_(1.5)"),),
    ),
    "written to twice": Program(
        ("nn.BatchNorm2d(4)",), ("v = self.l0(x)", "v = v.clamp_(-1, 1).mul_(z).exp()"), "v", (ALIKE,)
    ),
    "kept by what is written in place and nobody reads": Program(
        ("nn.Conv2d(4, 4, 1)",),
        ("v = self.l0(F.relu6(x * 0.5))", "(x / 3).index_add_(1, torch.tensor([1, 0]), x[:, :2])"),
        "[v, z]",
        (Step(between="outputs[-1].detach().add_(0.1)", second="detached"),),
    ),
    "an output that is written to with itself": Program(
        ("nn.BatchNorm2d(4)", "nn.Conv2d(4, 4, 1)"),
        ("v = x * x.mean((2, 3), True).sigmoid()", "v.lerp_(v, 0.4)", "w = self.l1(self.l0(x - v).clamp_(-1, 1))"),
        "[w, v]",
        (Step(between="outputs[-1].detach().add_(0.1)"),),
    ),
    "parts of what is written to": Program(
        ("nn.BatchNorm2d(4)",),
        ("v = F.relu(torch.stack(x.unbind(1)[::-1], 1))", "x[:, :2] += x[:, :2]", "w = F.relu(self.l0(v))"),
        "[w, v]",
        (ALIKE,),
    ),
    "parts of what is written to, returned": Program(
        ("nn.BatchNorm2d(4)",), ("v = x.unbind(1)", "x.mul_(2)", "w = F.relu(self.l0(x))"), "[w, *v]", (ALIKE,)
    ),
    "written to where it is no leaf": Program(
        (), ("x.detach().unbind(1)[0].add_(0.1)", "v = x.add_(z)"), "v", (ALIKE,)
    ),
}
"""What was wrong once, cut down."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_before(name):
    assert failure(FOUND[name]) is None


def test_a_wrong_gradient_is_found(monkeypatch):
    """The comparison itself: a rebuilt activation that is off by 1e-8 shows in a gradient."""
    right = recipe.Recipe.read
    monkeypatch.setattr(recipe.Recipe, "read", lambda self: right(self) * (1 + 1e-8))
    layers = ("nn.BatchNorm2d(4)", "nn.Conv2d(4, 4, 1)")
    found = failure(Program(layers, ("v = self.l1(F.relu(self.l0(x)))",), "v", (ALIKE,)))
    assert found is not None and "0 gradient l1.weight: differs by" in found
