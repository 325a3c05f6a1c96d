"""ONNX's own node cases of BatchNormalization, from the onnx package: our ops compute what that operator is defined to.

ONNX keeps the biased variance where PyTorch keeps the unbiased one, m/(m − 1) of it; so it is given scaled back.
"""

import importlib

import pytest
import torch

from normpass.ops import moments, norm_act, updated_running_stats

node = pytest.importorskip("onnx.backend.test.case.node", reason="needs onnx: the extra `convert` has it")
pytestmark = pytest.mark.usefixtures("kernels")

NAMES = [
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
]


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        importlib.import_module(f"{node.__name__}.batch_normalization")
        patch.setattr(node, "import_recursive", lambda package: None)  # which makes the cases of every operator
        found = {case.name: case for case in node.collect_testcases("BatchNormalization")}
    return {name: case for name, case in found.items() if "expanded" not in name}


def test_there_are_no_others(cases):
    assert sorted(cases) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_case(cases, name):
    case = cases[name]
    attributes = {a.name: a.f if a.type == a.FLOAT else a.i for a in case.model.graph.node[0].attribute}
    eps, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9)
    is_training = bool(attributes.get("training_mode", 0))
    assert is_training == name.endswith("training_mode")
    for inputs, outputs in case.data_sets:
        x, weight, bias, mean, var = (torch.from_numpy(array.copy()) for array in inputs)
        expected = [torch.from_numpy(array) for array in outputs]
        used = moments(x) if is_training else (mean, var)
        found = [norm_act(x, None, weight, bias, *used, eps, is_training)]
        if is_training:
            count = x.numel() // x.shape[1]
            biased = used[1] * (count - 1) / count
            found += updated_running_stats(mean, var, used[0], biased, 1 - momentum, count)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
