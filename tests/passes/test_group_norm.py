"""`changes=("group_norm",)`: what replaces what, that it trains as group norms placed by hand, and the way back."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from training import ConvNet, assert_equal, image, train

import normpass
from normpass.passes import GroupNorm
from normpass.passes.changes.group_norm import group_norm_from


def by_hand(num_groups):
    model = ConvNet(8)
    model.stem[1], model.bn = nn.GroupNorm(num_groups, 8), nn.GroupNorm(num_groups, 8)
    return model


def changed(model, num_groups=4):
    return normpass.optimize(model, changes=(GroupNorm(num_groups),))


def test_every_batch_norm_is_replaced_and_shares_its_tensors():
    model = ConvNet(8)
    optimized = normpass.optimize(model, changes=("group_norm",))
    assert [type(m) for m in (optimized.stem[1], optimized.bn)] == [nn.GroupNorm] * 2
    assert optimized.bn.weight is model.bn.weight and optimized.stem[1].bias is model.stem[1].bias
    assert type(model.bn) is nn.BatchNorm2d  # the given one is untouched
    lost = set(model.state_dict()) - set(optimized.state_dict())
    assert lost == {
        f"{path}.{name}" for path in ("stem.1", "bn") for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert not set(optimized.state_dict()) - set(model.state_dict())


def test_it_trains_as_the_layers_by_hand():
    torch.manual_seed(0)
    plain = by_hand(4).double()
    model = ConvNet(8).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert_equal(train(plain, (image(),)), train(changed(model), (image(),)))


@pytest.mark.parametrize(
    "channels, num_groups, expected",
    [(64, 32, 32), (48, 32, 24), (30, 4, 3), (7, 32, 1), (32, 32, 16), (2, 32, 1), (1, 32, 1), (6, 6, 3), (8, 1, 1)],
)
def test_the_largest_divisor_with_two_channels_a_group(channels, num_groups, expected):
    assert group_norm_from(nn.BatchNorm2d(channels), num_groups).num_groups == expected


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_every_dimension_and_the_options_go_over(kind):
    norm = kind(8, eps=1e-2, affine=False, dtype=torch.float64).eval()
    layer = group_norm_from(norm, 4)
    assert (layer.eps, layer.affine, layer.weight, layer.training) == (1e-2, False, None, False)
    x = image(2, 8, *[3] * {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind])
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, 4, eps=1e-2))
    with_weight = group_norm_from(kind(8, dtype=torch.float64), 4)
    assert with_weight.weight.dtype == torch.float64


def test_a_norm_of_single_features_does_not_vanish():
    """(N, C) input: a group of one channel would be one value, and its norm nothing but the bias."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    optimized = normpass.optimize(model, changes=("group_norm",))
    assert optimized(torch.randn(3, 4)).std() > 0.1


def test_restore_gives_the_batch_norms_back():
    model = ConvNet(8).double()
    model(image())
    optimized = changed(model)
    optimizer = torch.optim.SGD(optimized.parameters(), lr=0.1)
    optimized(image()).sum().backward()
    optimizer.step()
    plain = normpass.restore(optimized)
    assert type(plain.bn) is nn.BatchNorm2d and list(plain.state_dict()) == list(model.state_dict())
    assert plain.bn.weight is optimized.bn.weight and plain.bn.running_var is model.bn.running_var
    torch.testing.assert_close(plain(image()), model(image()))
    kept = normpass.restore(optimized, keep_changes=True)
    assert type(kept.bn) is nn.GroupNorm and kept.bn.weight is optimized.bn.weight


def test_a_replaced_weight_and_the_mode_come_back():
    optimized = changed(ConvNet(8)).eval()
    optimized.bn.weight = nn.Parameter(torch.full((8,), 3.0))
    plain = normpass.restore(optimized)
    assert plain.bn.weight is optimized.bn.weight and not plain.bn.training


def test_norms_with_hooks_and_other_classes_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(1, 4))
    model[3].register_forward_hook(lambda *_: None)
    optimized = changed(model)
    assert [type(m) for m in optimized[1:]] == [Own, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm]


def test_a_norm_in_two_places_stays_one():
    model = ConvNet(8)
    model.stem[1] = model.bn
    optimized = changed(model)
    assert optimized.stem[1] is optimized.bn and type(optimized.bn) is nn.GroupNorm


def test_copies_and_pickles_keep_what_was_learned(tmp_path):
    optimized = changed(ConvNet(8).double())
    with torch.no_grad():
        optimized.bn.weight.fill_(2.5)
    expected = optimized(image())
    torch.save(optimized, tmp_path / "model.pt")
    for other in (copy.deepcopy(optimized), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(other.bn) is nn.GroupNorm and torch.equal(other(image()), expected)
        plain = normpass.restore(other)
        assert type(plain.bn) is nn.BatchNorm2d and plain.bn.weight is other.bn.weight
        assert torch.equal(plain.bn.weight, optimized.bn.weight)


def test_a_checkpoint_goes_round():
    one, other = changed(ConvNet(8).double()), changed(ConvNet(8).double())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(image()), other(image()))


def test_a_whole_network():
    with torch.device("meta"):
        model = resnet50()
    optimized = normpass.optimize(model, changes=("group_norm",))
    norms = [m for m in optimized.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 53 and all(m.num_groups == 32 for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())


@pytest.mark.parametrize("num_groups", [0, -1, 2.0, True, "32"])
def test_options_out_of_range(num_groups):
    with pytest.raises(ValueError, match="`num_groups` must be an integer of at least 1"):
        GroupNorm(num_groups)
