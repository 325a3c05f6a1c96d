"""Mean and variance of an activation of a normal variable: act(X) for X ~ N(mean, var).

For the ReLU, with σ = √var, α = mean/σ, and the normal distribution Φ and density φ, by integration by parts:

    E = σ·(α·Φ(α) + φ(α))        E[relu²] = var·((1 + α²)·Φ(α) + α·φ(α))

Leaky ReLU and clipping are sums of ReLUs. Every other activation is integrated with 32 Gauss-Hermite nodes, which
is exact to rounding for polynomials up to degree 63 and to about 1e-3 for functions with kinks. Everything is
computed in float64, since a variance is a small difference where mean/σ is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normpass.ops.activation import activate

SMALLEST_VARIANCE = 1e-10
"""A variance below counts as this, since the derivative of √var grows without bound towards 0. Two equal values of a
channel are enough for that."""


def activated_moments(mean: Tensor, var: Tensor, name: str, args: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance of act(X), X ~ N(mean, var), for tensors of one shape; float64, differentiable."""
    mean, sigma = mean.double(), var.double().clamp(min=SMALLEST_VARIANCE).sqrt()
    if name == "identity":
        return mean, var.double()
    if name == "relu":
        first, square = _rectified(mean, sigma)
        return first, (square - first.square()).clamp(min=0)
    if name == "leaky_relu":
        return _leaky(mean, sigma, args[0])
    if name in ("hardtanh", "clamp", "open_clamp") and -math.inf < args[0] <= args[1] < math.inf:
        return _clipped(mean, sigma, *args)
    return _integrated(mean, sigma, name, args)


def _rectified(mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(X)] and E[relu(X)²]"""
    alpha = mean / sigma
    below = torch.special.ndtr(alpha)
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    first = sigma * (alpha * below + density)
    return first, sigma.square() * ((1 + alpha.square()) * below + alpha * density)


def _leaky(mean: Tensor, sigma: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """f = relu(X) − slope·relu(−X), and the product of the two parts is 0."""
    right, right_square = _rectified(mean, sigma)
    left, left_square = _rectified(-mean, sigma)
    first = right - slope * left
    return first, (right_square + slope * slope * left_square - first.square()).clamp(min=0)


def _clipped(mean: Tensor, sigma: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """f = low + g, g = relu(X − low) − relu(X − high), g² = relu(X − low)² − relu(X − high)² − 2w·relu(X − high)."""
    above_low, above_low_square = _rectified(mean - low, sigma)
    above_high, above_high_square = _rectified(mean - high, sigma)
    first = above_low - above_high
    square = above_low_square - above_high_square - 2 * (high - low) * above_high
    return low + first, (square - first.square()).clamp(min=0)


def _hermite(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Σ w·f(x) ≈ E f(N(0, 1)), from the eigenvectors of the Jacobi matrix (Golub, Welsch 1969)."""
    beside = torch.arange(1, count, dtype=torch.float64, device="cpu").sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return nodes.tolist(), vectors[0].square().tolist()


_NODES, _WEIGHTS = _hermite(32)


def _integrated(mean: Tensor, sigma: Tensor, name: str, args: Sequence[float]) -> tuple[Tensor, Tensor]:
    nodes = torch.tensor(_NODES, dtype=mean.dtype, device=mean.device)
    weights = torch.tensor(_WEIGHTS, dtype=mean.dtype, device=mean.device)
    values = activate(mean.unsqueeze(-1) + sigma.unsqueeze(-1) * nodes, name, args)
    first = (values * weights).sum(-1)
    return first, ((values - first.unsqueeze(-1)).square() * weights).sum(-1)
