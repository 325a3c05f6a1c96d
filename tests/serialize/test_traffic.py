"""The traffic model: the formula on units made by hand, and the figures of three ResNets."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50, resnet101, resnet152

from normpass.errors import InvalidInputError, InvalidModelError
from normpass.serialize.traffic import make_group, serialize, traffic_report, units_of_model
from normpass.serialize.units import Unit

MIB = 2**20


def unit(name="u", *, input_bytes=1000, output_bytes=2000, footprint=3000, saved=500, weights=100, branching=0):
    return Unit(
        name, name, (), None, input_bytes, output_bytes, footprint, footprint // 2, saved, branching, 9000, weights
    )  # fmt: skip


def group_norm(channels):
    return nn.GroupNorm(32, channels)


def resnet(build):
    with torch.device("meta"):
        return build(norm_layer=group_norm)


def test_the_formula_of_a_group():
    group = make_group([unit("a"), unit("b", footprint=4000)], 10, 12000)
    assert (group.sub_batch, group.iterations) == (3, 4)
    assert group.traffic == 2 * 100 * 15 + 10 * 2 * (500 + 500) + 10 * 2 * (1000 + 2000)
    assert group.name == "a to b"


def test_without_held_branches_the_footprint_is_smaller_and_branching_is_paid():
    units = [unit(branching=70)]
    held, apart = (make_group(units, 10, 12000, reuse) for reuse in (True, False))
    assert (held.sub_batch, apart.sub_batch) == (4, 8)
    assert apart.traffic == 100 * 7 + 10 * 2 * 500 + 10 * 2 * 3000 + 10 * 70


@pytest.mark.parametrize("buffer, expected", [(1, 1), (2999, 1), (6000, 2), (10**9, 10)])
def test_a_sub_batch_is_one_sample_at_least_and_the_batch_at_most(buffer, expected):
    assert make_group([unit()], 10, buffer).sub_batch == expected


@pytest.mark.parametrize("build", [resnet50, resnet101, resnet152], ids=lambda f: f.__name__)
def test_resnets_move_three_quarters_less(build):
    """GroupNorm, fp16, 32 samples, 10 MiB: −75 % ± 2 points where branches are held, about −60 % where not."""
    units = units_of_model(resnet(build), (32, 3, 224, 224), torch.float16)
    for method in ("optimal", "greedy"):
        assert serialize(units, 32, 10 * MIB, method=method).change == pytest.approx(-0.75, abs=0.02)
        assert serialize(units, 32, 10 * MIB, method=method, reuse=False).change == pytest.approx(-0.60, abs=0.02)
    best, merged = (serialize(units, 32, 10 * MIB, method=m).traffic for m in ("optimal", "greedy"))
    assert best <= merged


def test_the_groups_of_resnet50():
    units = units_of_model(resnet(resnet50), (32, 3, 224, 224), torch.float16)
    for method in ("optimal", "greedy"):
        groups = serialize(units, 32, 10 * MIB, method=method).groups
        assert [(g.name, g.sub_batch) for g in groups] == [
            ("conv1 to layer2.0", 2),
            ("layer2.1 to layer3.0", 5),
            ("layer3.1 to layer4.0", 11),
            ("layer4.1 to fc", 23),
        ]


def test_the_report_prints_both_ways():
    report = traffic_report(resnet(resnet50), (32, 3, 224, 224))
    assert report.count("optimal") == report.count("greedy") == 2
    assert report.count("(-75.2 %)") == 2 and report.count("(-60.4 %)") == 2
    assert "layer2.1 to layer3.0: 7 x up to 5 samples" in report


@pytest.mark.parametrize("norm, training", [(nn.BatchNorm2d, True), (nn.BatchNorm2d, False), (nn.InstanceNorm2d, True)])
def test_the_report_says_what_it_supposes(norm, training):
    report = traffic_report(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).train(training), (2, 3, 8, 8))
    assert ("if every norm looked at one sample" in report) is (norm is nn.BatchNorm2d and training)


def test_errors_say_what_is_wrong():
    units = [unit()]
    with pytest.raises(InvalidInputError, match="`method`"):
        serialize(units, 4, 100, method="best")
    with pytest.raises(InvalidInputError, match="at least 1"):
        serialize(units, 0, 100)
    with pytest.raises(InvalidInputError, match="does not run on an input of shape"):
        units_of_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (2, 5, 8, 8))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InvalidModelError, match="cannot be captured"):
        units_of_model(Branching(), (2, 5))
    with pytest.raises(InvalidModelError, match="takes 2 tensors"):
        units_of_model(nn.Bilinear(2, 2, 2), (2, 2))

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    with pytest.raises(InvalidModelError, match="returns several tensors"):
        units_of_model(Apart(), (2, 3))


def test_the_model_stays_as_it_is():
    """Its running statistics and counters do not move, and torch.compile captures it as if nothing had been."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(units_of_model(model, (2, 3, 8, 8))) == 1
    assert all(torch.equal(before[key], value) and not value.is_meta for key, value in model.state_dict().items())
    for _ in range(20):  # more often than torch.compile captures one function
        assert len(units_of_model(model, (2, 3, 8, 8))) == 1
