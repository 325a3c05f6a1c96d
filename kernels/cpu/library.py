"""The CPU's kernels: shared libraries of plain C functions, built from `cpu/*.cpp` when the package is installed.

There is one library for each instruction set; the best that this processor runs is loaded, the first time that it is
asked for. OpenMP is the runtime that torch has loaded already, and the thread count torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from normpass.kernels import is_disabled
from normpass.kernels.contract import ACTIVATIONS, Layout, Norm, Running
from normpass.kernels.cpu.depthwise import CpuDepthwise
from normpass.kernels.cpu.sample_norms import CpuSampleNorms
from normpass.kernels.cpu.winograd import CpuWinograd

INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}
"""By what torch says of the processor: the libraries that run on it, the best first. Others have `baseline`."""
WITHOUT_FMA = frozenset({"baseline"})

FEWEST_PER_THREAD = 16384
"""Values below which another thread costs more than it saves."""

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

_POINTER, _LONG, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_ACTIVATION = (_INT, _DOUBLE, _DOUBLE)
_END = (_LONG, _LONG, _LONG, _INT, _INT)  # layout, dtype, threads
_SIGNATURES = {
    "moments": (*[_POINTER] * 3, *_END),
    "norm_act": (*[_POINTER] * 8, _DOUBLE, *_ACTIVATION, *_END),
    "norm_act_backward": (*[_POINTER] * 13, _DOUBLE, _INT, *_ACTIVATION, *_END),
    "cat_norm_act": (*[_POINTER] * 3, _LONG, *[_POINTER] * 4, _DOUBLE, *_ACTIVATION, *_END),
    "cat_norm_act_backward": (*[_POINTER] * 8, _LONG, *[_POINTER] * 4, _DOUBLE, *_ACTIVATION, *_END),
    "add_statistics_gradient": (*[_POINTER] * 4, *_END),
    "inplace_abn_backward": (*[_POINTER] * 8, _DOUBLE, _INT, *_ACTIVATION, *_END),
    "running_stats": (*[_POINTER] * 4, _DOUBLE, _LONG, _LONG, _INT),
    "depthwise_conv2d": (*[_POINTER] * 8, _DOUBLE, *_ACTIVATION, *[_LONG] * 12, *[_INT] * 3),
    "depthwise_weight_gradient": (*[_POINTER] * 3, *[_LONG] * 12, *[_INT] * 3),
    "norm_act_depthwise_backward": (*[_POINTER] * 11, _DOUBLE, _INT, *_ACTIVATION, *[_LONG] * 12, *[_INT] * 2),
    "group_norm_act": (*[_POINTER] * 8, _DOUBLE, *_ACTIVATION, _INT, *[_LONG] * 4, *[_INT] * 3),
    "group_norm_act_backward": (*[_POINTER] * 13, _DOUBLE, *_ACTIVATION, *[_LONG] * 4, *[_INT] * 3),
    "row_norm_act": (*[_POINTER] * 6, _DOUBLE, *_ACTIVATION, _INT, *[_LONG] * 2, *[_INT] * 3),
    "row_norm_act_backward": (*[_POINTER] * 9, _DOUBLE, *_ACTIVATION, *[_LONG] * 2, *[_INT] * 3),
    "winograd_conv2d": (*[_POINTER] * 5, *[_LONG] * 10, *[_INT] * 5),
    "winograd_weight_gradient": (*[_POINTER] * 3, *[_LONG] * 9, *[_INT] * 4),
}


class CpuKernels:
    """The `Kernels` of the CPU, from the shared library at `path`."""

    most_pieces = 1 << 31
    adds_gradients = False
    takes_slopes = True
    normalizes_residuals = False
    masks: frozenset[str] = frozenset()  # to read the residual again costs little here: not measured to pay
    failures = ()  # they are compiled when the package is installed

    def __init__(self, path: Path):
        self.path = path
        library = ctypes.CDLL(str(path))
        _check_activations(library)
        self._moments = _function(library, "moments")
        self._norm_act = _function(library, "norm_act")
        self._norm_act_backward = _function(library, "norm_act_backward")
        self._cat_norm_act = _function(library, "cat_norm_act")
        self._cat_norm_act_backward = _function(library, "cat_norm_act_backward")
        self._add_statistics_gradient = _function(library, "add_statistics_gradient")
        self._inplace_abn_backward = _function(library, "inplace_abn_backward")
        self._running_stats = _function(library, "running_stats")
        self.depthwise = CpuDepthwise(
            _function(library, "depthwise_conv2d"),
            _function(library, "depthwise_weight_gradient"),
            _function(library, "norm_act_depthwise_backward"),
            _DTYPES,
            _norm,
            _threads,
        )
        self.sample_norms = CpuSampleNorms(
            _function(library, "group_norm_act"),
            _function(library, "group_norm_act_backward"),
            _function(library, "row_norm_act"),
            _function(library, "row_norm_act_backward"),
            _DTYPES,
            _norm,
            _threads,
        )
        convolve = _function(library, "winograd_conv2d")
        weight_gradient = _function(library, "winograd_weight_gradient")
        has_fma = path.stem.removeprefix("_") not in WITHOUT_FMA
        self._winograd = CpuWinograd(convolve, weight_gradient, _DTYPES, has_fma)

    @property
    def winograd(self) -> CpuWinograd | None:
        return None if is_disabled("winograd") else self._winograd

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in _DTYPES

    def moments(self, mean: Tensor, var: Tensor, x: Tensor, layout: Layout, running: Running | None = None) -> None:
        self._moments(mean.data_ptr(), var.data_ptr(), x.data_ptr(), *_end(x, layout))
        if running is not None:
            self.running_stats(running, mean, var, layout.outer * layout.inner)

    def norm_act(
        self,
        z: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        layout: Layout,
    ) -> None:
        self._norm_act(
            z.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.slope),
            *_norm(norm),
            *_end(x, layout),
        )

    def norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
        other: Tensor | None = None,
        mask: Tensor | None = None,
        dslope: Tensor | None = None,
    ) -> None:
        assert other is None and mask is None
        *values, code, first, second = _norm(norm)
        self._norm_act_backward(
            _pointer(dx),
            _pointer(dresidual),
            _pointer(dweight),
            _pointer(dbias),
            _pointer(dslope),
            grad.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.slope),
            *values,
            batch_statistics,
            code,
            first,
            second,
            *_end(x, layout),
        )

    def cat_norm_act(
        self,
        z: Tensor,
        xs: Sequence[Tensor],
        norm: Norm,
        layout: Layout,
    ) -> None:
        self._cat_norm_act(
            z.data_ptr(),
            _pointers(xs),
            _channels(xs),
            len(xs),
            *_norm(norm),
            *_end(z, layout),
        )

    def cat_norm_act_backward(
        self,
        dxs: Sequence[Tensor | None],
        adds: Sequence[bool],
        totals: Sequence[Tensor | None],
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        xs: Sequence[Tensor],
        norm: Norm,
        layout: Layout,
    ) -> None:
        self._cat_norm_act_backward(
            _pointers(dxs),
            _pointers(totals),
            bytes(adds),
            _pointer(dweight),
            _pointer(dbias),
            grad.data_ptr(),
            _pointers(xs),
            _channels(xs),
            len(xs),
            *_norm(norm),
            *_end(grad, layout),
        )

    def add_statistics_gradient(self, dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, layout: Layout) -> None:
        self._add_statistics_gradient(dx.data_ptr(), x.data_ptr(), mean.data_ptr(), total.data_ptr(), *_end(x, layout))

    def inplace_abn_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        z: Tensor,
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
    ) -> None:
        self._inplace_abn_backward(
            _pointer(dx),
            _pointer(dweight),
            _pointer(dbias),
            grad.data_ptr(),
            z.data_ptr(),
            _pointer(norm.weight),
            _pointer(norm.bias),
            norm.var.data_ptr(),
            norm.eps,
            batch_statistics,
            *_activation(norm.activation, norm.activation_args),
            *_end(z, layout),
        )

    def running_stats(self, running: Running, mean: Tensor, var: Tensor, count: int) -> None:
        self._running_stats(
            running.mean.data_ptr(),
            running.var.data_ptr(),
            mean.data_ptr(),
            var.data_ptr(),
            running.momentum,
            count,
            mean.numel(),
            _DTYPES[mean.dtype],
        )


def load() -> tuple[CpuKernels | None, str]:
    """The kernels for this processor, or None; and in words which they are, or why there are none."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = INSTRUCTION_SETS.get(capability, ("baseline",))
    failure = "not built when normpass was installed: install a C++ compiler with OpenMP (g++), then normpass again"
    count = torch.get_num_threads()
    for name in names:
        path = Path(__file__).with_name(f"_{name}.so")
        if not path.exists():
            continue
        try:
            return CpuKernels(path), f"C++, {name}, {count} thread{'' if count == 1 else 's'}"
        except (OSError, AttributeError) as error:
            failure = f"{path.name} cannot be loaded ({error}): install normpass again"
    return None, failure


