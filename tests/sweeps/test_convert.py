"""Networks trained for a few steps and converted, plain and optimized: ONNX without a norm after a convolution."""

import copy

import onnx
import pytest
import torch
from compiled import train
from networks import network

import normpass
from normpass.conversion.from_onnx import norms_left

pytestmark = pytest.mark.nets

NAMES = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 mobilenet_v3_small efficientnet_b0 "
    "efficientnet_v2_s googlenet shufflenet_v2_x1_0 mnasnet1_0 regnet_y_400mf vgg16_bn deeplabv3_resnet50 "
    "lraspp_mobilenet_v3_large r3d_18 darknet53 cspdarknet53 cspresnet50 seresnet50 dla34 hrnet_w18_small ghostnet_100 "
    "repvgg_a0 dpn68 res2net50_26w_4s selecsls42 tf_efficientnet_b0 gernet_s ecaresnet26t skresnet18 rexnet_100 "
    "tinynet_e lcnet_050 unet grouped decoder conv3d tiny_densenet"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_converts(name, tmp_path, results):
    entry = network(name)
    plain = entry.build()
    train(plain, plain, entry.make_inputs, torch.float32, steps=3)
    row = {"network": name}
    x = entry.make_inputs(0)
    for form, model in (("plain", plain), ("optimized", normpass.optimize(copy.deepcopy(plain)))):
        found = normpass.convert(model, tmp_path / f"{form}.onnx", tuple(t[:2] for t in x), dynamic_batch=True)
        after_conv = [why for _, why in norms_left(onnx.load(tmp_path / f"{form}.onnx")) if "no weight" not in why]
        row[form] = {
            "folded": found.folded,
            "left": len(found.left),
            "largest error": found.agreement.largest_error,
            "batch sizes": found.agreement.batch_sizes,
            "runner": found.agreement.runner,
        }
        print(f"{name:26} {form:9} folded {found.folded} left {len(found.left)} {found.agreement.largest_error:.1e}")
        assert after_conv == []
        assert found.agreement.largest_error < 1e-4
        assert found.agreement.batch_sizes == (2, 4)
    results.add("convert", row)
    assert row["plain"]["folded"] == row["optimized"]["folded"]
