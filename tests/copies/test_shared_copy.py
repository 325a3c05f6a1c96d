"""The copy shares what it may, computes and trains as the model, which stays as it was."""

from __future__ import annotations

import copy
import random
import threading
import types
import weakref
from typing import Any

import pytest
import timm
import torch
import torchvision
from shared_copies import Net, assert_independent, assert_same_numbers, checked_copy, image, numbers, snapshot
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from normpass.copies.shared_copy import shared_copy
from normpass.errors import InvalidModelError

OLD_NORMS = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


# --- real networks --------------------------------------------------------------------------------

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), (2, 3, 32, 32)),
    "googlenet": (lambda: torchvision.models.googlenet(num_classes=3, init_weights=True), (2, 3, 64, 64)),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32), (2, 3, 32, 32)),
    "timm_resnet": (lambda: timm.create_model("resnet10t", num_classes=3), (2, 3, 32, 32)),
    "timm_efficientnet": (lambda: timm.create_model("efficientnet_b0", num_classes=3, drop_rate=0.2), (2, 3, 32, 32)),
    "timm_features": (lambda: timm.create_model("resnet10t", features_only=True), (2, 3, 32, 32)),
    "timm_swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=3), (1, 3, 224, 224)),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (4, 2, 8)),
    "lstm": (lambda: nn.LSTM(8, 6, 2, bidirectional=True), (4, 2, 8)),
    "gru_cell": (lambda: nn.GRUCell(8, 6), (4, 8)),
    "graph": (lambda: fx.symbolic_trace(Net()), (2, 3, 8, 8)),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), (2, 8)),
    "old_weight_norm": (lambda: weight_norm(nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "old_spectral_norm": (lambda: spectral_norm(nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), (2, 3, 8, 8)),
}


@OLD_NORMS
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_network(name: str, training: bool) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double().train(training)
    copied = checked_copy(model)
    assert_same_numbers(model, copied, image(*shape))
    assert_independent(model, copied)


def test_of_a_copy() -> None:
    model = Net().double()
    copied = checked_copy(checked_copy(model))
    assert_same_numbers(model, copied, image())


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.dict = nn.ModuleDict({"a": nn.ReLU(), "b": self.list[0]})
        self.values = nn.ParameterList([torch.ones(3), torch.ones(3)])
        self.named = nn.ParameterDict({"scale": torch.ones(3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer, value in zip(self.list, self.values, strict=True):
            x = self.dict["a"](layer(x)) * value
        return self.dict["b"](x) * self.named["scale"]


def test_containers_of_torch_and_one_layer_under_two_names() -> None:
    model = Containers().double()
    copied = checked_copy(model)
    assert copied.dict["b"] is copied.list[0]
    assert_same_numbers(model, copied, image(2, 3))
    copied.list.append(nn.ReLU())
    copied.values.append(torch.ones(3))
    copied.named["more"] = torch.ones(3)
    assert len(model.list) == 2 and len(model.values) == 2 and "more" not in model.named


def test_a_weight_set_on_the_copy_of_an_rnn() -> None:
    model = nn.LSTM(3, 4).double()
    expected, copied = numbers(model, image(2, 2, 3)), shared_copy(model)
    copied.weight_hh_l0 = nn.Parameter(torch.zeros_like(model.weight_hh_l0))
    torch.testing.assert_close(numbers(model, image(2, 2, 3)), expected, rtol=0, atol=0)
    assert model._flat_weights[1] is model.weight_hh_l0 and copied._flat_weights[1] is copied.weight_hh_l0


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(5))
    copied = checked_copy(model)
    out = copied(image().float())
    assert type(copied[0]) is nn.Conv2d and not copied[0]._forward_pre_hooks
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    torch.testing.assert_close(model(image().float()), out)
    assert type(model[0]) is nn.Conv2d and not model[0]._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_children_are_shared() -> None:
    model = Net(script=torch.jit.script(nn.Sequential(nn.ReLU())))
    copied = shared_copy(model)
    assert copied.script is model.script and copied.conv is not model.conv
    with pytest.raises(InvalidModelError, match="TorchScript"):
        shared_copy(model.script)


@pytest.mark.parametrize("change", ["recompile", "edit"])
def test_a_graph_module_has_its_own_forward(change: str) -> None:
    model = fx.symbolic_trace(nn.Sequential(Net(), nn.ReLU())).double()
    expected, copied = numbers(model, image()), checked_copy(model)
    assert copied.graph.owning_module is copied and model.graph.owning_module is model
    torch.testing.assert_close(numbers(copy.deepcopy(copied), image()), expected, rtol=0, atol=0)
    if change == "edit":
        relu = next(node for node in copied.graph.nodes if node.target == "1")
        relu.replace_all_uses_with(relu.args[0])
        copied.graph.erase_node(relu)
        copied.delete_all_unused_submodules()
    copied.recompile()
    torch.testing.assert_close(numbers(model, image()), expected, rtol=0, atol=0)
    assert (numbers(copied, image())[0].min() < 0) == (change == "edit")
    model.recompile()
    torch.testing.assert_close(numbers(model, image()), expected, rtol=0, atol=0)


def test_a_parametrization_taken_off_the_copy() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))).double()
    expected, copied = numbers(model, image()), checked_copy(model)
    parametrize.remove_parametrizations(copied[0], "weight")
    assert type(copied[0]) is nn.Conv2d
    torch.testing.assert_close(numbers(model, image()), expected, rtol=0, atol=0)


