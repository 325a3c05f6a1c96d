"""A network with a convolution of ours beside its plain one."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from training import assert_same_step, collected

import normpass
from normpass.runtime.convolution import convolution_function


class Inverted(nn.Module):
    """expand, depthwise, project: the block of the mobile networks."""

    channels, kernel_size, activation = 6, 5, staticmethod(F.silu)

    def __init__(self, **options):
        super().__init__()
        channels, size = self.channels, self.kernel_size
        options = {"kernel_size": size, "padding": size // 2, "groups": channels, "bias": False, **options}
        self.expand = nn.Conv2d(3, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, **options)
        self.last = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        x = self.activation(self.norm(self.expand(x)))
        return self.project(self.activation(self.last(self.depthwise(x))))


def count_runs(monkeypatch, function):
    """Grows with every run of an autograd function."""
    counted = []
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


def pair(kind, memory_format=torch.contiguous_format, **options):
    torch.manual_seed(0)
    plain = kind(**options).double().to(memory_format=memory_format)
    return plain, normpass.optimize(copy.deepcopy(plain))


def has_kernels():
    return normpass.kernels.kernels_for("cpu") is not None


def ours(model, x):
    """How many convolutions of the graph may have kernels of ours."""
    (graph,) = collected(model, x).graphs
    return [n.target for n in graph.graph_module.graph.nodes].count(convolution_function)


def assert_change_is_seen(kind, change, x):
    plain, optimized = pair(kind)
    assert_same_step(plain, optimized, x)
    for model in (plain, optimized):
        torch.manual_seed(1)
        change(model)
    assert_same_step(plain, optimized, x)


def hook(model):
    model.depthwise.register_forward_hook(lambda layer, args, y: 2 * y)


def freeze(model):
    model.depthwise.weight.requires_grad_(False)


def evaluate(model):
    model.eval()
