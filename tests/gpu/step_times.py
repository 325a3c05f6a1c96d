"""Step time, kept and peak bytes of the contenders on one network; an item is `network:batch:contender`.

    python step_times.py [--once] resnet50:256:ours resnet50:256:compile@0.5 …

A step is forward under bfloat16 autocast, channels_last, the mean square of the outputs, and backward. `--once` runs
one step of each and times nothing: to fill the caches on disk.
"""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import rows
import torch

from normpass import measure, models
from normpass.bench.contenders import contender
from normpass.bench.networks import count_rebuilds
from normpass.measure.step import mean_square

DEVICE = "cuda"
ROUNDS = 12
SIZES = {"deeplabv3_resnet50": 513}


def measured(item: str, once: bool = False) -> dict[str, Any]:
    """One contender: what it keeps, its peak, its step."""
    network, batch, name = item.split(":")
    torch.manual_seed(0)
    shape = (int(batch), 3, *[SIZES.get(network, 224)] * 2)
    x = torch.randn(shape, device=DEVICE)
    plain = models.load(f"torchvision:{network}").to(DEVICE)
    way = contender(name)
    with way.around(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself warns of while it compiles
        job = way.job(plain, x, True, torch.bfloat16, "inductor")
        del plain, x
        if once:
            mean_square(job()).backward()
            return {}
        found = numbers(name, job)
    del job
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def numbers(name: str, job: Any) -> dict[str, Any]:
    time = measure.step_time({name: job}, rounds=ROUNDS)[name]
    kept, peak = measure.kept_bytes(job), measure.peak_bytes(job)
    found = {"ms": [round(1e3 * t, 3) for t in (time.median, time.low, time.high)], "kept": kept, "peak": peak}
    if name.startswith("ours"):
        found["rebuilds"] = count_rebuilds(job)[0]
    return found


if __name__ == "__main__":
    once = "--once" in sys.argv
    items = [argument for argument in sys.argv[1:] if argument != "--once"]
    sys.exit(rows.run_items("compile cache" if once else "step times", items, lambda item: measured(item, once)))
