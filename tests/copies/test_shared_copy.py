"""The copy shares what it may, leads to its own modules everywhere, computes and trains as the model, which stays."""

from __future__ import annotations

import copy
import functools
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from normpass.copies.shared_copy import shared_copy
from normpass.errors import InvalidModelError

OLD_NORMS = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


class Net(nn.Module):
    """A convolution and a norm; tests put more on it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(0)).double()


def snapshot(model: nn.Module) -> list[Any]:
    """All that a copy might disturb, by identity."""
    return [
        (type(m), vars(type(m)).get("forward"), m.training, [(n, id(v), contents(v)) for n, v in vars(m).items()])
        for m in model.modules()
    ]


def contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [(id(key), id(item)) for key, item in dict.items(value)]
    return [id(item) for item in list.__iter__(value)] if isinstance(value, list) else None


def checked_copy(model: nn.Module) -> Any:
    """The copy, with what holds for every model."""
    before = snapshot(model)
    copied = shared_copy(model)
    assert snapshot(model) == before
    pairs = list(zip(model.named_modules(), copied.named_modules(), strict=True))
    for (name, old), (same_name, new) in pairs:
        assert name == same_name and new is not old and old.training == new.training
        assert type(new).__name__ == type(old).__name__ and isinstance(new, type(old).__mro__[1])
        assert list(vars(new)) == [key for key in vars(old) if key != "_compiled_call_impl"]
        for key in vars(nn.Module()):
            if isinstance(vars(old).get(key), (dict, set)):
                assert vars(new)[key] is not vars(old)[key] and type(vars(new)[key]) is type(vars(old)[key])
                assert len(vars(new)[key]) == len(vars(old)[key])
    expected, found = model.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    olds, news = [*model.parameters(), *model.buffers()], [*copied.parameters(), *copied.buffers()]
    assert all(a is b for a, b in zip(olds, news, strict=True))
    return copied


def numbers(model: nn.Module, *inputs: Any) -> list[Any]:
    """One step of a plain model: results, gradients; buffers as they were before it are put back."""
    buffers = [b.clone() for b in model.buffers()]
    model.zero_grad()
    torch.manual_seed(0)
    outputs = torch.utils._pytree.tree_leaves(model(*inputs))
    sum(t.square().sum() for t in outputs if t.requires_grad).backward()
    after = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return [*outputs, *(p.grad for p in model.parameters()), *after]


def assert_same_numbers(model: nn.Module, copied: nn.Module, *inputs: Any) -> None:
    torch.testing.assert_close(numbers(copied, *inputs), numbers(model, *inputs), rtol=0, atol=0)


def assert_independent(model: nn.Module, copied: nn.Module) -> None:
    """Flags, hooks, children and buffers of the copy are its own."""
    before = snapshot(model)
    copied.train(not model.training)
    for module in list(copied.modules()):
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
        module.register_buffer("another", torch.zeros(1), persistent=False)
        module.add_module("child", nn.ReLU())
    assert snapshot(model) == before


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


# --- what leads to a module -----------------------------------------------------------------------

Two = namedtuple("Two", "module number")


@dataclass(frozen=True)
class Frozen:
    module: nn.Module
    number: int = 1


class Slotted:
    __slots__ = ("module", "unset", "__weakref__")

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Strict:
    """Sets, reads, copies and compares in its own way."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "module", module)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __deepcopy__(self, memo: dict) -> Strict:
        raise TypeError("no")

    def __hash__(self) -> int:
        return hash(self.module)

    def __eq__(self, other: object) -> bool:
        return type(other) is Strict and other.module is self.module


class OwnList(list):
    def append(self, item: Any) -> None:
        raise TypeError("no")

    extend = __iter__ = append  # type: ignore[assignment]


class OwnDict(OrderedDict):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("no")


def own_dict(module: nn.Module) -> OwnDict:
    new = OwnDict()
    OrderedDict.__setitem__(new, "a", module)
    return new


