"""Whole networks: step time, kept and peak bytes and rebuilds of every contender, measured side by side in one run.

A step is forward, the mean square of the outputs, backward; gradients are None before it, and no optimizer runs.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from normpass import measure, models
from normpass.api import check_example_inputs
from normpass.bench.contenders import CONTENDERS, WITH_BUDGET, Job, contender
from normpass.bench.layers import BenchError, name_of, one_line
from normpass.copies.untouched import untouched
from normpass.measure.step import mean_square
from normpass.recipe.recipes import Rebuilds

NETWORKS = tuple(f"torchvision:{name}" for name in ("resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0"))


@dataclass(frozen=True)
class Setting:
    """How networks are run."""

    shape: tuple[int, ...]
    """of the one input, (N, C, spatial…)"""
    dtype: torch.dtype = torch.float32
    """float32, or the narrower dtype of autocast"""
    channels_last: bool = False
    device: str = "cpu"
    rounds: int = 5
    """timed steps of each contender"""
    compile_backend: str = "inductor"

    @property
    def default_contenders(self) -> tuple[str, ...]:
        """Eager in the layout asked for, and in the contiguous one, beside ours."""
        return ("eager", "eager_channels_last", "ours") if self.channels_last else ("eager", "ours")

    @property
    def default_base(self) -> str:
        """Eager in the layout asked for."""
        return "eager_channels_last" if self.channels_last else "eager"


@dataclass(frozen=True)
class Row:
    """One contender on one network in train mode; bytes and seconds of one step."""

    network: str
    input: tuple[int, ...]
    dtype: str
    layout: str
    contender: str
    kept: int | None = None
    peak: int | None = None
    seconds: float | None = None
    """median over the rounds"""
    seconds_low: float | None = None
    """lower quartile"""
    seconds_high: float | None = None
    """upper quartile"""
    base: str = ""
    """the contender that `ratio` compares with"""
    ratio: float | None = None
    """time over the base's, round by round: median"""
    ratio_low: float | None = None
    ratio_high: float | None = None
    rebuilds: int | None = None
    """tensors that ours rebuilds in one backward"""
    most_rebuilds: int | None = None
    """the most often that one tensor is rebuilt in one backward"""
    compiled_while_timed: int | None = None
    """graphs that torch.compile compiled, of all contenders, while the steps were timed: anything but 0 spoils them"""
    error: str = ""
    """why it did not run"""


def bench_network(network: str, setting: Setting, contenders: Sequence[str] = (), base: str | None = None) -> list[Row]:
    """Measure the network that the name `network` stands for, a row for each contender.

    Args:
        network: as for `normpass.models.load`; called with one tensor.
        contenders: names for `normpass.bench.contenders.contender` (default: `setting.default_contenders`).
        base: the contender that times are compared with (default: `setting.default_base`).

    Raises:
        ModelSpecError: nothing can be built from `network`.
        InvalidInputError: it does not run on an input of that shape.
        BenchError: an unknown contender; the base is not among them or fails.
    """
    contenders, base = contenders or setting.default_contenders, base or setting.default_base
    check_contenders(contenders, base)
    torch.manual_seed(0)
    plain = models.load(network).to(setting.device)
    x = torch.randn(setting.shape, device=setting.device)
    check_example_inputs(plain, x)
    torch.compiler.reset()
    with dynamo_config.patch(recompile_limit=64):  # each contender compiles the same functions once more
        rows, jobs = {}, {}
        for name in dict.fromkeys(contenders):
            rows[name], job = _measured(name, network, plain, x, setting)
            jobs.update({} if job is None else {name: job})
            _release(setting.device)
        if base not in jobs:
            raise BenchError(f"`{base}`, the base of the ratios, fails on {network}: {rows[base].error}")
        timed = _timed(rows, jobs, base, setting.rounds)
    jobs.clear()
    torch.compiler.reset()
    _release(setting.device)
    return [*timed.values()]


def check_contenders(contenders: Sequence[str], base: str) -> None:
    """Raise BenchError for a name that is none, and for a base that does not take part."""
    for name in (*contenders, base):
        try:
            contender(name)
        except KeyError:
            budgets = ", ".join(f"{kind}@FRACTION" for kind in WITH_BUDGET)
            raise BenchError(f"no contender `{name}`: choose from {', '.join(CONTENDERS)}, {budgets}") from None
    if base not in contenders:
        raise BenchError(f"`{base}`, the base of the ratios, is not among {', '.join(contenders)}: set --base")


def count_rebuilds(job: nn.Module) -> tuple[int, int]:
    """Rebuilds in one backward: of all tensors together, and the most of any one tensor."""
    with untouched(job), Rebuilds() as rebuilds:
        mean_square(job()).backward()
    return rebuilds.total, rebuilds.most


def _measured(name: str, network: str, plain: nn.Module, x: Tensor, setting: Setting) -> tuple[Row, Job | None]:
    """The contender's row without times, and the contender warm; None and the reason if it fails."""
    way = contender(name)
    layout = name_of(way.layout(x, setting.channels_last)).removesuffix("_format")
    row = Row(network, setting.shape, name_of(setting.dtype), layout, name)
    try:
        with way.around(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch itself warns of while it compiles
            job = way.job(plain, x, setting.channels_last, setting.dtype, setting.compile_backend)
            kept, peak = measure.kept_bytes(job), measure.peak_bytes(job)
            rebuilds, most = count_rebuilds(job) if name.startswith("ours") else (None, None)
    except Exception as error:  # whatever a contender raises is a result, and the others go on
        return dataclasses.replace(row, error=one_line(error)), None
    return dataclasses.replace(row, kept=kept, peak=peak, rebuilds=rebuilds, most_rebuilds=most), job


def _timed(rows: Mapping[str, Row], jobs: Mapping[str, Job], base: str, rounds: int) -> dict[str, Row]:
    before = counters["stats"]["unique_graphs"]
    around = {name: contender(name).around for name in jobs}
    times = measure.step_time(jobs, rounds=rounds, around=around)
    ratios = measure.ratios(times, base)
    compiled = counters["stats"]["unique_graphs"] - before
    done = dict(rows)
    for name, time in times.items():
        done[name] = dataclasses.replace(
            rows[name],
            seconds=time.median,
            seconds_low=time.low,
            seconds_high=time.high,
            base=base,
            ratio=ratios[name].median,
            ratio_low=ratios[name].low,
            ratio_high=ratios[name].high,
            compiled_while_timed=compiled if name.startswith("compile") else None,
        )
    return done


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
