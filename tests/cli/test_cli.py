"""The command line: what it prints, and that bad input gets one line and status 2."""

import errno
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normpass
from normpass.bench import contenders
from normpass.bench import run as bench
from normpass.cli import bench as bench_commands
from normpass.cli import main as cli
from normpass.demo import training as demo

NETWORK = """
from torch import nn
from torch.nn import functional as F

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.BatchNorm2d(8)
        self.unused = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.bn(self.conv(x)) + x)
        return self.last(x).mean((2, 3))

def frozen():
    return Tiny().requires_grad_(False)

def broken():
    return 1 / 0

MADE = Tiny()
"""

TABLE = """
                                          normpass: Tiny
┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ norm   ┃ pattern                           ┃ rewrite       ┃ kept ┃ reason                     ┃
┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ stem.1 │ conv2d → BatchNorm2d → relu       │ split_bn      │ x    │                            │
│ bn     │ conv2d → BatchNorm2d → add → relu │ split_bn      │ x    │                            │
│ last   │ relu → BatchNorm2d                │ fuse_norm_act │ x    │                            │
│ unused │ BatchNorm2d                       │ left alone    │      │ no captured graph calls it │
└────────┴───────────────────────────────────┴───────────────┴──────┴────────────────────────────┘
3 of 4 norms rewritten, in 1 graph
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A current directory with a module of the user's, `tinynet`."""
    (tmp_path / "tinynet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("tinynet", None)


def run(capsys, command: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    try:
        status = cli.main(command.split())
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, "\n".join(line.rstrip() for line in out.splitlines()), err


def test_explain(workspace, capsys):
    status, out, err = run(capsys, "explain tinynet:Tiny --input 2x3x16x16 --json report.json")
    assert (status, err) == (0, "") and out.startswith(TABLE.strip("\n"))
    assert re.search(r"^kept for backward: 64\.\d KiB plain, 32\.\d KiB optimized \(0\.50\)$", out, re.MULTILINE)
    report = json.loads((workspace / "report.json").read_text())
    assert [row["rewrite"] for row in report["rows"]] == ["split_bn", "split_bn", "fuse_norm_act", None]
    assert report["memory"]["kept_after"] < report["memory"]["kept_before"]


def test_explain_without_an_input_lists_the_norms(workspace, capsys):
    status, out, err = run(capsys, "explain tinynet:Tiny")
    assert (status, err) == (0, "")
    assert out.count("give example inputs: what is done with it depends on the graph") == 4
    assert out.splitlines()[-1] == "4 norms; give example inputs to see what is done with them"


def test_explain_knows_the_input_of_a_network_of_torchvision(capsys, monkeypatch):
    seen = []
    report = normpass.explain(nn.BatchNorm1d(3))
    monkeypatch.setattr(normpass, "explain", lambda model, inputs, **_: seen.append(inputs) or report)
    assert run(capsys, "explain torchvision:squeezenet1_1")[0] == 0
    assert [tuple(x.shape) for x in seen[0]] == [(2, 3, 224, 224)]


def test_explain_in_another_dtype_keeps_half_as_much(workspace, capsys):
    run(capsys, "explain tinynet:Tiny --input 2x3x16x16 --json report.json --dtype bfloat16")
    memory = json.loads((workspace / "report.json").read_text())["memory"]
    assert 2 * 16384 <= memory["kept_before"] < 2.2 * 16384  # 64 KiB and some vectors in float32


def test_explain_changes_and_lossy(workspace, capsys):
    _, out, _ = run(capsys, "explain tinynet:Tiny --input 2x3x16x16 --change leaky_relu --allow-lossy")
    assert "conv2d → BatchNorm2d → leaky_relu" in out
    assert "inplace_abn" in out


def test_explain_plans_for_a_budget(workspace, capsys):
    command = (
        "explain tinynet:Tiny --input 2x3x16x16 --budget 0.5 --plan plan.json --plot memory.png --json report.json"
    )
    status, out, _ = run(capsys, command)
    assert status == 0
    assert "plan for a budget of 0.5" in out and "planned: kept" in out
    plan = json.loads((workspace / "plan.json").read_text())
    assert plan["predicted"]["planned"]["kept"] <= 0.5 * plan["predicted"]["plain"]["kept"]
    report = json.loads((workspace / "report.json").read_text())
    assert report["plan"] == plan
    assert report["memory"]["kept_after"] == plan["predicted"]["planned"]["kept"]
    assert (workspace / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_explain_serializes_and_models_the_traffic(workspace, capsys):
    command = "explain tinynet:Tiny --input 8x3x16x16 --change group_norm --serialize --traffic --buffer 40KiB"
    status, out, _ = run(capsys, command)
    assert status == 0
    assert "sub-batches of" in out and "if every norm looked at one sample" not in out
    assert "Modelled memory traffic of a training step, Tiny, 8x3x16x16, float32, buffer 0.0390625 MiB" in out
    assert "greedy, branches held in the buffer" in out


def test_bench_frontier(workspace, capsys, monkeypatch):
    monkeypatch.setattr(bench_commands, "FRONTIER", ("eager", "ours", "ours@0.5", "compile"))
    command = "bench frontier tinynet:Tiny --input 2x3x16x16 --rounds 1 --no-compile --json f.json --plot f.png"
    status, out, _ = run(capsys, command)
    assert status == 0
    rows = json.loads((workspace / "f.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["eager", "ours", "ours@0.5"]
    assert rows[2]["kept"] <= 0.5 * rows[0]["kept"]
    assert (workspace / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command, message",
    [
        ("explain tinynet:Tiny --budget 0.5", "--budget needs --input"),
        ("explain tinynet:Tiny --change leaky_relu", "--change needs --input"),
        ("explain tinynet:Tiny --serialize", "--serialize needs --input"),
        ("explain tinynet:Tiny --no-winograd", "--no-winograd needs --input"),
        (
            "explain no:such --budget much",
            "--budget: `much` is not a budget: write a share of what plain keeps, as 0.5",
        ),
        ("explain no:such --budget 7", "--budget: `7` is not a budget"),
        ("explain tinynet:Tiny --input 2x3x8x8 --plan p.json", "--plan does nothing without --budget"),
        ("explain tinynet:Tiny --input 2x3x8x8 --tune", "--tune does nothing without --budget"),
        (
            "explain tinynet:Tiny --input 2x3x8x8 --buffer 1MiB",
            "--buffer does nothing without --serialize or --traffic",
        ),
        ("explain tinynet:Tiny --input 2x3x8x8 --serialize --budget 0.5", "either `serialize` or `memory_budget`"),
        ("explain tinynet:Tiny --input 2x3x8x8 --plot x.txt", "`x.txt` is not the name of a PNG file: let it end in"),
        ("bench frontier tinynet:Tiny --plot x.txt", "`x.txt` is not the name of a PNG file"),
        ("explain tinynet:Tiny --input 2,3,8,8", "4 inputs of one size each: the sizes of one are joined by x"),
        ("explain tinynet:Tiny --change kalman,leaky_relu", "is not known; known are leaky_relu, group_norm, kalman"),
        ("explain tinynet:broken", "raises ZeroDivisionError: division by zero ("),
        ("explain tinynet:MADE", "`tinynet:MADE` is a Tiny already: name a function that returns it"),
        ("explain tinynet:Tiny --input 2x3x8x8 --budget 0.00001", "no plan keeps fewer than"),
        ("explain tinynet:Tiny --plot m.png", "--plot needs --input"),
        ("explain tinynet:Tiny --traffic", "--traffic needs --input"),
        ("explain tinynet:Tiny --input 2x3x8x8 --serialize --buffer big", "`big` is not a size such as 10MiB"),
        ("bench frontier tinynet:Nope", "has no `Nope`"),
        ("bench tinynet:Tiny --with ours@2", "no contender `ours@2`"),
        ("", "the following arguments are required: COMMAND"),
        ("fry", "invalid choice: 'fry'"),
        ("explain", "required: MODEL"),
        ("explain tinynet", "`tinynet` is not a model: write `torchvision:NAME`"),
        ("explain tinynet:Tinny", "has no `Tinny`; did you mean `tinynet:Tiny`?"),
        ("explain nowhere:Net", "no module `nowhere`"),
        ("explain torchvision:resnet1", "did you mean `torchvision:resnet18`"),
        ("explain tinynet:Tiny --input 2x3xa", "`2x3xa` is not a shape"),
        ("explain tinynet:Tiny --input 2x4x16x16", "does not run on inputs of shape [(2, 4, 16, 16)]"),
        ("explain tinynet:Tiny --change swish", '"swish" is not known; known are leaky_relu'),
        ("explain tinynet:Tiny --dtype int8", "invalid choice: 'int8'"),
        ("explain tinynet:Tiny --json no/folder/r.json", "no folder `no/folder`: create it first"),
        ("explain tinynet:Tiny --json .", "`.` is a folder: name a file in it"),
        ("explain tinynet:frozen --input 2x3x16x16 --plot m.png", "is the model frozen?"),
        ("demo --steps 0", "`0` is not a whole number above 0"),
        ("demo --out no/folder/plot.png", "no folder `no/folder`"),
        ("demo --batch 1798", "must be 1 to 1797"),
        ("demo --model tinynet:Tiny --size 16 --batch 2", "not one score for each class"),
        ("demo --model tinynet --size 16", "is not a model"),
        ("demo --model torchvision:resnet18 --size 16 --batch 1", "try another --size or --batch"),
        ("bench tinynet", "`tinynet` is not a model: write `torchvision:NAME`"),
        ("bench tinynet:Tiny --input 2x3xa", "`2x3xa` is not a shape"),
        ("bench tinynet:Tiny --input 2x4x16x16", "does not run on inputs of shape [(2, 4, 16, 16)]"),
        (
            "bench tinynet:Tiny --with eager,hours",
            "no contender `hours`: choose from eager, eager_channels_last, ours,",
        ),
        ("bench tinynet:Tiny --with ours", "`eager`, the base of the ratios, is not among ours: set --base"),
        ("bench tinynet:Tiny --rounds 0", "`0` is not a whole number above 0"),
        ("bench tinynet:Tiny --dtype float64", "invalid choice: 'float64'"),
        ("bench tinynet:Tiny --device cuda", "torch sees no CUDA device: leave out --device cuda"),
        ("bench tinynet:Tiny --json no/folder/r.json", "no folder `no/folder`: create it first"),
        ("bench tinynet:frozen --input 2x3x16x16", "is the model frozen?"),
        ("bench kernels --shape 2x3", "`2x3` is not a shape of an image: write 4 sizes, like 16x64x56x56"),
        ("bench kernels --shape 1x3x1x1", "eager does not run on 1x3x1x1 in float32"),
        ("bench kernels --layer bn_tanh", "invalid choice: 'bn_tanh'"),
        ("bench kernels --device cuda", "torch sees no CUDA device: leave out --device cuda"),
        ("kernels --json .", "`.` is a folder: name a file in it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(workspace, capsys, monkeypatch, command, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys, command)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "command",
    [
        "explain tinynet:Tiny --json out",
        "demo --out out",
        "bench tinynet:Tiny --json out",
        "bench kernels --json out",
        "kernels --json out",
    ],
)
def test_file_that_cannot_be_written(workspace, capsys, monkeypatch, command):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "out")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(demo, "run", lambda *_: None)
    monkeypatch.setattr(demo, "plot", refuse)
    status, _, err = run(capsys, command)
    assert status == 2
    assert err.startswith("normpass: error: cannot write `out`: Permission denied; name another file with --")


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out.startswith(f"normpass {normpass.__version__} (torch ")


def test_as_a_module(workspace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["normpass", "explain", "tinynet:Missing"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("normpass", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("normpass: error: `tinynet:Missing`")


def test_bench(workspace, capsys):
    command = "bench tinynet:Tiny --input 2x3x16x16 --batch 3 --channels-last --dtype bfloat16 --rounds 2 --json b.json"
    status, out, _ = run(capsys, command)
    assert status == 0
    assert "tinynet:Tiny, 3x3x16x16, bfloat16: CPU" in out
    found = json.loads((workspace / "b.json").read_text())
    assert found["command"] == f"normpass {command}"
    assert {"date", "device", "versions"} < set(found)
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == ["eager", "eager_channels_last", "ours"]
    assert rows["ours"]["input"] == [3, 3, 16, 16]
    assert (rows["ours"]["dtype"], rows["ours"]["layout"]) == ("bfloat16", "channels_last")
    assert rows["eager"]["layout"] == "contiguous"
    assert rows["ours"]["kept"] < rows["eager"]["kept"]
    assert rows["ours"]["most_rebuilds"] == 1


def test_bench_kernels(workspace, capsys):
    command = "bench kernels --shape 2x3x4x4 3x2x5x5 --layer bn_relu bn_silu --no-compile --rounds 2 --json k.json"
    status, out, _ = run(capsys, command)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if "channels_last: CPU" in line] == [
        "bn_relu,",
        "bn_silu,",
        "ops",
    ]
    found = json.loads((workspace / "k.json").read_text())
    assert found["command"] == f"normpass {command}"
    assert len(found["layers"]) == 2 * 2 * len(
        ("ours", "ours_kept", "eager", "eager_out_of_place", "eager_contiguous", "copy")
    )
    assert {row["kernel"] for row in found["kernels"]} > {"moments", "norm_act", "copy"}
    assert set(found["call_overhead_microseconds"])


def test_bench_convolutions(workspace, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASES", (("3x3", (2, 16, 8, 8), 16), ("depthwise 5x5", (2, 16, 8, 8), 16)))
    status, out, _ = run(capsys, "bench convolutions --layout contiguous --rounds 1 --json c.json")
    assert status == 0 and "convolutions, float32, contiguous: CPU" in out
    found = json.loads((workspace / "c.json").read_text())
    assert [row["computes"] for row in found["convolutions"]] == ["y", "dx", "dweight", "dx", "dweight"]


def test_what_did_not_run_is_said_and_ours_and_what_was_named_fail_the_command(workspace, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("backend raised:\n\nout of luck\nhere")

    monkeypatch.setattr(contenders, "checkpointed", refuse)
    status, out, _ = run(capsys, "bench tinynet:Tiny --input 2x3x16x16 --rounds 1 --with eager,checkpoint")
    assert status == 1
    assert "checkpoint did not run: RuntimeError: backend raised: out of luck\n" in f"{out}\n"
    monkeypatch.setattr(contenders, "optimize", refuse)
    status, out, _ = run(capsys, "bench tinynet:Tiny --input 2x3x16x16 --rounds 1")
    assert status == 1
    assert "ours did not run" in out


def test_kernels(workspace, capsys):
    status, out, _ = run(capsys, "kernels --json kernels.json")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["cpu", "cuda"]
    found = json.loads((workspace / "kernels.json").read_text())
    assert [row["device"] for row in found["kernels"]] == ["cpu", "cuda"]
    assert all(row["words"] for row in found["kernels"])
    assert found["threads"] == torch.get_num_threads()
