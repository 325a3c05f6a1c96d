"""What a report says of what ran: every line of it is true of the model as it was run."""

from __future__ import annotations

import torch
from torch import nn

import normpass

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def test_a_model_that_cannot_be_measured_is_explained_all_the_same() -> None:
    cases = {
        "is the model frozen?": (network().requires_grad_(False), X),
        "only `cpu` and `cuda` are measured": (network().to("meta"), X.to("meta")),
    }
    for why, (model, x) in cases.items():
        report = normpass.explain(model, x)
        assert report.memory is None and len(report.rows) == 1
        assert why in report.unmeasured and f"are not measured: {report.unmeasured}" in str(report).replace("\n", " ")
