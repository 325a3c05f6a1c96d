"""`changes=("sparse_switchable",)`, and what `optimize` makes of layers that have chosen."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from captured import dynamo_graph, targets, with_changes
from switchable import choose
from torch import nn
from training import ConvNet, assert_equal, train

import normpass
from normpass.measure import kept_bytes
from normpass.nn import NORM_NODES, RadiusSchedule, SparseSwitchableNorm2d, freeze_decided, parameter_groups
from normpass.nn.switchable import (
    NORMS,
    SWITCHABLE_NORMS,
    decide,
    instance_norm,
    layer_norm,
    mixed_norm,
    switchable_layers,
    switchable_norm,
)
from normpass.passes import SparseSwitchable

PAIRS = list(itertools.product(NORMS, repeat=2))


def image(*shape, seed=0):
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def switchable_net(seed=0):
    """A plain ConvNet with switchable layers placed by hand."""
    torch.manual_seed(seed)
    model = ConvNet().double()
    model.stem[1], model.bn = SparseSwitchableNorm2d(4).double(), SparseSwitchableNorm2d(4).double()
    return model


def decided(model):
    """A copy whose layers have read their logits, as `optimize` does it."""
    model = copy.deepcopy(model)
    decide(list(switchable_layers(model).values()))
    return model


# --- the change -------------------------------------------------------------------------------------


def test_every_batch_norm_is_replaced_and_shares_its_tensors():
    model = ConvNet().double()
    before = copy.deepcopy(model.state_dict())
    optimized = normpass.optimize(model, changes=("sparse_switchable",))
    assert [type(m) for m in (optimized.stem[1], optimized.bn)] == [SparseSwitchableNorm2d] * 2
    assert type(model.bn) is nn.BatchNorm2d and list(model.state_dict()) == list(before)
    new = optimized.state_dict(keep_vars=True)
    for key, value in model.state_dict(keep_vars=True).items():
        assert new[key] is value
    assert sorted(set(new) - set(before)) == sorted(
        f"{path}.{name}" for path in ("stem.1", "bn") for name in ("mean_logits", "var_logits", "radius")
    )


def test_it_computes_what_the_layers_by_hand_compute():
    by_hand = switchable_net()
    plain = ConvNet().double()
    plain.load_state_dict({k: v for k, v in by_hand.state_dict().items() if k in plain.state_dict()})
    optimized = normpass.optimize(plain, changes=("sparse_switchable",))
    for model in (by_hand, optimized):
        for layer in switchable_layers(model).values():
            layer.radius.fill_(0.3)
    expected, found = train(by_hand, (image(),)), train(optimized, (image(),))
    assert_equal({k: expected[k] for k in found}, found)


def test_restore_gives_the_batch_norms_back():
    model = ConvNet().double()
    optimized = normpass.optimize(model, changes=("sparse_switchable",))
    optimized(image())
    plain = normpass.restore(optimized)
    assert type(plain.bn) is nn.BatchNorm2d and list(plain.state_dict()) == list(model.state_dict())
    assert plain.bn.weight is optimized.bn.weight and plain.bn.running_var is optimized.bn.running_var
    assert not plain.bn.running_mean.eq(0).all()
    kept = normpass.restore(optimized, keep_changes=True)
    assert type(kept.bn) is SparseSwitchableNorm2d and kept.bn.mean_logits is optimized.bn.mean_logits


def test_norms_with_hooks_and_other_classes_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(1, 4))
    model[3].register_forward_hook(lambda *_: None)
    optimized = normpass.optimize(model, changes=("sparse_switchable",))
    assert not switchable_layers(optimized)


def test_a_norm_in_two_places_stays_one():
    model = ConvNet()
    model.stem[1] = model.bn
    optimized = normpass.optimize(model, changes=("sparse_switchable",))
    assert optimized.stem[1] is optimized.bn and isinstance(optimized.bn, SWITCHABLE_NORMS)
    plain = normpass.restore(optimized)
    assert type(plain.bn) is type(plain.stem[1]) is nn.BatchNorm2d


def test_copies_and_pickles_keep_what_was_learned(tmp_path):
    optimized = normpass.optimize(ConvNet().double(), changes=("sparse_switchable",))
    choose(optimized.bn, "layer", "instance")
    freeze_decided(optimized)
    expected = optimized(image())
    torch.save(optimized, tmp_path / "model.pt")
    for other in (copy.deepcopy(optimized), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert other.bn.chosen == ("layer", "instance")
        assert torch.equal(other(image()), expected)
        assert type(normpass.restore(other).bn) is nn.BatchNorm2d


def test_training_through_the_whole_schedule():
    torch.manual_seed(0)
    optimized = normpass.optimize(ConvNet(), changes=("sparse_switchable",))
    optimizer = torch.optim.SGD(parameter_groups(optimized, 0.05, weight_decay=1e-4), momentum=0.9)
    schedule = RadiusSchedule(optimized, 12)
    for step in range(14):
        optimizer.zero_grad()
        F.cross_entropy(optimized(image(seed=step).float()), torch.arange(4)).backward()
        optimizer.step()
        schedule.step()
    layers = switchable_layers(optimized).values()
    assert all(layer.chosen is not None for layer in layers)
    assert all(p.isfinite().all() for p in optimized.parameters())


def test_the_changed_model_has_a_node_for_every_layer():
    model = ConvNet().double()
    changed, run = with_changes(model, SparseSwitchable())
    assert targets(dynamo_graph(changed, image())).count(switchable_norm) == 2
    assert torch.equal(run(image()), changed(image()))


@pytest.mark.filterwarnings("ignore")
def test_its_graphs_compile():
    changed, run = with_changes(ConvNet().double(), SparseSwitchable(), compiler="aot_eager")
    eager = copy.deepcopy(changed)
    for step in range(2):
        for m in (eager, changed):
            m.zero_grad()
            for layer in switchable_layers(m).values():
                layer.radius.fill_(0.3 + 0.2 * step)  # a buffer: nothing is compiled again
        expected, found = eager(image(seed=step)), run(image(seed=step))
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        for a, b in zip(eager.parameters(), changed.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-9)
    torch.compiler.reset()


# --- specialization ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", list(zip(PAIRS, PAIRS[::-1], strict=True)))
def test_a_decided_model_trains_alike(first, second):
    model = switchable_net()
    choose(model.stem[1], *first)
    choose(model.bn, *second)
    optimized = normpass.optimize(copy.deepcopy(model))
    assert_equal(without_logits(train(model, (image(),))), without_logits(train(optimized, (image(),))))
    for path, (mean_of, var_of) in (("stem.1", first), ("bn", second)):
        moved = not optimized.get_submodule(path).running_mean.eq(0).all()
        assert moved == ("batch" in (mean_of, var_of))
        if moved:
            assert_buffers_alike(model.get_submodule(path), optimized.get_submodule(path))


def assert_buffers_alike(a, b):
    for one, two in zip(a.buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-11)


def without_logits(numbers):
    """Without what differs on purpose. A decided layer's logits have no gradient, where they had one of zero; a
    layer without batch norm no longer moves its running averages."""
    names = [n for n in numbers if not ("gradient" in n and "logits" in n) and "running" not in n]
    return {name: numbers[name] for name in names if "num_batches" not in name}


def test_batch_norm_pairs_go_through_the_ordinary_rewrites():
    model = switchable_net()
    for layer in (model.stem[1], model.bn):
        choose(layer, "batch", "batch")
    plain = ConvNet().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    before = [p.requires_grad for p in model.parameters()]
    graph = targets(dynamo_graph(decided(model), image()))
    assert graph.count(F.batch_norm) == 2 and not set(graph) & set(NORM_NODES)
    optimized = normpass.optimize(model)
    found, ordinary = ([row.rewrite for row in normpass.explain(m, image()).rows] for m in (model, plain))
    assert found == ordinary and None not in found
    assert model.bn.chosen is None and [p.requires_grad for p in model.parameters()] == before  # it is untouched
    expected = train(normpass.optimize(plain), (image(),))
    assert_equal(expected, {k: v for k, v in train(optimized, (image(),)).items() if k in expected})
    small, wide = (normpass.optimize(m.float()) for m in (copy.deepcopy(plain), copy.deepcopy(model)))
    x = image(4, 3, 32, 32).float()
    assert kept_bytes(wide, x) == kept_bytes(small, x)


PAIRS_OF_OTHERS = [
    ("batch", "instance"),
    *(pytest.param((kind, kind), marks=pytest.mark.nets) for kind in ("instance", "layer")),
]


@pytest.mark.parametrize("pair", PAIRS_OF_OTHERS)
def test_other_pairs_become_nodes_of_their_own_and_keep_their_input_alone(pair):
    model = switchable_net().float()
    for layer in (model.stem[1], model.bn):
        choose(layer, *pair)
    node = {("instance", "instance"): instance_norm, ("layer", "layer"): layer_norm}.get(pair, mixed_norm)
    assert targets(dynamo_graph(decided(model), image().float())).count(node) == 2
    optimized = normpass.optimize(model)
    reasons = {row.path: row.reason for row in normpass.explain(model, image().float()).rows}
    assert reasons["bn"] == f"rebuilt, not fused: {NORM_NODES[node]}"
    x = image(4, 3, 32, 32).float()
    plain = ConvNet()
    assert kept_bytes(optimized, x) < 0.75 * kept_bytes(plain, x)
    assert kept_bytes(optimized, x) < 1.05 * kept_bytes(normpass.optimize(plain), x)


def test_undecided_layers_keep_their_input_alone():
    optimized = normpass.optimize(ConvNet(), changes=("sparse_switchable",))
    x = image(4, 3, 32, 32).float()
    assert kept_bytes(optimized, x) < 1.1 * kept_bytes(normpass.optimize(ConvNet()), x)


def test_a_hook_on_a_decided_layer_still_runs():
    model = switchable_net()
    choose(model.bn, "layer", "layer")
    optimized = normpass.optimize(model)
    expected = optimized(image())
    seen = []
    optimized.bn.register_forward_hook(lambda module, args, result: seen.append(module.chosen))
    torch.testing.assert_close(optimized(image()), expected, rtol=0, atol=1e-12)
    assert seen == [("layer", "layer")]


def test_a_partly_decided_model():
    model = switchable_net()
    choose(model.bn, "batch", "batch")
    with torch.no_grad():
        model.stem[1].radius.fill_(0.2)
    optimized = normpass.optimize(copy.deepcopy(model))
    graph = targets(dynamo_graph(decided(model), image()))
    assert graph.count(F.batch_norm) == 1 and graph.count(switchable_norm) == 1
    reasons = {row.path: row.reason for row in normpass.explain(model, image()).rows}
    assert "it has not chosen yet" in reasons["stem.1"]
    assert_equal(without_logits(train(model, (image(),))), without_logits(train(optimized, (image(),))))


def test_loading_another_choice_runs_that_one():
    """A layer's choice is guarded: with another one it is captured again."""
    model, other = switchable_net(), switchable_net()
    choose(model.bn, "batch", "batch")
    choose(other.bn, "layer", "instance")
    optimized = normpass.optimize(model)
    optimized.load_state_dict(other.state_dict())
    assert optimized.bn.chosen == ("layer", "instance")
    torch.testing.assert_close(optimized(image()), other(image()), rtol=0, atol=1e-12)


def test_specializing_what_was_changed_by_name():
    optimized = normpass.optimize(ConvNet().double(), changes=("sparse_switchable",))
    for layer in switchable_layers(optimized).values():
        choose(layer, "batch", "batch")
    freeze_decided(optimized)
    restored = normpass.restore(optimized, keep_changes=True)
    assert targets(dynamo_graph(restored, image())).count(F.batch_norm) == 2
    again = normpass.optimize(restored)
    torch.testing.assert_close(again(image()), optimized(image()), rtol=0, atol=1e-12)
