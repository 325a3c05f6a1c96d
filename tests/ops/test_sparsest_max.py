import itertools
import math

import pytest
import torch

from normpass.ops import sparsest_max
from normpass.ops.sparsest_max import sparsemax

SIZES = (2, 3, 4, 5, 6)
CASES = 2000  # of each size


def random_logits(size, count=CASES, seed=0):
    """(count, size) logits, half of them close together, and a radius in [0, 1] for each."""
    generator = torch.Generator().manual_seed(seed + size)
    spread = 10.0 ** torch.empty(count, 1, dtype=torch.float64).uniform_(-2, 0.7, generator=generator)
    logits = torch.randn(count, size, dtype=torch.float64, generator=generator) * spread
    return logits, torch.rand(count, dtype=torch.float64, generator=generator)


def projections(z, r):
    """The nearest point to z among those of the face of sparsemax(z) with a distance >= r from its centre.

    By brute force: on every face of that face the centre's sphere has one nearest point, its direction z less its
    mean. Where r is larger than the face, its nearest corner.
    """
    w = sparsemax(z)
    support = [k for k in range(len(z)) if w[k] > 0]
    centre = face_centre(support, len(z))
    corners = [face_centre([k], len(z)) for k in support]
    candidates = [w, *corners]
    for size in range(2, len(support) + 1):
        for face in map(list, itertools.combinations(support, size)):
            own = face_centre(face, len(z))
            left = r * r - (1 / size - 1 / len(support))
            direction = torch.where(own > 0, z - z[face].mean(), 0)
            if left >= 0 and direction.norm() > 0:
                candidates.append(own + math.sqrt(left) * direction / direction.norm())
    allowed = [p for p in candidates if p.min() >= 0 and (p - centre).norm() >= r - 1e-12]
    return min(allowed or corners, key=lambda p: float((p - z).norm()))


def face_centre(face, size):
    centre = torch.zeros(size, dtype=torch.float64)
    centre[face] = 1 / len(face)
    return centre


def transcription(z, radius, centre=None):
    """The recursion as it is written down, without a thought for rounding."""
    w = sparsemax(z)
    if w.max() == 1:
        return w
    u = (w > 0).to(z.dtype) / (w > 0).sum()
    if centre is not None:
        radius = math.sqrt(radius**2 - float((u - centre).square().sum()))
    distance = (w - u).norm()
    if distance >= radius:
        return w
    p = u + radius * (w - u) / distance
    return p if p.min() >= 0 else transcription(p, radius, u)


@pytest.mark.parametrize("size", SIZES)
def test_is_the_projection(size):
    logits, radii = random_logits(size)
    found = sparsest_max(logits, radii)
    expected = torch.stack([projections(z, float(r)) for z, r in zip(logits, radii, strict=True)])
    assert (found - expected).abs().max() < 1e-10
    assert (found.sum(-1) - 1).abs().max() < 1e-12
    assert found.min() >= 0


def test_from_the_whole_simplex_it_is_the_projection_onto_what_lies_outside_the_ball():
    """A grid over the triangle has no point nearer to z than the result, at a distance of r from the centre."""
    steps = torch.arange(0, 401, dtype=torch.float64) / 400
    grid = torch.stack((steps[:, None].expand(401, 401), steps.expand(401, 401)), -1).reshape(-1, 2)
    grid = torch.cat((grid, 1 - grid.sum(-1, keepdim=True)), -1)
    grid = grid[grid[:, 2] >= 0]
    outside = (grid - 1 / 3).norm(dim=-1)
    logits, radii = random_logits(3, 200)
    whole = (sparsemax(logits) > 0).all(-1) & (radii < 0.81)
    assert whole.sum() > 20
    for z, r in zip(logits[whole], radii[whole], strict=True):
        p = sparsest_max(z, r)
        nearest = (grid[outside >= r] - z).norm(dim=-1).min()
        assert (p - 1 / 3).norm() >= r - 1e-12
        assert (p - z).norm() <= nearest + 1e-12


