"""What the ops hand to a device's kernels, held against the contract in `normpass.kernels`."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from normpass import kernels, ops
from normpass.kernels.contract import Layout
from normpass.ops import Activation
from normpass.ops import norm_act_backward as norm_act_backward_op
from normpass.ops.library import _on_device
from normpass.ops.operands import can_run, layout_of
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act

LEAKY = Activation("leaky_relu", (0.1,))
NEEDS = (True, True, True, True)


class CheckedKernels:
    """Computes by the references, and checks that every call keeps the contract."""

    adds_gradients = normalizes_residuals = takes_slopes = False
    masks = frozenset()

    def __init__(self):
        self.calls = []

    def supports(self, dtype):
        return dtype in (torch.float64, torch.float32, torch.bfloat16)

    def _note(self, name, layout, results, operands, per_channel):
        x = next(t for t in operands if t is not None)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = layout.channels
        assert layout.outer * channels * layout.inner == x.numel() > 0
        for t in (*results, *operands):
            assert t is None or t.dtype == x.dtype and t.shape == x.shape
            rows = x.dim() > 3 and t is not None and not t.is_contiguous()
            dense = t is None or (t.movedim(1, -1) if rows else t).is_contiguous()
            assert dense and (layout.inner == 1 if rows else True)
        for t in per_channel:
            assert t is None or t.dtype == wide and t.shape == (channels,) and t.is_contiguous()
        pointers = [t.data_ptr() for t in (*results, *operands) if t is not None]
        assert len(set(pointers)) == len(pointers)
        assert not any(t.requires_grad for t in results if t is not None)
        self.calls.append((name, layout))

    def moments(self, mean, var, x, layout, running=None):
        self._note("moments", layout, (), (x,), (mean, var, *(running[:2] if running else ())))
        wide_var, wide_mean = torch.var_mean(x.detach().to(mean.dtype), [0, *range(2, x.dim())], correction=0)
        mean.copy_(wide_mean)
        var.copy_(wide_var)
        if running is not None:
            self.running_stats(running, mean, var, layout.outer * layout.inner)

    def running_stats(self, running, mean, var, count):
        self.calls.append(("running_stats", count))
        with kernels.disabled():
            new = ops.updated_running_stats(running.mean, running.var, mean, var, running.momentum, count)
        running.mean.data.copy_(new[0])
        running.var.data.copy_(new[1])

    def norm_act(self, z, x, residual, norm, layout):
        values, (eps, *activation) = norm[:4], norm[4:7]
        self._note("norm_act", layout, (z,), (x, residual), values)
        with kernels.disabled(), torch.no_grad():
            z.copy_(ops.norm_act(x, residual, *values, eps, False, *activation))

    def norm_act_backward(self, dx, dresidual, dweight, dbias, grad, x, residual, norm, batch_statistics, layout):
        values, (eps, *activation) = norm[:4], norm[4:7]
        self._note("backward", layout, (dx, dresidual), (grad, x, residual), (dweight, dbias, *values))
        results = (dx, dresidual, dweight, dbias)
        needs = [t is not None for t in results]
        with kernels.disabled(), torch.no_grad():
            found = norm_act_backward_op(grad, x, residual, *values, eps, batch_statistics, *activation, needs)
        for result, value in zip(results, found, strict=True):
            if result is not None:
                result.copy_(value)

    def inplace_abn_backward(self, dx, dweight, dbias, grad, z, norm, batch_statistics, layout):
        weight, bias, mean, var, eps, *activation = norm[:7]
        assert mean is None
        self._note("inplace_abn_backward", layout, (dx,), (grad, z), (dweight, dbias, weight, bias, var))
        results = (dx, dweight, dbias)
        needs = [t is not None for t in results]
        with kernels.disabled(), torch.no_grad():
            found = ops.inplace_abn_backward(grad, z, weight, bias, var, eps, batch_statistics, *activation, needs)
        for result, value in zip(results, found, strict=True):
            if result is not None:
                result.copy_(value)


@pytest.fixture
def checked(monkeypatch):
    double = CheckedKernels()
    monkeypatch.setitem(kernels._loaded, "cpu", (double, "a double"))
    return double


def gradients(z, site):
    return torch.autograd.grad(z, site.inputs, site.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(6, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 3, 4, 2), (2, 3, 1, 1), (2, 1, 4, 4)], ids=str
)
def test_every_call_keeps_the_contract(shape, dtype, checked, make_site, norm_act, inplace_abn):
    layouts = ("contiguous", "channels_last", "every_other", "transposed")
    for layout, grad_layout in product(layouts, layouts):
        if len(shape) < 4 and "channels_last" in (layout, grad_layout):
            continue
        site = make_site(shape, dtype=dtype, layout=layout, grad_layout=grad_layout, activation=LEAKY)
        got = gradients(norm_act(*site.norm_act_args), site)
        assert [t.dtype for t in got] == [t.dtype for t in site.inputs]
        alone = replace(site, residual=None)
        gradients(inplace_abn(*alone.inplace_abn_args), alone)
        ops.moments(site.x.detach())
    assert {name for name, _ in checked.calls} == {"norm_act", "backward", "inplace_abn_backward", "moments"}


def test_parameters_of_any_dtype_and_stride(checked, make_site, norm_act, inplace_abn):
    site = make_site(dtype=torch.bfloat16, residual=False, activation=LEAKY)
    wide = torch.stack([torch.ones(3), torch.zeros(3)], 1)
    weight, bias = (wide[:, i].bfloat16().requires_grad_() for i in (0, 1))
    site = replace(site, weight=weight, bias=bias, mean=site.mean.double(), var=site.var.expand(2, 3).t()[:, 0])
    for z in (norm_act(*site.norm_act_args), inplace_abn(*site.inplace_abn_args)):
        assert [t.dtype for t in gradients(z, site)] == [torch.bfloat16] * 3
    assert len(checked.calls) == 4


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_what_the_kernels_do_not_support_runs_the_reference(dtype, checked, make_site, norm_act, inplace_abn):
    class Marked(Tensor):
        pass

    site = make_site(dtype=dtype, residual=False, activation=LEAKY)
    empty = make_site((0, 3, 4, 4), residual=False, batch_statistics=False, activation=LEAKY)
    marked = replace(make_site(residual=False, activation=LEAKY, requires_grad=False), weight=torch.ones(3).double())
    for given in (site, empty):
        gradients(norm_act(*given.norm_act_args), given)
        gradients(inplace_abn(*given.inplace_abn_args), given)
    norm_act(*replace(marked, x=marked.x.as_subclass(Marked)).norm_act_args)
    ops.moments(site.x.detach())
    assert checked.calls == []


@pytest.mark.parametrize("which", ["weight", "bias", "mean", "var"])
def test_memory_that_is_not_what_it_says_is_not_read(which, checked, make_site, norm_act, error):
    """The imaginary part of a conjugate is its negative, which is resolved when it is read."""
    site = make_site(residual=False, requires_grad=False)
    value = getattr(site, which)
    negative = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert negative.is_neg()
    got = norm_act(*replace(site, **{which: negative}).norm_act_args)
    assert error(got, ops.norm_act(*site.norm_act_args)) < 1e-14


def test_another_device_is_the_references_to_refuse(checked):
    x, c = torch.zeros(2, 3, 4, 4), torch.ones(3)
    assert can_run(checked, x, (x,), (c, None))
    assert not can_run(checked, x, (), (c.to("meta"),)) or c.to("meta").get_device() == x.get_device()
    assert not can_run(checked, x, (), (torch.ones(2),))
    assert not can_run(checked, x, (x[:1],))
    assert not can_run(checked, x, (x.double(),))
    assert not can_run(checked, x, (), (c,), "relu", (1.0,))
    assert not can_run(checked, x, (), (c,), "swish")


def test_layouts_in_words():
    x = torch.zeros(2, 3, 4, 5)
    assert layout_of(x, torch.contiguous_format) == Layout(2, 3, 20)
    assert layout_of(x, torch.channels_last) == Layout(40, 3, 1)
    assert layout_of(torch.zeros(7, 3), torch.contiguous_format) == Layout(7, 3, 1)


def test_switched_off_and_on_again(checked, make_site):
    site = make_site()
    with kernels.disabled(), kernels.disabled():
        assert kernels.kernels_for("cpu") is None
        ops.norm_act(*site.norm_act_args)
    assert checked.calls == [] and kernels.kernels_for("cpu") is checked
    with pytest.raises(ZeroDivisionError), kernels.disabled():
        1 / 0  # noqa: B018
    ops.norm_act(*site.norm_act_args)
    assert len(checked.calls) == 1


def test_kernels_are_asked_for_at_the_first_call_of_a_device(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "_library", lambda device: asked.append(device) or (None, "none"))
    monkeypatch.setattr(kernels, "_loaded", {})
    call = _on_device("cuda", lambda found, *args: (found, *args))
    assert asked == []
    assert call(1, 2) == call(1, 2) == (None, 1, 2)
    assert asked == ["cuda"]
    assert [(s.device, s.available, s.words) for s in kernels.status()] == [
        ("cpu", False, "none"),
        ("cuda", False, "none"),
    ]


def test_a_device_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", {})
    assert kernels.kernels_for("xpu") is None
    assert "xpu" in kernels._loaded["xpu"][1]


def test_moments_and_running_statistics_are_one_call(checked):
    def call(norm, x):
        return fused_norm_act(FunctionalBatchNorm(norm.running_mean, norm.running_var, training=True), x)

    with torch.no_grad():
        call(nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4))
    assert [name for name, _ in checked.calls] == ["moments", "running_stats", "norm_act"]
    narrow = nn.BatchNorm2d(3).bfloat16()
    checked.calls.clear()
    with torch.no_grad():
        call(narrow, torch.randn(2, 3, 4, 4).bfloat16())
    assert [name for name, _ in checked.calls] == ["moments", "norm_act"]
    assert narrow.running_mean.count_nonzero() == 3
