"""The networks of the sweep: torchvision's, timm's and small ones, each with inputs small enough for fp64.

`NETWORKS` is the sweep, in the order of its table, and `network(name)` finds one. A network is built under a
fixed seed, without weights from the net. Then its norms get gammas and betas as of a trained model: gamma is
multiplied by 1 + 0.1 n and, for one channel in sixteen, by -1, beta is moved by 0.1 n, with n standard
normal. So a gamma that starts at zero, as the last one of a residual block often does, stays zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import small
import timm
import torch
import torchvision
from torch import Tensor, nn

SEED = 0
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Network:
    """One network and what it is called with."""

    name: str
    source: str
    """Where the model comes from: torchvision, timm, or `small` for small.py."""
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    """The arguments of forward in step k, fp32."""

    def build(self) -> nn.Module:
        """The model in train mode, the same at every call."""
        torch.manual_seed(SEED)
        model = self.make()
        scatter_norms(model, torch.Generator().manual_seed(SEED))
        return model

    def make_inputs(self, step: int) -> tuple:
        """The arguments of forward in step `step`, the same at every call."""
        return self.inputs(step)


@torch.no_grad()
def scatter_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Gammas and betas as of a trained model; a gamma of zero stays zero."""
    for module in model.modules():
        if not isinstance(module, NORMS):
            continue
        if module.weight is not None:
            module.weight *= 1 + 0.1 * torch.randn(module.weight.shape, generator=generator)
            module.weight[torch.rand(module.weight.shape, generator=generator) < 1 / 16] *= -1
        if module.bias is not None:
            module.bias += 0.1 * torch.randn(module.bias.shape, generator=generator)


def random_inputs(*shape: int) -> Callable[[int], tuple]:
    """One standard normal tensor, another one at each step."""

    def inputs(step: int) -> tuple[Tensor]:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(step)),)

    return inputs


def detection_inputs(images: int, size: int, classes: int) -> Callable[[int], tuple]:
    """A list of images, and two boxes with labels for each."""

    def inputs(step: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(step)
        pictures = [torch.rand(3, size, size, generator=generator) for _ in range(images)]
        targets = []
        for _ in range(images):
            corners = torch.rand(2, 2, generator=generator) * size / 2
            extents = size / 4 + torch.rand(2, 2, generator=generator) * size / 4
            labels = torch.randint(1, classes, (2,), generator=generator)
            targets.append({"boxes": torch.cat([corners, corners + extents], 1), "labels": labels})
        return pictures, targets

    return inputs


def _torchvision(name: str, size: int, batch: int = 4, **options) -> Network:
    def make() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, **options)

    return Network(name, "torchvision", make, random_inputs(batch, 3, size, size))


def _timm(name: str, size: int, batch: int = 4, **options) -> Network:
    def make() -> nn.Module:
        return timm.create_model(name, pretrained=False, **options)

    return Network(name, "timm", make, random_inputs(batch, 3, size, size))


def _small(make: Callable[[], nn.Module], *shape: int, name: str | None = None) -> Network:
    return Network(name or make.__name__.lower(), "small", make, random_inputs(*shape))


def _inception_v3() -> nn.Module:
    """With a 1x1 kernel where the auxiliary head has 5x5, which would ask for inputs of 299 pixels."""
    model = torchvision.models.inception_v3(weights=None, init_weights=False)
    model.AuxLogits.conv1 = torchvision.models.inception.BasicConv2d(128, 768, kernel_size=1)
    return model


def _vgg16_bn() -> nn.Module:
    """The convolutions of vgg16_bn under a small head: its own has 124 million parameters and no norm."""
    features = torchvision.models.vgg16_bn(weights=None, num_classes=1, init_weights=False).features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10))


def _segmentation(name: str, size: int) -> Network:
    def make() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)

    return Network(name, "torchvision", make, random_inputs(4, 3, size, size))


def _faster_rcnn() -> nn.Module:
    """With BatchNorm (there are no weights to freeze), little images, and all boxes kept in eval mode."""
    return torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=4,
        min_size=64,
        max_size=64,
        rpn_pre_nms_top_n_train=60,
        rpn_post_nms_top_n_train=30,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=10,
        box_score_thresh=0.0,
        box_detections_per_img=8,
    )


TORCHVISION = (
    _torchvision("resnet18", 64, zero_init_residual=True),
    _torchvision("resnet50", 64),
    _torchvision("resnext50_32x4d", 64),
    _torchvision("wide_resnet50_2", 32, zero_init_residual=True),
    _torchvision("densenet121", 64),
    _torchvision("mobilenet_v2", 64),
    _torchvision("mobilenet_v3_small", 64),
    _torchvision("efficientnet_b0", 64),
    _torchvision("efficientnet_v2_s", 64, batch=2),
    _torchvision("googlenet", 64, init_weights=False),
    Network("inception_v3", "torchvision", _inception_v3, random_inputs(4, 3, 107, 107)),
    _torchvision("shufflenet_v2_x1_0", 64),
    _torchvision("mnasnet1_0", 64),
    _torchvision("regnet_y_400mf", 64),
    Network("vgg16_bn", "torchvision", _vgg16_bn, random_inputs(4, 3, 32, 32)),
    _segmentation("deeplabv3_resnet50", 32),
    _segmentation("lraspp_mobilenet_v3_large", 64),
    Network(
        "r3d_18",
        "torchvision",
        lambda: torchvision.models.get_model("r3d_18", weights=None),
        random_inputs(2, 3, 8, 32, 32),
    ),
    Network("fasterrcnn_resnet50_fpn", "torchvision", _faster_rcnn, detection_inputs(2, 64, 4)),
)

