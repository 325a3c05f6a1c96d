"""Modes and frozen parts, in any order: the plain model's numbers, and never more kept."""

from __future__ import annotations

import copy

import pytest
import torch
from conv_blocks import C, block
from torch import nn
from training import ConvNet, assert_equal, image, loss_of, spread, train

import normpass
from normpass.measure import kept_bytes


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
        self.stem = block(inplace=True)
        self.blocks = nn.Sequential(*(block(C, C, inplace=True) for _ in range(blocks)))
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
