"""What a report says of what ran: every line of it is true of the model as it was run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normpass
from normpass.passes import SerializeMinibatch

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


class Switched(nn.Module):
    """A norm under `no_grad`, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last, self.final = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.norm(self.conv(x)))
        return F.relu(self.final(self.last(x)))


class Uncaptured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


CALLS: list[int] = []


class Counting(nn.Module):
    """Says outside of itself how often it was called: what it holds is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(CALLS))
        return self.layers(x)


def with_group_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())


def test_what_is_listed_as_kept_is_part_of_what_is_kept() -> None:
    region = SerializeMinibatch(sub_batch=1)
    for model, options in ((network(), {}), (Switched(), {}), (with_group_norm(), {"serialize": region})):
        report = normpass.explain(model, X, **options)
        assert report.memory is not None
        assert sum(row.bytes for row in report.largest) == report.memory.kept_after, str(report)


def test_nothing_was_captured() -> None:
    text = str(normpass.explain(Uncaptured(), X))
    assert "1 norm; nothing was captured, so the plain model runs" in text and "give example inputs" not in text
    assert "kept for backward" in text


def test_without_inputs_it_is_unknown_what_is_done() -> None:
    text = str(normpass.explain(network()))
    assert "left alone" not in text and "unknown" in text and "1 norm; give example inputs" in text


def test_what_no_gradient_goes_through_keeps_nothing() -> None:
    for model, path, kept in ((Switched(), "norm", "z"), (network().requires_grad_(False), "1", None)):
        row = next(row for row in normpass.explain(model, X).rows if row.path == path)
        assert row.kept == kept and row.reason == "no gradient goes through it"


def test_that_nothing_is_saved_is_said() -> None:
    at_the_end = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    for model, saves in ((at_the_end, False), (network(), True)):
        text = str(normpass.explain(model, X))
        assert "1 of 1 norm rewritten, in 1 graph\n" in text
        assert ("this saves nothing: " in text) is not saves


def test_norms_without_a_kernel_are_rebuilt_and_not_fused() -> None:
    with normpass.kernels.disabled():
        (row,) = normpass.explain(with_group_norm(), X).rows
    assert (row.rewrite, row.reason) == ("rebuild_values", "rebuilt, not fused: there is no kernel for it on `cpu`")
    (row,) = normpass.explain(with_group_norm(), X).rows
    assert (row.rewrite, row.reason) == ("split_norm", "")


def test_a_budget_costs_one_forward_more() -> None:
    """That of the plan: the inputs are checked once, and a plan that was just made is not checked."""
    calls = []
    for options in ({}, {"memory_budget": 0.9}):
        CALLS.clear()
        report = normpass.explain(Counting(), X, **options)
        calls.append(len(CALLS))
    assert report.plan is not None
    assert calls[0] > 0 and calls[1] == calls[0] + 1
