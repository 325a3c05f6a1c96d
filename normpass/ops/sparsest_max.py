"""`normpass::sparsest_max`: from K logits to K ratios that become one-hot as a radius grows.

For logits z and a radius r (SparsestMax, Shao et al. 2019, arXiv 1903.03793, as in the authors' code):

    w = sparsemax(z)       the point of the simplex nearest to z (Martins and Astudillo 2016)
    S = {k: w_k > 0},  u = the centre of the face of S,  d = ‖w − u‖
    one-hot or d ≥ r:      w
    otherwise              p = u + r·(w − u)/d, on the sphere of radius r about u, in the plane of the face
    some p_k < 0:          project p onto the face; with its support T, centre u' and r' = √(r² − ‖u' − u‖²) again

So the result is the point nearest to z among those of w's face at a distance of at least r from the face's
centre. On every pass w − u is z less its mean over the support, scaled; the direction is therefore taken from z
itself, and rounding does not add up. For K = 3 the inscribed radius is √6/6 and the circumscribed √6/3: from
there on every result is one-hot. Where the logits of a support are all equal there is no direction: the centre
is returned, that is sparsemax, until the tie breaks.

The gradient, with s = 1 on T and 0 elsewhere, D = diag(s) − s·sᵀ/|T|, c = D·z and n = c/‖c‖:

    on the sphere     r'/‖c‖ · (D − n·nᵀ)
    elsewhere         D

(the chain of all passes collapses to that of the last one). It is 0 where the result is one-hot. The radius has
no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.onlookers import is_exporting

from .library import declare


def sparsest_max(z: Tensor, radius: Tensor | float) -> Tensor:
    """SparsestMax along the last dimension.

    Args:
        z: (*, K) logits, float32 or float64.
        radius: a number, or a tensor that broadcasts with the leading dimensions of `z`. A tensor can change
            without a new compilation; nothing is read back from a device.

    Returns:
        (*, K) ratios >= 0 that sum to 1, in the dtype of `z`.

    Raises:
        ValueError: `z` has no last dimension, or a dtype narrower than float32.
    """
    if not isinstance(radius, Tensor):
        radius = torch.full((), radius, dtype=z.dtype, device=z.device)
    if is_exporting():
        return _reference(z, radius)[0]
    p: Tensor = _sparsest_max(z, radius)[0]
    return p


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex nearest to each (*, K) row of `z`."""
    return _sparsemax_on(z, torch.ones_like(z, dtype=torch.bool))


def _sparsemax_on(z: Tensor, face: Tensor) -> Tensor:
    """The nearest point of one face of the simplex. face: (*, K), True for at least one k of each row."""
    z = torch.where(face, z, -torch.inf)
    z = z - z.amax(-1, keepdim=True)  # so that huge logits lose no digits; the largest is 0
    ordered = z.sort(-1, descending=True).values
    total = ordered.cumsum(-1)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    within = 1 + rank * ordered > total  # holds for the first |S| of them
    size = within.sum(-1, keepdim=True)
    threshold = (total.gather(-1, size - 1) - 1) / size
    return (z - threshold).clamp(min=0)


def _reference(z: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p; the support T of the last pass as a mask; r' where p is on the sphere, else 0. All (*, K) or (*, 1)."""
    _check(z)
    radius = radius.to(z.dtype).unsqueeze(-1)
    p = sparsemax(z)
    support = p > 0
    negligible = 4 * torch.finfo(z.dtype).eps  # at the circumscribed radius a corner is reached by rounding
    on_sphere = torch.zeros_like(z[..., :1])
    left = (radius * radius).expand_as(on_sphere)  # r², less what the changes of centre took
    moving = torch.ones_like(on_sphere, dtype=torch.bool)
    for _ in range(z.shape[-1] - 1):  # each pass that goes on takes one from the support at least
        direction, norm, distance = _direction(z, p, support)
        reach = left.clamp(min=0).sqrt()
        moving = moving & (norm > 0) & (distance < reach)
        size = support.sum(-1, keepdim=True, dtype=z.dtype)
        step = torch.where(moving, reach / torch.where(norm > 0, norm, 1), 0)
        pushed = torch.where(support, 1 / size + step * direction, 0)
        above = pushed > negligible
        smaller = _sparsemax_on(pushed, support & above)
        inside = (above | ~support).all(-1, keepdim=True)
        stays = moving & inside
        on_sphere = torch.where(moving, torch.where(inside, reach, 0), on_sphere)
        p = torch.where(stays, pushed, torch.where(moving, smaller, p))
        moving = moving & ~inside
        new_support = (moving & (smaller > 0)) | (~moving & support)
        new_size = new_support.sum(-1, keepdim=True, dtype=z.dtype)
        left = left - torch.where(moving, 1 / new_size - 1 / size, 0)  # ‖u' − u‖², T within S
        support = new_support
    return p, support, on_sphere


def _direction(z: Tensor, p: Tensor, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z less its mean over the support, the norm of that (0 for a tie), and the distance of p from the centre."""
    size = support.sum(-1, keepdim=True, dtype=z.dtype)
    low = torch.where(support, z, torch.inf).amin(-1, keepdim=True)
    high = torch.where(support, z, -torch.inf).amax(-1, keepdim=True)
    direction = torch.where(support, z - high, 0)
    direction = torch.where(support, direction - direction.sum(-1, keepdim=True) / size, 0)
    tie = high == low
    norm = torch.where(tie, 0, _norm(direction))
    distance = _norm(torch.where(support, p - 1 / size, 0))
    return direction, norm, distance


def _norm(values: Tensor) -> Tensor:
    return values.square().sum(-1, keepdim=True).sqrt()


def _check(z: Tensor) -> None:
    if z.dim() < 1 or z.shape[-1] < 1:
        raise ValueError(f"normpass::sparsest_max: `z` must have shape (*, K) with K >= 1, got {tuple(z.shape)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"normpass::sparsest_max: `z` must be float32 or float64, got {z.dtype}; convert the logits")


def _fake(z: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(z)
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        torch.empty_like(z, dtype=torch.bool, memory_format=torch.contiguous_format),
        z.new_empty((*z.shape[:-1], 1)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor, None]:
    z, support, on_sphere = ctx.saved_tensors
    size = support.sum(-1, keepdim=True, dtype=z.dtype)
    pushed = on_sphere > 0

    def centred(values: Tensor) -> Tensor:
        values = torch.where(support, values, 0)
        return torch.where(support, values - values.sum(-1, keepdim=True) / size, 0)

    flat = centred(grad)
    direction = torch.where(pushed, centred(z - z.amax(-1, keepdim=True)), 1)  # 1, so that nothing below is 0/0
    norm = _norm(direction)
    n = direction / norm
    tangent = flat
    for _ in range(2):  # near a tie on_sphere/norm is large, and so is what one subtraction leaves by rounding
        tangent = centred(tangent - n * (n * tangent).sum(-1, keepdim=True))
    return torch.where(pushed, tangent * (on_sphere / norm), flat), None


def _kernel(kernels: Any, z: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _reference(z, radius)


_sparsest_max = declare(
    "sparsest_max(Tensor z, Tensor radius) -> (Tensor p, Tensor support, Tensor on_sphere)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
