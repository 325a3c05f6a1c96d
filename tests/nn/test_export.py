"""Models with Kalman and switchable norms in eval mode: folded into convolutions, exported, run by onnxruntime."""

import io
import itertools

import pytest
import torch
from switchable import choose
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normpass
from normpass.nn import KalmanNorm2d, SparseSwitchableNorm2d, as_plain_norms, freeze_decided
from normpass.nn.switchable import NORMS, switchable_layers

PAIRS = list(itertools.product(NORMS, repeat=2))


class Net(nn.Module):
    """A residual block and a linear head, with a norm of the given kind."""

    def __init__(self, norm, width=4):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def image(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(model):
    """With weights and running statistics of its own."""
    torch.manual_seed(0)
    for norm in model.modules():
        if hasattr(norm, "running_mean"):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    for seed in range(3):
        model(image(seed))
    return model.eval()


def run_by_onnxruntime(model, x):
    """The exported model's output and the types of its nodes, the functions it defines looked into."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    proto = onnx.load_from_string(file.getvalue())
    # standard operators alone
    assert not proto.functions and {node.domain for node in proto.graph.node} <= {""}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output), {node.op_type for node in proto.graph.node}


def assert_exports(model, x):
    output, types = run_by_onnxruntime(model, x)
    with torch.no_grad():
        assert (output - model(x)).abs().max() < 1e-4
    return types


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first, second", list(zip(PAIRS, PAIRS[::-1], strict=True))[:5])
def test_decided_switchable_models_export(first, second):
    model = Net(SparseSwitchableNorm2d)
    choose(model.norm1, *first)
    choose(model.norm2, *second)
    freeze_decided(model)
    assert_exports(trained(model), image())
    assert_exports(as_plain_norms(model), image())


@pytest.mark.filterwarnings("ignore")
def test_an_undecided_model_exports_too():
    model = trained(Net(SparseSwitchableNorm2d))
    for layer in switchable_layers(model).values():
        layer.radius.fill_(0.3)
    output, _ = run_by_onnxruntime(model, image())
    assert (output - model(image())).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [4, 16])  # of 16 channels, convolutions have kernels of ours
def test_kalman_models_export(width):
    model = trained(normpass.optimize(Net(nn.BatchNorm2d, width), changes=("kalman",)))
    types = assert_exports(model, image())
    assert "BatchNormalization" in types or "Conv" in types
    assert_exports(trained(Net(KalmanNorm2d)), image())


def assert_folds(model, x):
    """Each norm folds into its convolution by torch's own function, and nothing of it is left."""
    with torch.no_grad():
        expected = model(x)
        for index in (1, 2):
            conv, norm = getattr(model, f"conv{index}"), getattr(model, f"norm{index}")
            assert type(norm) is nn.BatchNorm2d
            setattr(model, f"conv{index}", fuse_conv_bn_eval(conv, norm))
            setattr(model, f"norm{index}", nn.Identity())
        assert (model(x) - expected).abs().max() < 1e-5


def test_a_kalman_model_folds():
    model = trained(normpass.optimize(Net(nn.BatchNorm2d), changes=("kalman",)))
    expected = model(image())
    plain = normpass.restore(model)
    torch.testing.assert_close(plain(image()), expected, rtol=0, atol=1e-6)
    assert_folds(plain, image())
    assert_folds(as_plain_norms(trained(Net(KalmanNorm2d))), image())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_name", [True, False])
def test_a_model_that_chose_batch_norm_folds_to_convolutions_alone(by_name):
    model = Net(nn.BatchNorm2d if by_name else SparseSwitchableNorm2d)
    if by_name:
        model = normpass.optimize(model, changes=("sparse_switchable",))
    for layer in switchable_layers(model).values():
        choose(layer, "batch", "batch")
    assert freeze_decided(model) == ["norm1", "norm2"]
    trained(model)
    expected = model(image())
    plain = normpass.restore(model) if by_name else as_plain_norms(model)
    torch.testing.assert_close(plain(image()), expected, rtol=0, atol=1e-6)
    assert_folds(plain, image())
    types = assert_exports(plain, image())
    assert not types & {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}


@pytest.mark.parametrize(
    "pair, kind",
    [
        (("batch", "batch"), nn.BatchNorm2d),
        (("instance", "instance"), nn.InstanceNorm2d),
        (("layer", "layer"), nn.GroupNorm),
        (("layer", "batch"), SparseSwitchableNorm2d),
    ],
)
def test_plain_norms_of_decided_layers(pair, kind):
    model = Net(SparseSwitchableNorm2d)
    choose(model.norm1, *pair)
    trained(model)
    expected = model(image())
    plain = as_plain_norms(model)
    assert type(plain.norm1) is kind and type(plain.norm2) is SparseSwitchableNorm2d
    assert model.norm1.chosen is None and plain.norm1.weight is model.norm1.weight
    torch.testing.assert_close(plain(image()), expected, rtol=0, atol=1e-6)
