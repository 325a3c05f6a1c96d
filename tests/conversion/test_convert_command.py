"""`normpass convert`: what it writes and says; bad input gets one line and leaves nothing behind."""

import json
import os
import sys

import onnx
import pytest
import torch
from onnx_files import conv_norm_graph, run_onnx, with_custom_operator, with_input
from safetensors.torch import load_file

import normpass
from normpass.cli import main as cli
from normpass.conversion.agreement import largest_error

TINY = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))

class Branches(Tiny):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x

class Baked(Tiny):
    def forward(self, x):
        return self.norm(self.conv(x)).view(2, -1)
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "tinyconv.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tinyconv", None)


def tiny_weights():
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4), "norm.weight": torch.randn(4),
        "norm.bias": torch.randn(4), "norm.running_mean": torch.randn(4), "norm.running_var": torch.rand(4),
        "norm.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip


def test_command(workspace, capsys):
    torch.save({"model": {f"module.{k}": v for k, v in tiny_weights().items()}, "epoch": 3}, "weights.pt")
    command = (
        "convert tinyconv:Tiny t.onnx --input 1x3x8x8 --weights weights.pt --opset 18 --dynamic-batch --report r.json"
    )
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote t.onnx (opset 18)\n1 norms folded, 0 left\nlargest error ")
    report = json.loads((workspace / "r.json").read_text())
    assert (report["opset"], report["folded"], report["operators"]["Conv"]) == (18, 1, 1)
    assert set(report["versions"]) == {"torch", "onnx", "onnxscript", "onnxruntime"}

    plain = importable("Tiny")
    plain.load_state_dict(tiny_weights())
    torch.save(normpass.optimize(plain), "whole.pt")
    assert cli.main("convert whole.pt w.safetensors --trust-pickle".split()) == 0
    torch.testing.assert_close(load_file("w.safetensors"), tiny_weights(), rtol=0, atol=0)
    x = torch.randn(4, 3, 8, 8)
    assert largest_error(plain.eval()(x), run_onnx("t.onnx", x)) < 1e-5


def importable(name):
    from normpass import models

    return models.load(f"tinyconv:{name}")


BAD = {
    "convert tinyconv:Nope n.onnx --input 2x3x8x8": "has no `Nope`",
    "convert torchvision:resnet51 n.onnx --input 2x3x8x8": "did you mean `torchvision:resnet50`",
    "convert tinyconv:Tiny n.onnx --input 2x4x8x8": "does not run on inputs of shape [(2, 4, 8, 8)]",
    "convert tinyconv:Tiny n.onnx --input 2xQ": "`2xQ` is not a shape",
    "convert tinyconv:Tiny n.onnx --input 0x3x8x8": "`0x3x8x8` is not a shape",
    "convert tinyconv:Tiny n.onnx --input=-2x3x8x8": "`-2x3x8x8` is not a shape",
    "convert tinyconv:Tiny n.onnx --input 2x3x1000000000000x8": "GiB, and this machine has",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8,2x3x1000000x1000000": "name smaller sizes",
    f"convert tinyconv:Tiny n.onnx --input {'9' * 5000}x3": "9999` is not a shape",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8,2x3x8x8": "takes 2 positional arguments but 3 were given",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8x1x1x1x1": "does not run on inputs of shape",
    "convert tinyconv:Tiny n.onnx": "--input",
    "convert tinyconv:Tiny": "write `normpass convert MODEL OUT",
    "convert tinyconv:Tiny n.bin --input 2x3x8x8": ".onnx, .pt2, .safetensors",
    "convert tinyconv:Tiny none/n.onnx --input 2x3x8x8": "cannot write `none/n.onnx`",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --report none/r.json": "no folder `none`",
    "convert tinyconv:Tiny folder.onnx --input 2x3x8x8": "it is a folder",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --opset 99": "choose from 13 to",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --opset 13": "cannot be written in opset 13: use --opset 18",
    "convert tinyconv:Tiny n.pt2 --input 2x3x8x8 --opset 18": "has no opset",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights none.pt": "no file `none.pt`",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights names.pt": "no `conv.bias` and extra `foo`",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights shapes.pt": "`conv.bias` has shape (5,), the model's (4,)",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights objects.pt": "no tensors",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights numbers.pt": "has no state_dict",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights junk.pt": "`junk.pt` ",
    "convert tinyconv:Tiny n.onnx --input 2x3x8x8 --weights junk.safetensors": "cannot be read as weights",
    "convert objects.pt n.onnx --input 2x3x8x8": "--trust-pickle",
    "convert numbers.pt n.onnx --input 2x3x8x8 --trust-pickle": "no whole model",
    "convert junk.pt n.onnx --input 2x3x8x8 --trust-pickle": "cannot be loaded",
    "convert tinyconv:Branches n.onnx --input 2x3x8x8": "torch.export cannot express the forward of this Branches",
    "convert tinyconv:Baked n.onnx --input 2x3x8x8 --dynamic-batch": "cannot be exported with a dynamic batch",
    "convert --from-onnx none.onnx n.onnx": "no file `none.onnx`",
    "convert --from-onnx junk.onnx n.onnx": "`junk.onnx` is no valid ONNX file",
    "convert --from-onnx old.onnx n.onnx": "has opset 12, below 13",
    "convert --from-onnx custom.onnx n.onnx": "replace mine::Twice by standard operators",
    "convert --from-onnx zero.onnx n.onnx": "input `x` is 0×4×5×5 and holds no values",
    "convert --from-onnx huge.onnx n.onnx": "input `x` is 1000000000000×4×5×5 and takes",
    "convert --from-onnx open.onnx n.onnx": "write fixed ones into the file",
    "convert --from-onnx rank.onnx n.onnx": "`rank.onnx` is no valid ONNX file",
    "convert --from-onnx old.onnx n.pt2": "only ONNX can be written",
    "convert --from-onnx old.onnx n.onnx --input 2x3": "--input does not go with --from-onnx",
    "convert --from-onnx old.onnx": "argument",
}


def test_bad_input_gets_one_line_and_leaves_nothing(workspace, capsys):
    weights = tiny_weights()
    torch.save({"foo": weights["conv.bias"], **{k: v for k, v in weights.items() if k != "conv.bias"}}, "names.pt")
    torch.save(weights | {"conv.bias": torch.zeros(5)}, "shapes.pt")
    torch.save(importable("Tiny"), "objects.pt")
    torch.save({"a": 1}, "numbers.pt")
    for name in ("junk.pt", "junk.safetensors", "junk.onnx"):
        (workspace / name).write_bytes(b"no such thing" * 50)
    (workspace / "folder.onnx").mkdir()
    onnx.save(conv_norm_graph(opset=12), "old.onnx")
    for name, batch in {"zero": 0, "huge": 10**12}.items():
        onnx.save(conv_norm_graph(batch=batch), f"{name}.onnx")
    onnx.save(with_input(conv_norm_graph(), ["N", "C", 5, 5]), "open.onnx")
    onnx.save(with_input(conv_norm_graph(), [1] * 9), "rank.onnx")
    onnx.save(with_custom_operator(conv_norm_graph()), "custom.onnx")
    before = sorted(os.listdir())
    for command, words in BAD.items():
        try:
            status = cli.main(command.split())
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == 2, f"{command}: {error}"
        assert words in error, f"{command}: {error}"
        assert error.count("\n") == 1, f"{command}: {error}"
        assert sorted(set(os.listdir()) - {"__pycache__"}) == before, command
