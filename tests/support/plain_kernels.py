"""The plain formulas as a device's kernels: what the CUDA kernels can do beyond the CPU's, on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from normpass import kernels
from normpass.kernels import plain
from normpass.kernels.cuda.kernels import CudaKernels


class PlainKernels:
    """May add gradients as they read them and write masks; `calls`: names, and the arguments that were there."""

    most_pieces = 64
    failures = ()
    depthwise = winograd = sample_norms = None

    def __init__(self) -> None:
        self.adds_gradients = self.normalizes_residuals = True
        self.takes_slopes = False
        self.masks = CudaKernels.masks
        self.calls: list[tuple[str, set[str]]] = []

    @property
    def parts(self) -> list[int]:
        """In how many parts each backward of a norm was given its gradient."""
        return [2 if "other" in there else 1 for name, there in self.calls if name == "norm_act_backward"]

    def masked(self, name: str) -> int:
        """How many calls of `name` wrote or read a mask."""
        return sum("mask" in there for called, there in self.calls if called == name)

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable:
        function = getattr(plain, name)

        def run(*args: Any) -> None:
            given = inspect.signature(function).bind(*args).arguments
            self.calls.append((name, {argument for argument, value in given.items() if value is not None}))
            with torch.no_grad():
                function(*args)

        return run


def install(monkeypatch: pytest.MonkeyPatch) -> PlainKernels:
    """New ones in the place of the CPU's."""
    found = PlainKernels()
    monkeypatch.setitem(kernels._loaded, "cpu", (found, "plain"))
    return found
