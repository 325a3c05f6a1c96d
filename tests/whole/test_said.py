"""A call that runs as the plain model says so once, in the log, and `explain` says it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode

import normpass

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def hook_for_all() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


class ByExec(nn.Module):
    """Forward that Dynamo cannot capture anything of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


REASONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager]]] = {
    "hooks are registered for all modules": (network, hook_for_all),
    "a torch mode is active": (network, Mode),
    "saved-tensor hooks of somebody else are active": (network, save_on_cpu),
    "TorchDynamo is switched off": (network, lambda: torch.compiler.set_stance("force_eager")),
    "TorchDynamo captures nothing of its forward": (ByExec, nullcontext),
}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name.startswith("normpass") and r.levelno >= logging.WARNING]
    caplog.clear()
    return found


@pytest.mark.parametrize("reason", REASONS)
def test_it_is_said_once(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    make, around = REASONS[reason]
    optimized = normpass.optimize(make())
    with around():
        optimized(X), optimized(X)
        (line,) = lines(caplog)
        assert f"{type(optimized).__name__} runs as the plain model: {reason}" in line
        report = normpass.explain(make(), X)
    assert not lines(caplog)
    assert any(reason in failure for failure in report.failures) and reason in str(report).replace("\n", " ")
    (row,) = report.rows
    assert row.rewrite is None and reason in row.reason


def test_nothing_is_said_where_it_is_captured_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    optimized = normpass.optimize(network())
    optimized(X)
    with pytest.raises(RuntimeError, match="channels"):
        optimized(X[:, :2])
    optimized(X)
    assert not lines(caplog)


def test_what_cannot_be_captured_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Dynamo's own: Python runs the frame."""
    from torch._dynamo import convert_frame

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(convert_frame, "compile_frame" if hasattr(convert_frame, "compile_frame") else "_compile", fail)
    optimized = normpass.optimize(network())
    optimized(X), optimized(X)
    found = lines(caplog)
    assert any("is not captured: " in line and "a bug" in line for line in found), found
    assert len(found) == len(set(found))