def test_radius_zero_is_sparsemax():
    logits, _ = random_logits(4, 100)
    torch.testing.assert_close(sparsest_max(logits, 0.0), sparsemax(logits), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_hot_from_the_circumscribed_radius_on(dtype):
    logits, _ = random_logits(3)
    logits = logits.to(dtype)
    for radius in (math.sqrt(6) / 3, 0.9, 1.0):
        p = sparsest_max(logits, radius)
        assert ((p == 0) | (p == 1)).all()
        assert (p.argmax(-1) == logits.argmax(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "logits, expected",
    [
        ([1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        ([0.1, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3]),
        ([1.0, 1.0, 0.2], None),
        ([1.0, 1.0, -3.0], [0.5, 0.5, 0.0]),
        ([1e30, -1e30, 0.0], [1.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_ties_and_extremes_have_no_nan(logits, expected, dtype):
    z = torch.tensor(logits, dtype=dtype, requires_grad=True)
    for radius in (0.0, 0.3, 0.5, 0.8, 1.0):
        p = sparsest_max(z, radius)
        (grad,) = torch.autograd.grad(p, z, torch.tensor([1.0, -0.5, 2.0], dtype=dtype))
        assert p.isfinite().all() and grad.isfinite().all()
        assert abs(float(p.detach().sum()) - 1) < 1e-6
        if expected is not None:
            torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


def test_a_tie_breaks():
    """From equal logits the gradient of sparsemax moves them, and then the radius holds."""
    z = torch.ones(3, requires_grad=True)
    sparsest_max(z, 0.5)[1].backward()
    p = sparsest_max(z.detach() + 1e-3 * z.grad, 0.5)
    assert p.argmax() == 1
    assert (p - 1 / 3).norm() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_gradient_against_autograd_of_the_recursion(size):
    logits, radii = random_logits(size, 200)
    for z, r in zip(logits, radii, strict=True):
        if near_a_kink(z, r):
            continue
        cotangent = torch.linspace(-1, 2, size, dtype=torch.float64)
        z.requires_grad_()
        (expected,) = torch.autograd.grad(transcription(z, float(r)), z, cotangent)
        (found,) = torch.autograd.grad(sparsest_max(z, r), z, cotangent)
        assert (found - expected).abs().max() < 1e-8 * max(1.0, float(expected.abs().max()))


def near_a_kink(z, r):
    """Whether a move of 1e-3 of the spread changes the support or leaves the sphere, or the logits nearly tie."""
    spread = float((z.max() - z.min()) * 1e-3)
    p = sparsest_max(z, r)
    around = torch.cat([z + spread * torch.eye(len(z)), z - spread * torch.eye(len(z))])
    support = sparsest_max(around, r) > 0
    top = z.sort().values
    w = sparsemax(z)
    centre = (w > 0) / (w > 0).sum()
    on_edge = abs(float((w - centre).norm()) - float(r)) < 1e-3
    return bool((support != (p > 0)).any()) or on_edge or float((top[1:] - top[:-1]).min()) < spread


@pytest.mark.parametrize("size, radius", [(2, 0.3), (3, 0.3), (3, 0.6), (4, 0.5), (5, 0.75), (6, 0.4)])
def test_gradient_against_finite_differences(size, radius):
    logits, _ = random_logits(size, 40, seed=5)
    checked = 0
    for z in logits:
        if near_a_kink(z, torch.tensor(radius, dtype=torch.float64)):
            continue
        checked += 1
        h = 1e-4 * float(z.max() - z.min())
        moved = {k: sparsest_max(z + k * h * torch.eye(size, dtype=torch.float64), radius) for k in (-2, -1, 1, 2)}
        differences = (8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * h)  # of fourth order
        jacobian = torch.autograd.functional.jacobian(lambda v: sparsest_max(v, radius), z)
        assert (jacobian.T - differences).abs().max() < 1e-8 * max(1.0, float(jacobian.abs().max()))
    assert checked > 3


def test_second_derivatives():
    z = torch.tensor([0.3, 0.1, 0.2, 0.7, 0.65], dtype=torch.float64, requires_grad=True)
    for radius in (0.2, 0.6, 0.75):
        assert torch.autograd.gradgradcheck(lambda v, r=radius: sparsest_max(v, r), z)


def test_rows_have_radii_of_their_own():
    logits, radii = random_logits(3, 12)
    together = sparsest_max(logits.reshape(3, 4, 3), radii.reshape(3, 4))
    apart = torch.stack([sparsest_max(z, r) for z, r in zip(logits, radii, strict=True)])
    assert torch.equal(together.reshape(12, 3), apart)


def test_opcheck(opcheck):
    z = torch.tensor([[0.3, 0.1, 0.5], [1.0, 1.0, 1.0]], requires_grad=True)
    opcheck(torch.ops.normpass.sparsest_max.default, (z, torch.tensor(0.5)))


@pytest.mark.parametrize(
    "z, message",
    [
        (torch.tensor(1.0), r"`z` must have shape \(\*, K\)"),
        (torch.zeros(3, dtype=torch.float16), "must be float32 or float64, got torch.float16"),
    ],
)
def test_refuses(z, message):
    with pytest.raises(ValueError, match=message):
        sparsest_max(z, 0.5)
