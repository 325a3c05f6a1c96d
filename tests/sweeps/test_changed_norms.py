"""ResNet-18 and MobileNetV2 with Kalman and switchable norms: 20 steps in float32 and under bfloat16 autocast.

On images of 40×40, whose last maps are 2×2: with maps of 1×1 and micro-batches of 2 samples even batch norm
overflows, since in bfloat16 the two values of a channel are often equal.
"""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v2, resnet18

import normpass
from normpass.demo import digits
from normpass.nn import RadiusSchedule, parameter_groups
from normpass.nn.kalman import KALMAN_NORMS
from normpass.nn.switchable import switchable_layers
from normpass.passes import Kalman

pytestmark = pytest.mark.nets

STEPS = 20
CHANGES = {
    "kalman": Kalman(),
    "kalman, sampled, learned, two micro-batches": Kalman(transition="sampled", learn_weight=True, micro_batches=2),
    "kalman, behind the norm": Kalman(state="output"),
    "sparse_switchable": "sparse_switchable",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [resnet18, mobilenet_v2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("change", CHANGES)
def test_trains_without_nan(change, build, dtype, results):
    torch.manual_seed(0)
    model = normpass.optimize(build(num_classes=10), changes=(CHANGES[change],))
    assert any(isinstance(m, KALMAN_NORMS) for m in model.modules()) or switchable_layers(model)
    optimizer = torch.optim.SGD(parameter_groups_of(model), momentum=0.9)
    schedule = RadiusSchedule(model, STEPS)
    losses = []
    for _, (images, labels) in zip(range(STEPS), digits.batches(4, 40), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert len(losses) == STEPS and all(p.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())
    assert all(layer.chosen is not None for layer in switchable_layers(model).values())
    model.eval()
    assert model(images).isfinite().all()
    results.add(
        "changed_norms",
        {
            "model": build.__name__,
            "change": change,
            "dtype": str(dtype),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        },
    )


def parameter_groups_of(model):
    return [group for group in parameter_groups(model, 0.01, weight_decay=1e-4) if group["params"]]
