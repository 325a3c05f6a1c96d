"""A model with its serialized forward beside it, and nets whose norms look at one sample at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d
from training import assert_equal, train

from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_run import facts_of
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch
from normpass.serialize.traffic import graph_of


class Serial(nn.Module):
    """`model`, whose forward runs as `serialize_minibatch` rewrites it for inputs like these."""

    def __init__(self, model: nn.Module, *inputs: Tensor, **options: int) -> None:
        super().__init__()
        self.model = model
        program, values = graph_of(model, *inputs)
        self.graph = program.graph
        self.found = SerializeMinibatch(**options).apply(self.graph, facts_of(program, FakeInputs(values)))
        self.graph.lint()
        self._run, self._values = fx.GraphModule(program, self.graph).forward, values
        self._places = [next(i for i, v in enumerate(values) if v is given) for given in inputs]

    def forward(self, *inputs: Tensor):
        values = list(self._values)
        for place, given in zip(self._places, inputs, strict=True):
            values[place] = given
        results = self._run(*values)
        return results[0] if len(results) == 1 else results

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        return [(group.name, group.sub_batch, group.iterations) for group in self.found.groups]

    @property
    def reasons(self) -> dict[str, str]:
        return {refusal.path: refusal.reason for refusal in self.found.refusals}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a norm behind each, and the input or a projection of it added."""

    def __init__(self, norm, inside: int, channels: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, channels, 1, bias=False), norm(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), norm(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, outside, 1, bias=False), norm(outside)
        self.relu = nn.ReLU(inplace=True)
        self.project = None
        if stride > 1 or inside != outside:
            self.project = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        h += x if self.project is None else self.project(x)
        return self.relu(h)


class SmallResNet(nn.Module):
    """A stem, two bottlenecks, a linear head."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = Bottleneck(norm, 8, 4, 16)
        self.layer2 = Bottleneck(norm, 16, 8, 32, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h = self.avgpool(self.layer2(self.layer1(h)))
        return self.fc(torch.flatten(h, 1))


NORMS = {
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance, running": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "frozen": FrozenBatchNorm2d,
    "eval": nn.BatchNorm2d,
    "eval, no affine": lambda c: nn.BatchNorm2d(c, affine=False),
}


def small_resnet(kind: str, seed: int = 0) -> nn.Module:
    """fp64, norms away from one and zero; those that use running statistics in eval mode."""
    torch.manual_seed(seed)
    model = SmallResNet(NORMS[kind]).double()
    for module in model.modules():
        for name, low, high in (
            ("weight", 0.5, 1.5), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)
        ):  # fmt: skip
            values = getattr(module, name, None)
            if values is not None and values.dim() == 1:
                values.data.uniform_(low, high)
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            module.train(not module.track_running_stats)
    return model


SHAPE = 7, 3, 16, 16


def serial(model, *shape, sub_batch=3, **options):
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(5)
    return Serial(model, torch.randn(shape or SHAPE, dtype=dtype, generator=generator), sub_batch=sub_batch, **options)


def assert_trains_alike(model, x, **options):
    """Two steps of the plain model and of a copy that runs serialized; returns the latter."""
    other = Serial(copy.deepcopy(model), x, **options)
    expected = train(model, (x,))
    assert_equal(expected, train(other.model, (x,), run=lambda _, x: other(x)))
    return other
