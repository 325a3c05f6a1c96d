"""The plain formulas as a device's kernels: what the CUDA kernels can do beyond the CPU's, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normpass.kernels import plain
from normpass.kernels.cuda.kernels import CudaKernels


class PlainKernels:
    """May add gradients as they read them and write masks; `calls`: names, and which arguments were there."""

    most_pieces = 64
    failures = ()
    depthwise = winograd = sample_norms = None

    def __init__(self) -> None:
        self.adds_gradients = self.normalizes_residuals = True
        self.masks = CudaKernels.masks
        self.calls: list[tuple[str, list[bool]]] = []

    @property
    def parts(self) -> list[int]:
        """In how many parts each backward of a norm was given its gradient."""
        return [2 if any(there[16:17]) else 1 for name, there in self.calls if name == "norm_act_backward"]

    def masked(self, name: str) -> int:
        """How many calls of `name` wrote or read a mask."""
        position = {"norm_act": 11, "norm_act_backward": 17}[name]
        return sum(any(there[position : position + 1]) for called, there in self.calls if called == name)

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable:
        def run(*args: Any) -> None:
            self.calls.append((name, [arg is not None for arg in args]))
            with torch.no_grad():
                getattr(plain, name)(*args)

        return run
