"""Conversion: what is folded, what the files compute, and that nothing half-written is left behind."""

import json
import os
import stat
import sys

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import nn

import normpass
from normpass.cli import main as cli
from normpass.conversion import agreement
from normpass.conversion.agreement import largest_error
from normpass.conversion.convert import trial_calls
from normpass.conversion.export import Arguments, export_folded
from normpass.conversion.from_onnx import convert_onnx
from normpass.nn.switchable import NORMS, switchable_layers


class Net(nn.Module):
    """A norm after a convolution, a residual join, a grouped transposed convolution, a linear layer and a ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pre = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
        self.bn_up = nn.BatchNorm2d(12, eps=1e-3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 6)
        self.bn_fc = nn.BatchNorm1d(6, affine=False)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.bn(self.conv(x)) + x)
        x = self.pre(x)
        return {"out": self.bn_fc(self.fc(self.drop(self.bn_up(self.up(x)).mean((2, 3)))))}


def trained(model, *shape):
    """With statistics, weights and biases that are not trivial."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        output = model(torch.randn(*shape) + 0.5)
        output = output["out"] if isinstance(output, dict) else output
        optimizer.zero_grad()
        (output - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.fixture
def net():
    return trained(Net(), 4, 3, 8, 8)


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx_of_plain_and_optimized(net, tmp_path):
    x = torch.randn(5, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name, model in (("plain", net), ("optimized", normpass.optimize(net))):
        path = tmp_path / f"{name}.onnx"
        found = normpass.convert(model, path, x[:1], dynamic_batch=True)
        assert (found.folded, len(found.left)) == (4, 1)
        assert found.operators == {
            "Conv": 2, "Relu": 2, "Add": 1, "BatchNormalization": 1, "ConvTranspose": 1, "ReduceMean": 1, "Gemm": 1
        }  # fmt: skip
        assert found.agreement.largest_error < 1e-5
        assert found.agreement.batch_sizes == (1, 3)
        assert found.agreement.runner == "onnxruntime CPUExecutionProvider"
        net.eval()
        assert largest_error(net(x)["out"], run_onnx(path, x)) < 1e-5
        net.train()
        proto = onnx.load(path)
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_pt2(net, tmp_path):
    found = normpass.convert(normpass.optimize(net), tmp_path / "net.pt2", torch.randn(2, 3, 8, 8), dynamic_batch=True)
    assert found.folded == 4
    program = torch.export.load(tmp_path / "net.pt2")
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.batch_norm.default") == 1
    assert not any("normpass" in target for target in targets)
    x = torch.randn(7, 3, 8, 8)
    assert largest_error(net.eval()(x)["out"], program.module()(x)["out"]) < 1e-5


def test_safetensors(tmp_path):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    assert "bit for bit" in str(normpass.convert(normpass.optimize(model), tmp_path / "net.safetensors"))
    torch.testing.assert_close(load_file(tmp_path / "net.safetensors"), dict(model.state_dict()), rtol=0, atol=0)


def test_a_changed_function_is_what_is_written(net, tmp_path):
    changed = normpass.optimize(net, changes=("leaky_relu",))
    found = normpass.convert(changed, tmp_path / "net.onnx", torch.randn(2, 3, 8, 8))
    assert found.operators["LeakyRelu"] == 2
    assert "Relu" not in found.operators
    x = torch.randn(2, 3, 8, 8)
    assert largest_error(changed.eval()(x)["out"], run_onnx(tmp_path / "net.onnx", x)) < 1e-5


def choose(layer, mean_of, var_of):
    """Decide a switchable layer."""
    with torch.no_grad():
        layer.radius.fill_(1.0)
        layer.mean_logits[NORMS.index(mean_of)] += 1
        layer.var_logits[NORMS.index(var_of)] += 1


@pytest.mark.parametrize(
    "change, pair, left",
    [
        ("kalman", None, 0),
        ("sparse_switchable", ("batch", "batch"), 0),
        ("sparse_switchable", ("layer", "batch"), 2),
        ("sparse_switchable", ("instance", "instance"), 2),
    ],
)
def test_other_norms_end_as_standard_operators(tmp_path, change, pair, left):
    """Those that are batch norms in eval mode are folded away."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    model = normpass.optimize(plain, changes=(change,))
    for layer in switchable_layers(model).values():
        choose(layer, *pair)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    for file in ("net.onnx", "net.pt2"):
        found = normpass.convert(model, tmp_path / file, torch.randn(2, 3, 8, 8), dynamic_batch=True)
        assert found.folded == 2 - left
        assert left or not any("norm" in name.lower() for name in found.operators)
        assert found.agreement.largest_error < 1e-4
    x = torch.randn(2, 3, 8, 8)
    assert largest_error(model.eval()(x), run_onnx(tmp_path / "net.onnx", x)) < 1e-4


class Left(nn.Module):
    """Norms that cannot be folded: read twice, of the batch, over the wrong axis, with a computed weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.twice = nn.BatchNorm2d(4)
        self.of_batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.fc = nn.Linear(4, 5)
        self.over_rows = nn.BatchNorm1d(16)
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.computed = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.conv(x)
        x = self.of_batch(F.conv2d(self.twice(x) + x, torch.eye(4)[..., None, None]))
        x = self.over_rows(self.fc(x.flatten(2).transpose(1, 2))).mean(1)
        return self.computed(F.linear(x, self.weight * x.mean()))


def test_what_cannot_be_folded_stays_with_its_reason():
    model = trained(Left(), 4, 3, 4, 4).eval()
    x = torch.randn(4, 3, 4, 4)
    exported = export_folded(model, Arguments((x,), {}), dynamic_batch=False)
    assert exported.folded.folded == ()
    reasons = list(exported.folded.left.values())
    assert [reason.split(" `")[0] for reason in reasons] == [
        "the result of",
        "it normalizes with the statistics of the batch",
        "it follows",
        "the weight of",
    ]
    assert largest_error(model(x), exported.program.module()(x)) < 1e-5


def test_weights_that_are_computed_from_constants_are_folded():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.BatchNorm1d(4)).double()
    trained(model.float(), 4, 2, 8).double().eval()
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    exported = export_folded(model, Arguments((x,), {}), dynamic_batch=False)
    assert len(exported.folded.folded) == 1
    assert largest_error(model(x), exported.program.module()(x)) < 1e-12


@pytest.mark.parametrize(
    "kind, dims", [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose3d, 3)]
)
def test_every_kind_of_convolution_is_folded(kind, dims):
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    model = trained(nn.Sequential(kind(4, 6, 2, groups=2, bias=dims == 1), norm(6)), 3, 4, *[4] * dims).double().eval()
    x = torch.randn(3, 4, *[4] * dims, dtype=torch.float64)
    exported = export_folded(model, Arguments((x,), {}), dynamic_batch=False)
    assert len(exported.folded.folded) == 1
    assert largest_error(model(x), exported.program.module()(x)) < 1e-12


