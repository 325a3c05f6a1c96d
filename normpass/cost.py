"""Seconds that a step of a record takes when it is run once more, on a device: an estimate, or measured.

A step takes as long as its arithmetic or its memory traffic, whichever is longer, and a call's overhead. The rates
are those of one machine of a kind; what a plan depends on is their proportion, which differs less between machines
than they do. CPU: 2 cores with AVX-512, float32, torch 2.15.0. CUDA: the data sheet of an H100 (bfloat16), at half
of its figures; not measured. Where that is not good enough, measure (`normpass.tune`).
"""

from __future__ import annotations

from dataclasses import dataclass

from normpass.facts import Facts, Step


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    flops: float
    """multiplications and additions, of convolutions and matrix products"""
    grouped_flops: float
    """the same of convolutions with groups"""
    bytes: float
    """read or written"""
    call: float
    """seconds of overhead of one call"""


RATES = {
    "cpu": Rates(flops=2e11, grouped_flops=3e10, bytes=3e10, call=4e-5),
    "cuda": Rates(flops=4e14, grouped_flops=1e13, bytes=1.5e12, call=2e-5),
}


def seconds(step: Step, record: Facts) -> float:
    """Of running `step` once, forward."""
    rates = RATES.get(record.device, RATES["cpu"])
    arithmetic = step.flops / (rates.flops if step.groups == 1 else rates.grouped_flops)
    traffic = (sum(record.sizes[v] for v in (*step.reads, *step.makes)) + step.weights) / rates.bytes
    return max(arithmetic, traffic) + rates.call
