"""Conversion from ONNX: what is folded, what is left and why."""

import onnx
import pytest
from onnx_files import conv_norm_graph

from normpass.conversion.from_onnx import convert_onnx


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
