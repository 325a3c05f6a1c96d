"""Checkpoints inside and around an optimized model, and those that are put in later: the regions are the user's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conv_blocks import block
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import assert_equal, captures_of, image, spread, train

import normpass
from normpass.measure import kept_bytes

X = image()


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
