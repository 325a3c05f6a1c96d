"""What is not a model, or not an option: a clear error."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from blocks import C, conv
from torch import nn
from training import ConvNet, assert_equal, image, spread, train

import normpass
from normpass.measure import kept_bytes
from normpass.passes import LeakyReLU


@pytest.mark.parametrize("thing", [None, 3, torch.relu, nn.BatchNorm2d, "resnet18", image()])
def test_not_a_module(thing: object) -> None:
    with pytest.raises(normpass.InvalidModelError, match=f"must be a torch.nn.Module, it is a {type(thing).__name__}"):
        normpass.optimize(thing)


def test_optimized_already() -> None:
    optimized = normpass.optimize(ConvNet())
    with pytest.raises(normpass.InvalidModelError, match="this ConvNet is optimized already; .* normpass.restore"):
        normpass.optimize(optimized)
    with pytest.raises(normpass.InvalidModelError, match="`1.0` is optimized already"):
        normpass.optimize(nn.Sequential(conv(), nn.Sequential(optimized)))
    assert normpass.explain(optimized, image().float()).rewritten == 2


def test_restore_of_a_plain_model() -> None:
    with pytest.raises(normpass.InvalidModelError, match="was not made by normpass.optimize"):
        normpass.restore(ConvNet())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_compiled_and_scripted_models() -> None:
    with pytest.raises(normpass.InvalidModelError, match="optimize the plain module first"):
        normpass.optimize(torch.compile(ConvNet(), backend="eager"))
    with pytest.raises(normpass.InvalidModelError, match="optimize the plain module first"):
        normpass.optimize(torch.jit.script(conv()))


def test_example_inputs_of_another_kind() -> None:
    model = ConvNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for inputs in (image(2, 5, 8, 8).float(), (), (1, 2), {"y": image()}, image().long()):
        words = "`example_inputs`: ConvNet does not run on inputs of shape"
        with pytest.raises(normpass.InvalidInputError, match=words):
            normpass.optimize(model, inputs)
        with pytest.raises(normpass.InvalidInputError, match=words):
            normpass.explain(model, inputs)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_advice_stands_before_what_torch_says() -> None:
    for given in (np.zeros((2, 3, 8, 8)), 3, "2x3x16x16"):
        with pytest.raises(normpass.InvalidInputError, match="there is no tensor among them.*give a tensor") as raised:
            normpass.optimize(ConvNet(), given)
        assert len(str(raised.value)) < 500 and type(given).__name__ in str(raised.value)


@pytest.mark.parametrize("function", [normpass.optimize, normpass.explain, kept_bytes])
def test_a_lazy_model_is_called_first(function) -> None:
    """It cannot be put back to what it was; that is not said to be the inputs' fault."""
    model = nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d()).double()
    with pytest.raises(normpass.InvalidModelError, match="`0.weight` of this Sequential has no shape yet: .* call the"):
        function(model, image())
    model(image())
    function(model, image())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_part_of_the_model_is_scripted() -> None:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
        pair.append(nn.Sequential(conv(), scripted, conv(C, 2)).double())
    model = pair[1]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = normpass.optimize(model, image())
    report = normpass.explain(model, image())
    assert report.memory is not None and report.memory.kept_before == kept_bytes(model, image())
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert_equal(*(train(m, (image(),)) for m in (pair[0], optimized)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("leaky_relu", "is a sequence of names or option objects"),
        (("leaky",), '"leaky" is not known; known are "leaky_relu"'),
        ((3,), "3 is neither a name"),
        ((LeakyReLU,), "is neither a name"),
    ],
)
def test_wrong_changes(changes: object, words: str) -> None:
    with pytest.raises(normpass.InvalidInputError, match=words):
        normpass.optimize(ConvNet(), changes=changes)


class HasALock(ConvNet):
    """Cannot be copied deeply; need not be, for a copy that shares what is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


def test_a_model_that_cannot_be_copied_deeply() -> None:
    torch.manual_seed(0)
    models = [spread(HasALock()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimized = normpass.optimize(models[1], image())
    assert optimized.lock is models[1].lock
    assert_equal(*(train(m, (image(),), steps=1) for m in (models[0], optimized)))


class HoldsAnIterator(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.cycle([self.stem])


def test_a_model_whose_copy_could_not_lead_to_copies() -> None:
    with pytest.raises(normpass.InvalidModelError, match="leads to a cycle, which holds a module"):
        normpass.optimize(HoldsAnIterator())
