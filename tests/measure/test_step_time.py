"""Times, their quartiles and ratios, and how bytes are written; nothing asserts how long anything takes."""

import pytest
from measured import IN, H, Lambda, rows
from torch import nn

from normpass import measure


def test_step_time_takes_turns():
    log = []

    def named(name, times):
        def forward(module, x):
            log.append(name)
            return sum(module.layer(x) for _ in range(times))

        return Lambda(forward)

    times = measure.step_time({"once": named("once", 1), "twice": named("twice", 2)}, rows(), rounds=3, warmup=1)
    assert log == ["twice", "once"] + ["once", "twice"] + ["twice", "once"] + ["once", "twice"]
    for entry in times.values():
        assert len(entry.times) == 3
        assert 0 < entry.low <= entry.median <= entry.high
    by_once = measure.ratios(times, "once")
    assert by_once["once"] == measure.Ratio(1.0, 1.0, 1.0)
    assert by_once["twice"].low <= by_once["twice"].median <= by_once["twice"].high


def test_one_round_is_its_own_quartile():
    entry = measure.step_time({"a": nn.Linear(IN, H)}, rows(), rounds=1)["a"]
    assert entry.times == (entry.median,) == (entry.low,) == (entry.high,)


def test_ratios_are_taken_round_by_round():
    base = measure.StepTime(2.0, 1.5, 3.0, (1.0, 2.0, 4.0))
    other = measure.StepTime(4.0, 3.0, 6.0, (2.0, 6.0, 16.0))
    assert measure.ratios({"a": base, "b": other}, "a")["b"] == measure.Ratio(3.0, 2.5, 3.5)


def test_ratios_need_their_base():
    with pytest.raises(ValueError, match="no entry `c`.*a, b"):
        entry = measure.StepTime(1.0, 1.0, 1.0, (1.0,))
        measure.ratios({"a": entry, "b": entry}, "c")


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (170827264, "162.9 MiB"),
        (-3 * 2**29, "-1.5 GiB"),
        (5 * 2**50, "5120.0 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert measure.format_bytes(count) == text


@pytest.mark.parametrize("options", [{"rounds": 0}, {"warmup": -1}])
def test_step_time_refuses_its_options(options):
    with pytest.raises(ValueError, match="`rounds` >= 1"):
        measure.step_time({"a": nn.Linear(IN, H)}, rows(), **options)
    with pytest.raises(ValueError, match="needs models"):
        measure.step_time({}, rows())
