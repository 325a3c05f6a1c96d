"""The CPU's kernels of norms whose statistics are a sample's own, from the same library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from normpass.kernels.contract import Groups, Norm, Rows


class CpuSampleNorms:
    """The `SampleNorms` of the CPU."""

    def __init__(
        self,
        group_norm_act: Callable[..., int],
        group_norm_act_backward: Callable[..., int],
        row_norm_act: Callable[..., int],
        row_norm_act_backward: Callable[..., int],
        dtypes: Mapping[torch.dtype, int],
        norm: Callable[[Norm], tuple[int | float | None, ...]],
        threads: Callable[[Tensor], int],
    ):
        self._group_norm_act, self._group_norm_act_backward = group_norm_act, group_norm_act_backward
        self._row_norm_act, self._row_norm_act_backward = row_norm_act, row_norm_act_backward
        self._dtypes, self._norm, self._threads = dtypes, norm, threads

    def group_norm_act(
        self, z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, groups: Groups
    ) -> None:
        self._group_norm_act(
            z.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.slope),
            *self._norm(norm),
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
        norm: Norm,
        groups: Groups,
        dslope: Tensor | None = None,
    ) -> None:
        self._group_norm_act_backward(
            _pointer(dx),
            _pointer(dresidual),
            _pointer(dweight),
            _pointer(dbias),
            _pointer(dslope),
            grad.data_ptr(),
            x.data_ptr(),
            _pointer(residual),
            _pointer(norm.slope),
            *self._norm(norm),
            *groups,
            *self._end(x),
        )

    def row_norm_act(self, z: Tensor, x: Tensor, norm: Norm, is_given: bool, rows: Rows) -> None:
        self._row_norm_act(
            z.data_ptr(),
            x.data_ptr(),
            *self._norm(norm),
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
        norm: Norm,
        rows: Rows,
    ) -> None:
        self._row_norm_act_backward(
            _pointer(dx),
            _pointer(dweight),
            _pointer(dbias),
            grad.data_ptr(),
            x.data_ptr(),
            *self._norm(norm),
            *rows,
            *self._end(x),
        )

    def _end(self, x: Tensor) -> tuple[int, int]:
        return self._dtypes[x.dtype], self._threads(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
