"""Real images without a download: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def batches(batch_size: int, size: int = 64, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the 1797 digits, in an order drawn from `seed`; what does not fill a batch is left out.

    The 8x8 grey images are enlarged bilinearly and repeated over three channels; the small images as a
    whole have mean 0 and standard deviation 1. For several epochs call it again with another seed. torch's
    global random state is neither read nor changed.

    Yields:
        images, float32 (batch_size, 3, size, size), and labels 0 to 9, int64 (batch_size,).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: `batch_size` is not between 1 and 1797, or `size` is less than 1.

    Source: `sklearn.datasets.load_digits`, the test part of UCI's Optical Recognition of Handwritten Digits.
    """
    images, labels = _load()
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"`batch_size` must be 1 to {len(images)}, the number of images, not {batch_size}")
    if size < 1:
        raise ValueError(f"`size` must be at least 1 pixel, not {size}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return _drawn(images, labels, order, batch_size, size)


def _drawn(
    images: Tensor, labels: Tensor, order: Tensor, batch_size: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in order.split(batch_size):
        if len(chosen) == batch_size:
            large = F.interpolate(images[chosen], size=(size, size), mode="bilinear", align_corners=False)
            yield large.repeat(1, 3, 1, 1), labels[chosen]


def _load() -> tuple[Tensor, Tensor]:
    """All images, standardized, float32 (1797, 1, 8, 8), and their labels, int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the digits come with scikit-learn: pip install "normpass[demo]"') from error
    images, labels = load_digits(return_X_y=True)
    grey = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return (grey - grey.mean()) / grey.std(), torch.as_tensor(labels, dtype=torch.int64)