def test_several_inputs_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, image, scale, index):
            return (self.norm(self.conv(image)) * scale[:, None, None, None]).flatten(1), index + 1

    inputs = {"image": torch.randn(2, 2, 4, 4), "scale": torch.randn(2), "index": torch.arange(2)}
    found = normpass.convert(Two(), tmp_path / "two.onnx", inputs, dynamic_batch=True)
    assert found.agreement.batch_sizes == (2, 4)
    with pytest.raises(normpass.InvalidInputError, match="no batch size in common"):
        normpass.convert(Two(), tmp_path / "n.onnx", inputs | {"scale": torch.randn(1)}, dynamic_batch=True)


# --- verification ---------------------------------------------------------------------------------


class Star(Net):
    def forward(self, *args, **others):
        return super().forward(sum(args) + sum(others.values()))


@pytest.mark.parametrize("inputs", [1, 2, {"a": 0, "b": 1}], ids=str)
def test_a_dynamic_batch_of_arguments_without_names(inputs, tmp_path):
    model, x = trained(Star(), 4, 3, 8, 8).eval(), torch.randn(3, 3, 8, 8)
    given = dict.fromkeys(inputs, x) if isinstance(inputs, dict) else (x,) * inputs
    found = normpass.convert(model, tmp_path / "n.onnx", given, dynamic_batch=True)
    assert found.dynamic_batch and found.agreement.batch_sizes == (3, 5)


