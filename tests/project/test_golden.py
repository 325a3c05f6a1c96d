"""What is printed for people, as it stood when somebody last looked at it: `tests/golden/*.txt`.

`pytest tests/project/test_golden.py --renew-golden` writes the files anew: look at the difference then. Figures are
given, not measured, so that a report is the same on every machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import normpass
from normpass import kernels
from normpass.analysis.liveness import Use
from normpass.bench.convolutions import ConvolutionRow
from normpass.bench.layers import LayerRow, Phase
from normpass.bench.networks import Row
from normpass.bench.norm_bytes import ByteRow
from normpass.bench.ops import KernelRow
from normpass.bench.tables import byte_table, convolution_table, kernel_table, layer_table, network_table
from normpass.budget.step_plan import StepPlan
from normpass.cli import main as cli
from normpass.measure import Ratio
from normpass.report.summary import GraphRow, Memory

FOLDER = Path(__file__).parents[1] / "golden"
SHAPE = (16, 64, 56, 56)
RATIO = Ratio(0.875, 0.86, 0.91)


class Net(nn.Module):
    """A stem, a residual block, a norm that is left alone, a layer that breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)) + x)
        y = self.bn3(x)
        y.data.add_(1)
        return self.head(y.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def explained(**options: Any) -> normpass.Report:
    report = normpass.explain(net(), X, **options)
    graphs = tuple(GraphRow(g.nodes, g.norms, 200_000, 100_000, g.ends) for g in report.graphs)
    rows = tuple(replace(row, bytes=4096 * (10 - i)) for i, row in enumerate(report.largest))
    return replace(report, memory=Memory(2 << 20, 1 << 20, 3 << 20, 2 << 20), graphs=graphs, largest=rows)


def phases(seconds: float) -> dict[str, Phase]:
    return {name: Phase(seconds, seconds, seconds, RATIO, 0.5) for name in ("both", "forward", "backward")}


def layers(contender: str, seconds: float) -> LayerRow:
    return LayerRow("bn_relu", SHAPE, "float32", "channels_last", contender, phases(seconds))


def network(contender: str, kept: int, **more: Any) -> Row:
    times = {"seconds": 1.5, "ratio": 0.875, "ratio_low": 0.86, "ratio_high": 0.91, "base": "eager"}
    return Row("resnet50", (16, 3, 224, 224), "float32", "channels_last", contender, kept, 2 * kept, **times, **more)


def op(name: str, microseconds: float) -> KernelRow:
    return KernelRow(name, SHAPE, "float32", "channels_last", 2, 1e-3, 9e-4, 2e-3, 20.0, 0.75, microseconds)


PRINTED: dict[str, Callable[[], Any]] = {
    "explain": explained,
    "explain_without_inputs": lambda: normpass.explain(net()),
    "explain_change": lambda: explained(changes=("leaky_relu",)),
    "explain_sub_batches": lambda: explained(serialize=normpass.passes.SerializeMinibatch(sub_batch=2)),
    "bench_networks": lambda: network_table(
        [network("eager", 1 << 30), network("ours", 1 << 29, rebuilds=53, most_rebuilds=1)], "a CPU, torch 2"
    ),
    "bench_layers": lambda: layer_table([[layers("eager", 2e-3), layers("ours", 1e-3), layers("copy", 5e-4)]], "a CPU"),
    "bench_kernels": lambda: kernel_table([[op("moments", 12.5), op("norm_act", 9.0)]], "a CPU"),
    "bench_bytes": lambda: byte_table(
        [
            ByteRow("resnet50", (256, 3, 224, 224), "bfloat16", "eager", 30 * 10**9, 57 * 10**9),
            ByteRow("resnet50", (256, 3, 224, 224), "bfloat16", "ours", 20 * 10**9, 40 * 10**9, 3 * 10**9, 2 * 10**9),
        ]
    ),
    "bench_convolutions": lambda: convolution_table(
        [ConvolutionRow("3x3", SHAPE, 64, "channels_last", "forward", 0.01, 0.02, Ratio(0.5, 0.48, 0.55))], "a CPU"
    ),
}


def text_of(printed: Any) -> str:
    if isinstance(printed, normpass.Report):
        return f"{printed}\n"
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=False, color_system=None).print(printed)
    return out.getvalue()


def compare(name: str, text: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if request.config.getoption("--renew-golden"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", PRINTED)
def test_reports(name, request):
    compare(name, text_of(PRINTED[name]()), request)


def test_a_plan(request):
    plan = normpass.plan(net(), X, 0.6)
    rows = tuple(replace(row, seconds=1e-3, other_seconds=2e-3) for row in plan.rows)
    uses = [Use(kept, 2 * kept, seconds) for kept, seconds in ((1 << 20, 0.1), (1 << 19, 0.11), (1 << 18, 0.12))]
    compare("plan", f"{StepPlan(plan.decisions, rows, *uses, '0.6')}\n", request)


def test_kernels(monkeypatch, capsys, request):
    found = [kernels.Status("cpu", True, "C++, avx512, 2 threads"), kernels.Status("cuda", False, "torch sees no GPU")]
    monkeypatch.setattr(kernels, "status", lambda: found)
    monkeypatch.setattr(cli, "openmp_runtimes", lambda: ["/lib/libgomp.so.1", "/lib/libomp.so"])
    assert cli.main(["kernels"]) == 0
    compare("kernels", capsys.readouterr().out, request)


def test_every_file_is_used():
    names = {*PRINTED, "plan", "kernels"}
    assert {path.stem for path in FOLDER.glob("*.txt")} == names