def test_compiled_calls_are_left_behind() -> None:
    model = Net()
    model.compile(backend="eager")
    assert shared_copy(model)._compiled_call_impl is None and model._compiled_call_impl is not None


def test_a_compiled_child() -> None:
    model = nn.Sequential(torch.compile(Net(), backend="eager")).double()
    copied = checked_copy(model)
    seen: list[nn.Module] = []
    copied[0]._orig_mod.norm.register_forward_hook(lambda module, *_: seen.append(module))
    assert_same_numbers(model, copied, image())
    assert len(seen) == 1 and seen[0] is copied[0]._orig_mod.norm


# --- what is shared -------------------------------------------------------------------------------


def test_what_holds_no_module_is_shared() -> None:
    unregistered = nn.Linear(2, 2)
    lock, generator = threading.Lock(), (number for number in range(3))
    shared = {
        "config": types.SimpleNamespace(depth=3),
        "numbers": [1, 2],
        "rng": random.Random(0),
        "torch_rng": torch.Generator(),
        "teacher": [unregistered],
        "weight": nn.Parameter(torch.ones(2)).detach(),
        "activation": torch.ones(2, requires_grad=True) * 2,
        "activations": [torch.ones(2, requires_grad=True) * 2],
        "lock": lock,
        "generator": generator,
        "function": lambda x: x + len(shared_numbers),
        "reference": weakref.ref(unregistered),
        "loose": [nn.Parameter(torch.ones(1))],
    }
    model = Net(**shared)
    model.conv.config = model.config
    copied = checked_copy(model)
    assert all(getattr(copied, name) is value for name, value in shared.items())
    assert copied.conv.config is model.config
    copied.train(False)
    assert unregistered.training


shared_numbers = [1]


def test_a_loose_module_that_leads_to_a_registered_one_is_copied() -> None:
    model = Net()
    model.owner = [nn.Sequential(model.conv, nn.ReLU())]
    copied = checked_copy(model)
    assert copied.owner[0][0] is copied.conv and model.owner[0][0] is model.conv


# --- classes of modules ---------------------------------------------------------------------------


class Counting(Net):
    """A class that counts, refuses and computes wherever it can."""

    __slots__ = ("extra",)
    made = 0

    def __new__(cls, *args: Any) -> Counting:
        Counting.made += 1
        return super().__new__(cls)

    def __init__(self, required: int) -> None:
        super().__init__()
        self.extra = (self.norm, required)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        object.__setattr__(self, "last_set", name)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("norm") if name == "alias" else super().__getattr__(name)

    def __getstate__(self) -> dict:
        raise TypeError("no")

    def __deepcopy__(self, memo: dict) -> Counting:
        raise TypeError("cannot pickle a lock")


def test_a_class_with_its_own_ways() -> None:
    model = nn.Sequential(Counting(3)).double()
    made, copied = Counting.made, checked_copy(model)
    assert Counting.made == made and type(copied[0]) is Counting
    assert copied[0].extra == (copied[0].norm, 3) and copied[0].alias is copied[0].norm
    assert model[0].extra[0] is model[0].norm
    assert_same_numbers(model, copied, image())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda m: (layer for layer in [m]), "generator"),
        (lambda m: iter([m]), "list_iterator"),
        (lambda m: map(len, [m]), "map"),
    ],
)
def test_what_cannot_be_pointed_elsewhere(make: Any, what: str) -> None:
    model = nn.Sequential(Net())
    started = make(model[0].norm)
    model[0].holder = [started]
    before = snapshot(model)
    with pytest.raises(InvalidModelError, match=f"Sequential cannot be copied .*module `0` has .* a {what}, which"):
        shared_copy(model)
    assert snapshot(model) == before
