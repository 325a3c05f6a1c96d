"""Conversion: what is folded, what the files compute, and that a wrong one is not published."""

import os
import stat

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx_files import run_onnx
from safetensors.torch import load_file
from switchable import choose
from torch import nn

import normpass
from normpass.cli import main as cli
from normpass.conversion import agreement
from normpass.conversion.agreement import largest_error
from normpass.conversion.convert import trial_calls
from normpass.conversion.export import Arguments, export_folded
from normpass.nn.switchable import switchable_layers


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


class WrittenOut(nn.Module):
    def forward(self, y):
        return (y * torch.sigmoid(y)).clamp(-1, 1) - torch.relu(y) ** 2


def test_activations_end_as_standard_operators(tmp_path):
    acts = [
        nn.PReLU(4),
        nn.Softsign(),
        nn.LogSigmoid(),
        nn.Hardshrink(),
        nn.Softshrink(),
        nn.Tanhshrink(),
        WrittenOut(),
    ]
    model = nn.Sequential(*[layer for act in acts for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)])
    x = torch.randn(2, 4, 8, 8)
    found = normpass.convert(normpass.optimize(model), tmp_path / "model.onnx", x)
    assert (found.folded, len(found.left)) == (7, 0) and found.agreement.largest_error < 1e-5
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}


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
