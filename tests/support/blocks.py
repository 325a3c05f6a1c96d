"""Small models around a norm, and what was done to their norms while they trained as the plain ones."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn
from training import assert_equal, captures_of, spread, train

import normpass
from normpass.collect import Collected
from normpass.report.explain import norm_rows
from normpass.report.summary import Row

C = 4


def conv(inputs: int = 3, outputs: int = C) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def small(*layers: nn.Module) -> nn.Sequential:
    """A convolution, the layers, a convolution that keeps its input."""
    torch.manual_seed(0)
    return spread(nn.Sequential(conv(), *layers, conv(C, 2)))


def trains_alike_by(model: nn.Module, x: torch.Tensor, evaluating: bool = True) -> dict[str, Row]:
    """Two steps in train mode, one in eval mode, compared with plain; what was done to the norms, by their paths."""
    plain, optimized = model, normpass.optimize(copy.deepcopy(model))
    graphs = captures_of(optimized)
    assert_equal(train(plain, (x,)), train(optimized, (x,)))
    rows = norm_rows(optimized, Collected([graph for graph in graphs if graph.keeps_gradients]))
    if evaluating:
        assert_equal(train(plain.eval(), (x,), steps=1), train(optimized.eval(), (x,), steps=1))
    return {row.path: row for row in rows}


def rewrites_of(rows: dict[str, Row]) -> dict[str, str | None]:
    return {path: row.rewrite for path, row in rows.items()}


class Block(nn.Module):
    """conv, norm and a function of (self, x, norm's result) that says what follows."""

    def __init__(self, after, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.last, self.after = conv(), nn.BatchNorm2d(C), conv(C, 2), after
        for name, layer in layers.items():
            setattr(self, name, layer)
        spread(self)

    def forward(self, x):
        return self.after(self, x, self.conv(x))


class Many(nn.Module):
    """Blocks that read the same input, by the names of what follows in them: one graph for many cases."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({block.after.__name__: block for block in blocks})

    def forward(self, x):
        return {name: block(x) for name, block in self.blocks.items()}


def chain(norms: dict[str, nn.Module]) -> nn.Module:
    """conv → norm → ReLU for each, one behind the other."""
    torch.manual_seed(0)
    layers = {name: nn.Sequential(conv(C, C), norm, nn.ReLU()) for name, norm in norms.items()}
    return spread(nn.Sequential(OrderedDict(first=conv(), **layers, last=conv(C, 2))))
