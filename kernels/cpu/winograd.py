"""3×3 convolutions of the CPU as Winograd's, and where they are faster than the vendor's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normpass.kernels.contract import WINOGRAD_CHANNELS

FEWEST_PRODUCTS = 5_000_000
"""multiplications of a convolution, below which the call from Python shows"""
FEWEST_TILES_PER_THREAD = 8
TILES_PER_LEFT = 16
"""where more than one tile in so many must be computed otherwise, all are"""
MOST_OF_VENDORS = 0.75
"""the estimate below must be at most this fraction of the vendor's"""

# In multiplications of the products, as measured on AVX-512 (Zen 4) with 2 threads: what it takes to bring a value of a
# tile into another form, in channels_last and in planes; and one of the weight, within the second-level cache or not.
_PIXEL_LAST, _PIXEL_PLANES = 12, 20
_WEIGHT_CACHED, _WEIGHT = 10, 40
_CACHED_BYTES = 1 << 20

_UNKNOWN_TYPE, _ALL_LEFT = -1, -2
"""of `winograd_checks.h`"""


class CpuWinograd:
    """The `Winograd` of the CPU. `has_fma`: whether the library multiplies and adds in one instruction."""

    def __init__(
        self,
        convolve: Callable[..., int],
        weight_gradient: Callable[..., int],
        dtypes: dict[torch.dtype, int],
        has_fma: bool,
    ):
        self._convolve, self._weight_gradient = convolve, weight_gradient
        self._dtypes, self._has_fma = dtypes, has_fma

    def pays(self, x: Tensor, channels: int, size: Sequence[int], of_weight: bool) -> bool:
        samples, inside = x.shape[:2]
        tiles = samples * ((size[0] + 1) // 2) * ((size[1] + 1) // 2)
        pairs = inside * channels
        vendor = 9 * samples * size[0] * size[1] * pairs
        if not self._has_fma or min(inside, channels) < WINOGRAD_CHANNELS or vendor < FEWEST_PRODUCTS:
            return False
        if tiles < FEWEST_TILES_PER_THREAD * torch.get_num_threads():
            return False
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        form = tiles * (inside + channels) * (_PIXEL_LAST if is_last else _PIXEL_PLANES)
        is_cached = 16 * pairs * x.element_size() <= _CACHED_BYTES
        weight = 0 if of_weight else pairs * (_WEIGHT_CACHED if is_cached else _WEIGHT)
        return 16 * (tiles * pairs + form + weight) <= MOST_OF_VENDORS * vendor

    def convolve(
        self,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        transposed: bool,
        memory_format: torch.memory_format,
        weight_format: torch.memory_format,
    ) -> Tensor | None:
        tiles = x.shape[0] * ((y.shape[2] + 1) // 2) * ((y.shape[3] + 1) // 2)
        left = torch.empty(tiles // TILES_PER_LEFT, dtype=torch.int64)
        border = [2 - p for p in padding] if transposed else padding
        status = self._convolve(
            y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            left.data_ptr(),
            left.numel(),
            *x.shape,
            *y.shape[1:],
            *border,
            transposed,
            memory_format is torch.channels_last,
            weight_format is torch.channels_last,
            self._dtypes[x.dtype],
            torch.get_num_threads(),
        )
        assert status != _UNKNOWN_TYPE, f"no loop for {x.dtype}"
        return None if status == _ALL_LEFT else left[:status]

    def weight_gradient(
        self,
        dweight: Tensor,
        grad: Tensor,
        x: Tensor,
        padding: Sequence[int],
        memory_format: torch.memory_format,
    ) -> bool:
        is_last = memory_format is torch.channels_last
        status = self._weight_gradient(
            dweight.data_ptr(),
            grad.data_ptr(),
            x.data_ptr(),
            *x.shape,
            *grad.shape[1:],
            *padding,
            is_last,
            is_last,
            self._dtypes[x.dtype],
            torch.get_num_threads(),
        )
        assert status != _UNKNOWN_TYPE, f"no loop for {x.dtype}"
        return status != _ALL_LEFT
