"""The radius over training: linear, in every state, resumable in the middle bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn

from normpass.errors import InvalidInputError
from normpass.nn import RadiusSchedule, SparseSwitchableNorm2d, parameter_groups


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), SparseSwitchableNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), SparseSwitchableNorm2d(4)
    )


class Run:
    """A training that can be saved and resumed."""

    def __init__(self, steps=20):
        self.model = network()
        groups = parameter_groups(self.model, 0.5, weight_decay=0.01)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.schedule = RadiusSchedule(self.model, steps)

    def step(self, index):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(index))
        self.optimizer.zero_grad()
        self.model(x).square().mul(torch.linspace(-1, 1, 9).view(3, 3)).mean().backward()
        self.optimizer.step()
        self.schedule.step()

    def state(self):
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}


def test_linear_and_then_constant():
    model = network()
    schedule = RadiusSchedule(model, 4, start=0.2, end=0.6, freeze=False)
    radii = []
    for _ in range(6):
        radii.append(float(model[1].radius))
        schedule.step()
    assert radii == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    assert float(model[4].radius) == pytest.approx(0.6)
    assert "1.radius" in model.state_dict()


def test_every_layer_decides_and_is_frozen():
    run = Run()
    for index in range(20):
        run.step(index)
    for layer in (run.model[1], run.model[4]):
        assert layer.chosen is not None and not layer.mean_logits.requires_grad


@pytest.mark.parametrize("stop", [1, 9, 15, 19])
def test_resuming_in_the_middle_continues_bit_for_bit(stop):
    straight, first = Run(), Run()
    for index in range(24):
        straight.step(index)
        if index < stop:
            first.step(index)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = Run(steps=7)  # its options come with the state
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.schedule.load_state_dict(state["schedule"])
    assert [m.chosen for m in second.model if hasattr(m, "chosen")] == [
        m.chosen for m in first.model if hasattr(m, "chosen")
    ]
    for index in range(stop, 24):
        second.step(index)
    for (name, a), (_, b) in zip(straight.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert a.isfinite().all() and torch.equal(a, b), name


def test_a_deep_copy_of_the_model_keeps_its_radius():
    model = network()
    RadiusSchedule(model, 10, start=0.3)
    assert float(copy.deepcopy(model)[1].radius) == pytest.approx(0.3)


def test_parameter_groups():
    model = network()
    others, logits = parameter_groups(model, 0.1, weight_decay=1e-4)
    assert [len(g["params"]) for g in (others, logits)] == [8, 4]
    assert logits["lr"] == pytest.approx(0.01) and logits["weight_decay"] == 0.0
    assert (others["lr"], others["weight_decay"]) == (0.1, 1e-4)
    assert any(p is model[1].mean_logits for p in logits["params"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "`steps` must be at least 1, it is 0"),
        ({"steps": "2"}, "`steps` must be a number, it is '2'"),
        ({"steps": 2, "end": 1.5}, r"`end` must be in \[0, 1\], it is 1.5"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InvalidInputError, match=message):
        RadiusSchedule(network(), **options)


def test_refuses_a_model_without_switchable_norms():
    with pytest.raises(InvalidInputError, match="no layer of this BatchNorm2d is a switchable norm"):
        RadiusSchedule(nn.BatchNorm2d(3), 10)
