"""The GPU's kernels, loaded; where one cannot be compiled, loaded or launched, the plain formulas run in its place.

What a call writes it writes whole: the plain formulas take the same inputs, which no kernel writes to, and write every
result. Each failure is kept for `normpass kernels` and warned about once.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from normpass.kernels import plain, plain_sample_norms
from normpass.kernels.contract import SampleNorms
from normpass.kernels.cuda.calls import CudaError
from normpass.kernels.cuda.compiler import nvrtc_version
from normpass.kernels.cuda.device import Gpus
from normpass.kernels.cuda.kernels import CudaKernels

OPS = (
    *("moments", "running_stats", "norm_act", "norm_act_backward", "cat_norm_act", "cat_norm_act_backward"),
    *("add_statistics_gradient", "inplace_abn_backward"),
)
OF_SAMPLES = ("group_norm_act", "group_norm_act_backward", "row_norm_act", "row_norm_act_backward")


class GuardedKernels:
    """The `Kernels` and the `SampleNorms` of CUDA devices."""

    depthwise = None  # cuDNN's will do
    winograd = None  # cuDNN has its own

    def __init__(self, kernels: CudaKernels) -> None:
        self._run_by = {name: getattr(kernels, name) for name in OPS}
        self._run_by |= {name: getattr(kernels.sample_norms, name) for name in OF_SAMPLES}
        self._failures: dict[str, None] = {}
        self.most_pieces, self.adds_gradients, self.masks = kernels.most_pieces, kernels.adds_gradients, kernels.masks
        self.takes_slopes = kernels.takes_slopes
        self.normalizes_residuals, self.supports = kernels.normalizes_residuals, kernels.supports

    @property
    def failures(self) -> Sequence[str]:
        """What runs as plain torch, and why."""
        return list(self._failures)

    def moments(self, *args: Any) -> None:
        self._run("moments", args)

    def norm_act(self, *args: Any) -> None:
        self._run("norm_act", args)

    def norm_act_backward(self, *args: Any) -> None:
        self._run("norm_act_backward", args)

    def cat_norm_act(self, *args: Any) -> None:
        self._run("cat_norm_act", args)

    def cat_norm_act_backward(self, *args: Any) -> None:
        self._run("cat_norm_act_backward", args)

    def add_statistics_gradient(self, *args: Any) -> None:
        self._run("add_statistics_gradient", args)

    def inplace_abn_backward(self, *args: Any) -> None:
        self._run("inplace_abn_backward", args)

    def running_stats(self, *args: Any) -> None:
        self._run("running_stats", args)

    @property
    def sample_norms(self) -> SampleNorms:
        return self

    def group_norm_act(self, *args: Any) -> None:
        self._run("group_norm_act", args)

    def group_norm_act_backward(self, *args: Any) -> None:
        self._run("group_norm_act_backward", args)

    def row_norm_act(self, *args: Any) -> None:
        self._run("row_norm_act", args)

    def row_norm_act_backward(self, *args: Any) -> None:
        self._run("row_norm_act_backward", args)

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        try:
            self._run_by[name](*args)
        except CudaError as error:
            reason = str(error)
        else:
            return
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            getattr(plain_sample_norms if name in OF_SAMPLES else plain, name)(*args)
        failure = f"{name} runs as plain torch, slower and in more memory: {reason}"
        if failure not in self._failures:
            self._failures[failure] = None
            warnings.warn(f"normpass: {failure}", RuntimeWarning, stacklevel=2)


def load() -> tuple[GuardedKernels | None, str]:
    """The kernels for the GPUs, or None; and in words how they are made, or why there are none and what to do."""
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA; install one that is, from pytorch.org"
    if not torch.cuda.is_available():
        return None, "torch sees no GPU: torch.cuda.is_available() is False"
    gpus = Gpus()
    try:
        target = gpus.prepare(torch.cuda.current_device()).target
        major, minor = nvrtc_version()
    except Exception as error:  # whatever it is: training goes on without kernels
        return None, f"{error}; {_advice(str(error))}"
    return GuardedKernels(CudaKernels(gpus)), f"CUDA C++ compiled at run time by NVRTC {major}.{minor} for {target}"


def _advice(reason: str) -> str:
    """What is most likely to help."""
    wanted = str(torch.version.cuda).partition(".")[0]
    try:
        found = f"for CUDA {importlib.import_module('cuda.bindings').__version__.partition('.')[0]}"
    except Exception:  # an import may fail in any way
        found = "missing"
    if found != f"for CUDA {wanted}":
        return f"cuda-bindings is {found} and torch for CUDA {wanted}: pip install 'cuda-bindings=={wanted}.*'"
    if "nvrtc" in reason:
        return "is NVRTC whole? pip install --force-reinstall nvidia-cuda-nvrtc"
    return "the references run"
