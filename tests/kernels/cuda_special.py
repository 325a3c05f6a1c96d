"""Infinities and NaN where the statistics are the running ones, against torch's own layers in eval mode.

No term of the batch's statistics may be computed there: 0·∞ would make a gradient NaN that is finite in torch.
"""

from __future__ import annotations

import itertools

import cuda_checks as checks
import torch
from cuda_checks import Site

from normpass.kernels.contract import Kernels, Layout

SPECIAL = (torch.inf, -torch.inf, torch.nan)


def frozen_site(layout: Layout, activation: str, place: str, value: float, residual: bool, device: str) -> Site:
    """A site with running statistics and one value of x, the residual or the gradient that is no number."""
    site = Site(
        layout, torch.float32, activation, residual, batch_statistics=False, device=device
    ).keep_weight_from_zero()
    where = {"x": site.x, "grad": site.grad, "residual": site.added}[place]
    if where is not None:
        where[1, 1, -1] = value
    return site


def gradients_of_plain(site: Site) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of torch's own layers in eval mode: z, and the gradients of x, weight, bias and the residual."""
    inputs = [site.x, site.weight, site.bias, *([] if site.added is None else [site.added])]
    x, weight, bias, *added = [t.clone().requires_grad_() for t in inputs]
    y = torch.nn.functional.batch_norm(x, site.mean, site.var, weight, bias, False, 0.0, checks.EPS)
    z = checks.FORWARD[site.activation](sum(added, y), *site.args)
    return z.detach(), list(torch.autograd.grad(z, [x, weight, bias, *added], site.grad))


def assert_same(found: dict[str, torch.Tensor | None], wanted: dict[str, torch.Tensor], case: object) -> None:
    for name, got in found.items():
        if got is not None:
            torch.testing.assert_close(got, wanted[name], equal_nan=True, msg=lambda m, n=name: f"{case} {n}: {m}")


def check_norm_act_backward(kernels: Kernels, layout: Layout, activation: str, device: str = "cpu") -> None:
    for residual, place, value in itertools.product((False, True), ("x", "grad", "residual"), SPECIAL):
        site = frozen_site(layout, activation, place, value, residual, device)
        _, (dx, dweight, dbias, *dresidual) = gradients_of_plain(site)
        wanted = {"dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual[0] if residual else dx}
        for needs in ((True, residual, True, True), (True, residual, False, False), (True, False, False, True)):
            results = checks.outputs(site, needs)
            kernels.norm_act_backward(*results, site.grad, site.x, site.added, site.norm, False, layout)
            names = ("dx", "dresidual", "dweight", "dbias")
            assert_same(dict(zip(names, results, strict=True)), wanted, (residual, place, value, needs))


def check_cat_norm_act_backward(kernels: Kernels, layout: Layout, device: str = "cpu") -> None:
    pieces = [1, layout.channels - 1]
    for place, value in itertools.product(("x", "grad"), SPECIAL):
        site = frozen_site(layout, "relu", place, value, False, device)
        _, (dx, dweight, dbias) = gradients_of_plain(site)
        xs = checks.split(site, site.x, pieces)
        dxs, found = [torch.full_like(x, torch.nan) for x in xs], [torch.full_like(site.mean, 7.0) for _ in range(2)]
        kernels.cat_norm_act_backward(dxs, [False] * 2, [None] * 2, *found, site.grad, xs, site.norm, layout)
        results = {"dx": torch.cat(dxs, 1), "dweight": found[0], "dbias": found[1]}
        assert_same(results, {"dx": dx, "dweight": dweight, "dbias": dbias}, (place, value))


def check_inplace_abn_backward(kernels: Kernels, layout: Layout, activation: str, device: str = "cpu") -> None:
    for place, value in itertools.product(("x", "grad"), SPECIAL):
        site = frozen_site(layout, activation, place, value, False, device)
        z, (dx, dweight, dbias) = gradients_of_plain(site)
        for needs in ((True, True, True), (True, False, False)):
            got_dx, _, *found = checks.outputs(site, (needs[0], False, *needs[1:]))
            norm = site.norm._replace(mean=None)
            kernels.inplace_abn_backward(got_dx, *found, site.grad, z, norm, False, layout)
            results = {"dx": got_dx, "dweight": found[0], "dbias": found[1]}
            assert_same(results, {"dx": dx, "dweight": dweight, "dbias": dbias}, (place, value, needs))
