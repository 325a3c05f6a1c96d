"""Seconds that a step of a record takes when it is run once more, on a device: an estimate, or measured.

A step takes as long as its arithmetic or its memory traffic, whichever is longer, and a call's overhead. The rates
are those of one machine of a kind; what a plan depends on is their proportion, which differs less between machines
than they do. CPU: 2 cores with AVX-512, float32, torch 2.15.0. CUDA: an H200, bfloat16, about half of the products and
three quarters of the bandwidth of its data sheet; another GPU by its own clocks, where it is known what they mean. Not
measured. Where that is not good enough, measure (`normpass.budget.tune`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from normpass.analysis.facts import Facts, Step


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
    "cuda": Rates(flops=5e14, grouped_flops=1e13, bytes=3.6e12, call=5e-6),
}


_PRODUCTS = {
    (7, 0): 1024,
    (7, 5): 512,
    (8, 0): 2048,
    (8, 6): 512,
    (8, 9): 512,
    (9, 0): 4096,
    (10, 0): 8192,
    (12, 0): 512,
}
"""By compute capability: dense 16-bit multiplications and additions of a multiprocessor in one cycle, summed in float32
(the data sheets of NVIDIA's GPUs)."""

_REACHED_FLOPS, _REACHED_BYTES = 0.47, 0.73
"""Shares of what the clocks say that convolutions and pointwise kernels reach."""


def cuda_rates(properties: Any) -> Rates:
    """Of a GPU, from what `torch.cuda.get_device_properties` says; an H200's for what that leaves open."""
    cycles = 1e3 * getattr(properties, "clock_rate", 0) * properties.multi_processor_count
    flops = _REACHED_FLOPS * cycles * _PRODUCTS.get((properties.major, properties.minor), 0)
    transfers = 2e3 * getattr(properties, "memory_clock_rate", 0)
    moved = _REACHED_BYTES * transfers * getattr(properties, "memory_bus_width", 0) / 8
    known = RATES["cuda"]
    return replace(known, flops=flops or known.flops, bytes=moved or known.bytes)


@functools.cache
def rates_of(device: str) -> Rates:
    """Of a device type; of CUDA those of the GPU that is current when this is first asked."""
    if device == "cuda" and torch.cuda.is_available():
        return cuda_rates(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return RATES.get(device, RATES["cpu"])


def seconds(step: Step, record: Facts, device: str | None = None) -> float:
    """Of running `step` once, forward, on the record's device or another."""
    rates = rates_of(device or record.device)
    traffic = moved(step, record) / rates.bytes
    arithmetic = step.flops / (rates.flops if step.groups == 1 else rates.grouped_flops)
    return max(arithmetic, traffic) + rates.call


def moved(step: Step, record: Facts) -> int:
    """Bytes that `step` reads and writes, forward."""
    return sum(record.sizes[v] for v in (*step.reads, *step.makes)) + step.weights