def _check_activations(library: ctypes.CDLL) -> None:
    """A library of another version would run other functions under the same codes, or none."""
    names = library.normpass_activations
    names.restype = ctypes.c_char_p
    found = names().decode().split()
    if found != ACTIVATIONS:
        raise OSError(f"it was built for the activations {' '.join(found)}")


def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(library, f"normpass_{name}")
    function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
    return cast("Callable[..., int]", function)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (_POINTER * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _channels(xs: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (_LONG * len(xs))(*[x.shape[1] for x in xs])


NormArguments = tuple["int | None", "int | None", int, int, float, int, float, float]
"""Addresses of weight, bias, mean and var, eps, the activation's code and two arguments."""


def _norm(norm: Norm) -> NormArguments:
    weight, bias, mean, var, eps, activation, args, _ = norm
    assert mean is not None  # it would be read at address 0
    scale, shift = None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr()
    return scale, shift, mean.data_ptr(), var.data_ptr(), eps, *_activation(activation, args)


def _activation(name: str, args: Sequence[float]) -> tuple[int, float, float]:
    padded = (*args, 0.0, 0.0)
    return _CODES[name], padded[0], padded[1]


def _end(x: Tensor, layout: Layout) -> tuple[int, int, int, int, int]:
    return *layout, _DTYPES[x.dtype], _threads(x)


def _threads(x: Tensor) -> int:
    useful = x.numel() // FEWEST_PER_THREAD
    return 1 if useful < 2 else min(torch.get_num_threads(), useful)
