"""ONNX files: small graphs, and what a file computes."""

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


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