TIMM = (
    _timm("darknet53", 64, batch=2),
    _timm("cspdarknet53", 64),
    _timm("cspresnet50", 64),
    _timm("seresnet50", 64, batch=2),
    _timm("resnetv2_50", 64),
    _timm("dla34", 64),
    _timm("hrnet_w18_small", 64),
    _timm("ghostnet_100", 64),
    _timm("repvgg_a0", 64),
    _timm("dpn68", 64),
    _timm("res2net50_26w_4s", 64, batch=2),
    _timm("selecsls42", 64),
    _timm("hardcorenas_a", 64),
    _timm("mixnet_s", 64),
    _timm("tf_efficientnet_b0", 64),
    _timm("gernet_s", 64),
    _timm("resnest14d", 64),
    _timm("ecaresnet26t", 64),
    _timm("skresnet18", 64, batch=8),
    _timm("levit_128s", 224, batch=2),
    _timm("xception41", 64),
    _timm("rexnet_100", 64),
    _timm("mobileone_s0", 64, batch=8),
    _timm("fastvit_t8", 64),
    _timm("tinynet_e", 64),
    _timm("lcnet_050", 64),
    _timm("ese_vovnet19b_dw", 64),
    _timm("convnext_atto", 64),
    _timm("coat_lite_tiny", 64, img_size=64),
)

OTHER_NORMS = (
    _timm("resnet50_gn", 64, batch=2),
    _timm("resnetv2_50d_gn", 64, batch=2),
    _timm("convnextv2_atto", 64, batch=2),
    _timm("convnext_pico_ols", 64, batch=2),
    _timm("edgenext_xx_small", 64, batch=2),
    _timm("poolformer_s12", 64, batch=2),
    _timm("inception_next_atto", 64, batch=2),
    _timm("convformer_s18", 64, batch=2),
    _timm("mambaout_femto", 64, batch=2),
    _timm("focalnet_tiny_srf", 64, batch=2),
    _timm("pvt_v2_b0", 64, batch=2),
    _timm("rdnet_tiny", 64, batch=2),
)
"""GroupNorm and LayerNorm, in every layout"""


def _tiny_densenet() -> nn.Module:
    """torchvision's DenseNet with two short blocks."""
    return torchvision.models.DenseNet(8, (3, 3), num_init_features=16, bn_size=2, num_classes=10)


SMALL = (
    _small(small.UNet, 2, 3, 16, 16),
    _small(small.conv1d, 4, 2, 32),
    _small(small.mlp, 8, 12),
    _small(small.decoder, 4, 16, 1, 1),
    _small(small.EveryActivation, 3, 3, 8, 8, name="every_activation"),
    _small(small.Functional, 3, 8, 8, 8),
    _small(small.grouped, 3, 4, 16, 16),
    _small(small.ControlFlow, 3, 3, 8, 8, name="control_flow"),
    _small(small.PreActivation, 3, 3, 8, 8, name="pre_activation"),
    _small(small.Shared, 3, 3, 8, 8),
    _small(small.frozen, 3, 3, 8, 8),
    _small(small.group_norms, 3, 3, 8, 8),
    _small(small.conv3d, 2, 1, 4, 8, 8),
)

TINY_DENSENET = Network("tiny_densenet", "torchvision", _tiny_densenet, random_inputs(2, 3, 32, 32))

NETWORKS = (*TORCHVISION, *TIMM, *OTHER_NORMS, TINY_DENSENET, *SMALL)


def _channels_last(entry: Network) -> Network:
    """The same with weights and images in channels_last, where the CPU has other kernels."""

    def make() -> nn.Module:
        return entry.make().to(memory_format=torch.channels_last)

    def inputs(step: int) -> tuple:
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in entry.inputs(step))

    return Network(f"{entry.name} (channels_last)", entry.source, make, inputs)


_LAST = (
    "resnet50 densenet121 mobilenet_v2 mobilenet_v3_small efficientnet_b0 mnasnet1_0 shufflenet_v2_x1_0 ghostnet_100 "
    "hardcorenas_a mixnet_s tf_efficientnet_b0 rexnet_100 tinynet_e lcnet_050 xception41 ese_vovnet19b_dw "
    "convnext_atto"
).split()
CHANNELS_LAST = tuple(_channels_last(entry) for entry in NETWORKS if entry.name in _LAST)


def network(name: str) -> Network:
    """The network of that name."""
    return next(entry for entry in NETWORKS if entry.name == name)
