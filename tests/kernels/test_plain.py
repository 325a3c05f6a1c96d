"""The plain formulas that stand in for a kernel, by the checks of the kernels."""

from __future__ import annotations

import cuda_checks as checks
import cuda_special as special
import pytest
import torch
from cuda_checks import Site

from normpass.kernels import plain
from normpass.kernels.contract import ACTIVATIONS, Layout, Running

LAYOUTS = (Layout(90, 100, 1), Layout(6, 3, 49), Layout(1, 7, 1))
PIECES = {100: (64, *[2] * 18), 3: (1, 2), 7: (7,)}


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_every_formula(dtype):
    for layout in LAYOUTS:
        site, pieces = Site(layout, dtype, "relu", residual=True), PIECES[layout.channels]
        checks.check_moments(plain, site.x, layout)
        checks.check_norm_act(plain, site)
        for frozen in (False, True):
            join = Site(layout, dtype, residual=True, batch_statistics=not frozen)
            checks.check_norm_act_backward(plain, join)
            checks.check_gradient_in_two_parts(plain, join)
        whole = Site(layout, dtype)
        checks.check_cat_norm_act(plain, whole, pieces)
        checks.check_cat_norm_act_backward(plain, whole, pieces, [index % 2 == 0 for index in range(len(pieces))])
        invertible = Site(layout, dtype, "leaky_relu").keep_weight_from_zero()
        checks.check_inplace_abn_backward(plain, invertible)


def test_every_activation():
    for activation in ACTIVATIONS:
        site = Site(Layout(300, 5, 1), torch.float64, activation)
        checks.check_norm_act(plain, site)
        checks.check_norm_act_backward(plain, site, (True, False, True, True))
        if activation in checks.INVERTIBLE:
            checks.check_inplace_abn_backward(plain, site.keep_weight_from_zero())


def test_what_is_not_needed():
    site = Site(Layout(300, 5, 1), torch.float32, residual=True, affine=False, batch_statistics=False)
    for needs in ((True, False, False, False), (False, True, False, False)):
        checks.check_norm_act_backward(plain, site, needs)


def test_what_is_no_number_stays_in_its_place():
    for layout in (Layout(90, 8, 1), Layout(2, 3, 32)):
        for activation in ("relu", "identity", "leaky_relu"):
            special.check_norm_act_backward(plain, layout, activation)
        special.check_cat_norm_act_backward(plain, layout)
        special.check_inplace_abn_backward(plain, layout, "leaky_relu")


def test_running_stats():
    running = Running(torch.zeros(3), torch.ones(3), 0.5)
    plain.running_stats(running, torch.ones(3), torch.ones(3), 3)
    assert running.mean.tolist() == [0.5] * 3 and running.var.tolist() == [1.25] * 3
