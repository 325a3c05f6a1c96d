"""The CPU's kernels of norms whose statistics are a sample's own, from the same library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from normpass.kernels.contract import Groups, InputNorm, Rows


class CpuSampleNorms:
    """The `SampleNorms` of the CPU."""

    def __init__(
        self,
        group_norm_act: Callable[..., int],
        group_norm_act_backward: Callable[..., int],
        row_norm_act: Callable[..., int],
        row_norm_act_backward: Callable[..., int],
        dtypes: Mapping[torch.dtype, int],
        activation: Callable[..., tuple[int, float, float]],
        threads: Callable[[Tensor], int],
    ):
        self._group_norm_act, self._group_norm_act_backward = group_norm_act, group_norm_act_backward
        self._row_norm_act, self._row_norm_act_backward = row_norm_act, row_norm_act_backward
        self._dtypes, self._activation, self._threads = dtypes, activation, threads

    def group_norm_act(
        self, z: Tensor, x: Tensor, residual: Tensor | None, norm: InputNorm, is_given: bool, groups: Groups
    ) -> None:
        self._group_norm_act(
            z.data_ptr(),
            norm.mean.data_ptr(),
            norm.var.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.weight),
            _pointer(norm.bias),
            norm.eps,
            *self._activation(norm.activation, norm.activation_args),
            is_given,
            *groups,
            *self._end(x),
        )

    def group_norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm,
        groups: Groups,
    ) -> None:
        self._group_norm_act_backward(
            _pointer(dx),
            _pointer(dresidual),
            _pointer(dweight),
            _pointer(dbias),
            grad.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.weight),
            _pointer(norm.bias),
            norm.mean.data_ptr(),
            norm.var.data_ptr(),
            norm.eps,
            *self._activation(norm.activation, norm.activation_args),
            *groups,
            *self._end(x),
        )

    def row_norm_act(self, z: Tensor, x: Tensor, norm: InputNorm, is_given: bool, rows: Rows) -> None:
        self._row_norm_act(
            z.data_ptr(),
            norm.mean.data_ptr(),
            norm.var.data_ptr(),
            x.data_ptr(),
            _pointer(norm.weight),
            _pointer(norm.bias),
            norm.eps,
            *self._activation(norm.activation, norm.activation_args),
            is_given,
            *rows,
            *self._end(x),
        )

    def row_norm_act_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        norm: InputNorm,
        rows: Rows,
    ) -> None:
        self._row_norm_act_backward(
            _pointer(dx),
            _pointer(dweight),
            _pointer(dbias),
            grad.data_ptr(),
            x.data_ptr(),
            _pointer(norm.weight),
            _pointer(norm.bias),
            norm.mean.data_ptr(),
            norm.var.data_ptr(),
            norm.eps,
            *self._activation(norm.activation, norm.activation_args),
            *rows,
            *self._end(x),
        )

    def _end(self, x: Tensor) -> tuple[int, int]:
        return self._dtypes[x.dtype], self._threads(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
