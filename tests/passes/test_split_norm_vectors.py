"""`split_norm` with weights and biases that do not lie as new tensors do: gradients are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_trains_alike, image, rewrites

from normpass.ops.sample_norm import sample_norms_of

pytestmark = pytest.mark.skipif(sample_norms_of("cpu") is None, reason="the C++ kernels are not built")


class Transposed(nn.Module):
    """A row norm of 4×6 values whose vectors are transposed tensors, which keep their strides where they are copied."""

    def __init__(self, norm: Callable[..., Tensor], count: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), norm
        self.vectors = nn.ParameterList(torch.randn(6, 4) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        vectors = [vector.t() for vector in self.vectors]
        return F.silu(self.norm(self.conv(x), (4, 6), *vectors))


@pytest.mark.parametrize("norm, count", [(F.layer_norm, 2), (F.layer_norm, 1), (F.rms_norm, 1)])
def test_gradients_of_transposed_vectors(norm: Callable[..., Tensor], count: int) -> None:
    torch.manual_seed(0)
    model, x = Transposed(norm, count).double(), image(2, 3, 4, 6)
    (rewrite,) = rewrites(model, x).values()
    assert rewrite in ("split_norm", "fuse_norm_act")
    assert_trains_alike(model, x)