def test_a_wrong_file_is_not_published(net, tmp_path, monkeypatch, capsys):
    (tmp_path / "net.onnx").write_text("old")
    monkeypatch.setattr(
        "normpass.conversion.fold._affine", lambda tensors, eps: (torch.rsqrt(tensors[3] + eps), -tensors[2])
    )
    monkeypatch.setattr("normpass.models.load", lambda spec: net)
    assert cli.main(f"convert m:m {tmp_path}/net.onnx --input 2x3x8x8 --report {tmp_path}/r.json".split()) == 1
    assert "differs by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "old"


def test_the_largest_error():
    assert largest_error(torch.tensor([4.0, 1.0]), torch.tensor([4.0, 2.0])) == 0.25
    assert largest_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0])) == float("inf")
    assert largest_error(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == 0
    assert largest_error(torch.zeros(2), torch.tensor([0.0, 0.5])) == 0.5
    assert largest_error(torch.zeros(0), torch.zeros(0)) == 0


def test_other_shapes_are_a_failure():
    calls = trial_calls(Arguments((torch.zeros(2, 3),), {}), dynamic_batch=True)
    with pytest.raises(normpass.ConversionError, match=r"\[\(2, 3\)\].*\[\(6,\)\]"):
        agreement.compare(lambda a: [a.args[0]], lambda a: [a.args[0].flatten()], calls, "test")


# --- bad input ------------------------------------------------------------------------------------

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


# --- from ONNX ------------------------------------------------------------------------------------


def conv_norm_graph(opset=17, op="Conv", training=False, shared=False, batch="N"):
    """Pad → conv → norm → Relu → Clip → (x + 3 clipped to 6 and divided by 6), and the conv's result if `shared`."""
    rng = torch.Generator().manual_seed(0)

    def constant(name, *shape):
        return numpy_helper.from_array((torch.rand(*shape, generator=rng) + 0.5).numpy(), name)

    def number(name, value):
        return numpy_helper.from_array(torch.tensor(value).numpy(), name)

    names = ["scale", "shift", "mean", "var"]
    constants = [constant("w", 4, 4, 1, 1), *(constant(name, 4) for name in names)]
    constants += [number("zero", 0.0), number("three", 3.0), number("six", 6.0), number("one", 1.0)]
    constants += [numpy_helper.from_array(torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).numpy(), "pads")]
    mode = {"training_mode": 1} if training else {}
    nodes = [
        helper.make_node("Pad", ["x", "pads", "zero"], ["p"]),
        helper.make_node(op, ["p", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *names], ["n", *["m", "v"] * training], name="norm", **mode),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Clip", ["r", "zero", "one"], ["l"]),
        helper.make_node("Add", ["l", "three"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "six"], ["k"]),
        helper.make_node("Div", ["k", "six"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 5, 5])]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 4, 7, 7]) for n in ("y", *["c"] * shared)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def with_input(proto, shape):
    """The graph for an input of another shape; its own 4 channels are 6 where they are left open."""
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    for tensor in proto.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(torch.rand(4, 6, 1, 1).numpy(), "w"))
    return proto


def with_custom_operator(proto):
    proto.graph.node[3].op_type, proto.graph.node[3].domain = "Twice", "mine"
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto


def from_onnx(tmp_path, proto):
    onnx.save(proto, tmp_path / "in.onnx")
    found = convert_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    return found, [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]


@pytest.mark.parametrize("opset, last", [(13, ["Add", "Clip", "Div"]), (17, ["HardSigmoid"])])
def test_from_onnx(tmp_path, opset, last):
    found, operators = from_onnx(tmp_path, conv_norm_graph(opset))
    assert operators == ["Conv", "Clip", *last]
    assert (found.folded, found.left, found.opset) == (1, {}, opset)
    assert found.agreement.batch_sizes == (2, 5)
    assert found.agreement.largest_error < 1e-5


def test_from_onnx_folds_transposed_convolutions(tmp_path):
    found, operators = from_onnx(tmp_path, conv_norm_graph(op="ConvTranspose", batch=3))
    assert operators[:2] == ["Pad", "ConvTranspose"]
    assert (found.folded, found.agreement.batch_sizes) == (1, (3, 3))


@pytest.mark.parametrize("options, why", [({"training": True}, "training mode"), ({"shared": True}, "read by others")])
def test_from_onnx_leaves_a_norm_with_its_reason(tmp_path, options, why):
    found, operators = from_onnx(tmp_path, conv_norm_graph(**options))
    assert "BatchNormalization" in operators
    assert found.folded == 0
    assert why in found.left["norm"]