HOLDERS = {
    "list": (lambda m: [m], lambda h: h[0]),
    "tuple": (lambda m: (1, (m,)), lambda h: h[1][0]),
    "namedtuple": (lambda m: Two(m, 1), lambda h: h.module),
    "dict": (lambda m: {"a": {"b": m}}, lambda h: h["a"]["b"]),
    "key": (lambda m: {m: 1}, lambda h: next(k for k in h if h[k] == 1)),
    "ordered": (lambda m: OrderedDict(a=m), lambda h: h["a"]),
    "defaultdict": (lambda m: defaultdict(list, a=[m]), lambda h: h["a"][0]),
    "counter": (lambda m: Counter({m: 2}), lambda h: next(k for k in h if h[k] == 2)),
    "set": (lambda m: {m}, lambda h: next(m for m in h if m in h)),
    "frozenset": (lambda m: frozenset({m}), lambda h: next(m for m in h if m in h)),
    "deque": (lambda m: deque([m], 3), lambda h: h[0] if h.maxlen == 3 else None),
    "frozen_dataclass": (Frozen, lambda h: h.module),
    "slots": (Slotted, lambda h: h.module),
    "strict": (Strict, lambda h: h.module),
    "strict_key": (lambda m: {Strict(m): 1}, lambda h: next(k for k in h if h[k] == 1).module),
    "own_list": (lambda m: OwnList([m]), lambda h: h[0]),
    "own_dict": (own_dict, lambda h: h["a"]),
    "namespace": (lambda m: types.SimpleNamespace(m=m), lambda h: h.m),
    "partial": (lambda m: functools.partial(isinstance, m), lambda h: h.args[0]),
    "partial_keyword": (lambda m: functools.partial(dict, m=m), lambda h: h()["m"]),
    "method": (lambda m: m.forward, lambda h: h.__self__),
    "method_of_c": (lambda m: [m].copy, lambda h: h()[0]),
    "closure": (lambda m: lambda: m, lambda h: h()),
    "default": (lambda m: types.FunctionType((lambda m: m).__code__, {}, "f", (m,)), lambda h: h()),
    "keyword_default": (lambda m: (lambda f: f)(lambda *, given=m: given), lambda h: h()),
    "function_attribute": (lambda m: with_attribute(m), lambda h: h.module),
    "cached": (lambda m: functools.lru_cache(lambda: m), lambda h: h()),
    "weakref": (weakref.ref, lambda h: h()),
    "weak_method": (lambda m: weakref.WeakMethod(m.forward), lambda h: h().__self__),
    "proxy": (lambda m: {"p": weakref.proxy(m)}, lambda h: h["p"].forward.__self__),
    "weak_keys": (lambda m: weakref.WeakKeyDictionary({m: 1}), lambda h: next(k for k in h if h[k] == 1)),
    "weak_values": (lambda m: weakref.WeakValueDictionary(a=m), lambda h: h["a"]),
    "weak_set": (lambda m: weakref.WeakSet([m]), lambda h: next(m for m in h if m in h)),
}


def with_attribute(module: nn.Module) -> Any:
    def function() -> None:
        """What it says."""

    function.module = module  # type: ignore[attr-defined]
    return function


@pytest.mark.parametrize("name", HOLDERS)
def test_what_leads_to_a_module_leads_to_its_copy(name: str) -> None:
    make, read = HOLDERS[name]
    model = Net()
    model.holder = make(model.norm)
    copied = checked_copy(model)
    assert type(copied.holder) is type(model.holder) and copied.holder is not model.holder
    assert read(copied.holder) is copied.norm
    assert read(model.holder) is model.norm
    assert not isinstance(model.holder, types.FunctionType) or model.holder.__doc__ == copied.holder.__doc__


def test_cycles_and_one_object_twice() -> None:
    model = Net()
    model.__dict__["parent"] = model
    model.ring = [model.norm]
    model.ring += [model.ring, (model.ring,)]
    model.conv.same = model.ring
    first, second = shared_closures(model)
    model.first, model.second = first, second
    copied = checked_copy(model)
    assert copied.parent is copied and copied.ring[1] is copied.ring is copied.conv.same is copied.ring[2][0]
    assert copied.ring[0] is copied.norm
    copied.first()
    assert copied.second() == (copied, 1) and model.second() == (model, 1)


def shared_closures(module: nn.Module) -> tuple[Any, Any]:
    count = 0

    def add() -> nn.Module:
        nonlocal count
        count += 1
        return module

    return add, lambda: (module, count)


def test_hooks_and_their_handles() -> None:
    model, calls = Net().double(), []
    model.watch = types.MethodType(lambda self, module, *_: calls.append((self, module)), model)
    model.handle = model.norm.register_forward_hook(model.watch)
    model.other = model.conv.register_forward_pre_hook(lambda module, *_: calls.append((model, module)))
    copied = checked_copy(model)
    copied(image())
    assert calls == [(copied, copied.conv), (copied, copied.norm)]
    copied.handle.remove()
    copied.other.remove()
    assert not copied.norm._forward_hooks and not copied.conv._forward_pre_hooks
    assert model.norm._forward_hooks and model.conv._forward_pre_hooks


def test_hooks_of_state_dicts() -> None:
    model, seen = Net(), []
    model.note = seen
    model.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_state_dict_post_hook(lambda module, *_: seen.append(module))
    copied = checked_copy(model)
    seen.clear()
    copied.load_state_dict(copied.state_dict())
    assert [module is copied for module in seen] == [True, True]


def test_forward_wrapped_on_the_instance() -> None:
    model = Net().double()
    original = model.forward
    model.forward = lambda *arguments: original(*arguments)
    copied = checked_copy(model)
    assert_same_numbers(model, copied, image())
    copied.norm = nn.Identity()
    assert not torch.equal(model(image()), copied(image()))


def test_a_trainer_that_knows_the_model() -> None:
    trainer = types.SimpleNamespace(log=[], settings=object())
    model = Net(trainer=trainer)
    trainer.model = model
    copied = checked_copy(model)
    assert copied.trainer is not trainer and copied.trainer.model is copied
    assert copied.trainer.log is trainer.log and copied.trainer.settings is trainer.settings


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
