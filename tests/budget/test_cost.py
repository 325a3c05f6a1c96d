"""What a step is estimated to take: the rates of a GPU from its clocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from normpass.budget.cost import RATES, cuda_rates, rates_of


def gpu(major: int, minor: int, count: int, clock: int, memory_clock: int, bus: int) -> SimpleNamespace:
    names = ("major", "minor", "multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width")
    return SimpleNamespace(**dict(zip(names, (major, minor, count, clock, memory_clock, bus), strict=True)))


H200 = gpu(9, 0, 132, 1_980_000, 3_201_000, 6144)
A100 = gpu(8, 0, 108, 1_410_000, 1_593_000, 5120)


def test_a_gpu_goes_by_its_clocks():
    found, reference = cuda_rates(H200), RATES["cuda"]
    assert found.flops == pytest.approx(reference.flops, rel=0.02)
    assert found.bytes == pytest.approx(reference.bytes, rel=0.02)
    assert (reference.flops, reference.bytes, reference.call) == (5e14, 3.6e12, 5e-6)
    assert cuda_rates(A100).flops == pytest.approx(0.47 * 312e12, rel=0.02)
    assert cuda_rates(A100).bytes == pytest.approx(0.73 * 2.04e12, rel=0.02)


def test_what_is_not_known_of_a_gpu_is_that_of_the_reference():
    newer = gpu(99, 0, 200, 2_000_000, 0, 6144)
    assert cuda_rates(newer) == RATES["cuda"]
    assert cuda_rates(SimpleNamespace(major=9, minor=0, multi_processor_count=132)) == RATES["cuda"]


def test_other_devices():
    assert rates_of("cpu") == RATES["cpu"] == rates_of("meta")
