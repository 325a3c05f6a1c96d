"""Kept bytes, peak bytes and step time: the one definition used by the report, the benchmarks and the tests.

    kept_bytes           what a forward leaves allocated for its backward
    kept_by_layer        the same by layer, of a plain model
    peak_bytes           the highest memory of a training step
    forward_peak_bytes   the highest memory of a forward
    memory_timeline      memory along a training step
    step_time, ratios    seconds of a step of several models, side by side

Nothing here changes the model.
"""

from normpass.measure.memory import (
    Timeline,
    forward_peak_bytes,
    kept_by_layer,
    kept_bytes,
    memory_timeline,
    peak_bytes,
)
from normpass.measure.step_time import Ratio, StepTime, ratios, step_time
from normpass.measure.words import counted, format_bytes

__all__ = [
    "Ratio",
    "StepTime",
    "Timeline",
    "counted",
    "forward_peak_bytes",
    "format_bytes",
    "kept_by_layer",
    "kept_bytes",
    "memory_timeline",
    "peak_bytes",
    "ratios",
    "step_time",
]
