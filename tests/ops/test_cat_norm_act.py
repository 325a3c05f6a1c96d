"""`cat_norm_act` and its gradients, through the dispatcher and through `shared_gradient`, against the plain formula."""

from dataclasses import replace

import pytest
import torch

from normpass import kernels as library
from normpass import ops
from normpass.ops import Activation
from normpass.ops.layout import memory_format_of
from normpass.ops.pieces import memory_format_of_pieces
from normpass.ops.shared_gradient import CatNormAct, Reader

SPLITS = [(3,), (1, 2, 3), (32, 7), (16, 16, 16, 16), (520, 3), (1, 1)]


def pieces_of(site, split):
    """Leaves with the values of the site's x, each dense in its own right."""
    memory_format = memory_format_of(site.x)
    parts = site.x.detach().split(split, 1)
    return [p.contiguous(memory_format=memory_format).requires_grad_() for p in parts]


def by_readers(xs, weight, bias, mean, var, eps, batch_statistics, activation, args):
    """The way of plain eager mode."""
    memory_format = memory_format_of_pieces(xs)
    read = [Reader.apply(x, memory_format) if x.requires_grad else x for x in xs]
    options = eps, batch_statistics, activation, args
    kernels = library.kernels_for("cpu")
    return CatNormAct.apply(weight, bias, mean, var, kernels, memory_format, options, *read)


@pytest.fixture(params=["reference", "kernels", "readers"])
def cat_norm_act(request):
    """The op by its reference and by the kernels, and the way of plain eager mode, which only the kernels take."""
    if request.param == "reference":
        with library.disabled():
            yield ops.cat_norm_act
        return
    if library.kernels_for("cpu") is None:
        pytest.skip(library.status()[0].words)
    yield by_readers if request.param == "readers" else ops.cat_norm_act


def assert_equals_plain(function, site, split, plain_formula, error, tolerance=1e-12):
    xs = pieces_of(site, split)
    parameters = [t for t in (site.weight, site.bias) if t is not None]
    z = function(xs, site.weight, site.bias, site.mean, site.var, *site.options)
    *dxs, dweight, dbias = torch.autograd.grad(z, [*xs, *parameters], site.grad)
    for x, dx in zip(xs, dxs, strict=True):
        assert dx.shape == x.shape and dx.dtype == x.dtype
    wide = site.in_double()
    expected = plain_formula(wide)
    want = torch.autograd.grad(expected, wide.inputs, wide.grad)
    got = z, torch.cat(dxs, 1), dweight, dbias
    for name, a, b in zip("z dx dweight dbias".split(), got, (expected, *want), strict=True):
        assert error(a, b) < tolerance, name
    return z, dxs


def test_every_activation(cat_norm_act, activation, batch_statistics, make_site, plain_formula, error):
    site = make_site((4, 6, 5, 3), residual=False, batch_statistics=batch_statistics, activation=activation)
    assert_equals_plain(cat_norm_act, site, (1, 3, 2), plain_formula, error, 5e-8)  # ATen: 1/6 in float32


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_layout_and_split(cat_norm_act, split, layout, batch_statistics, make_site, plain_formula, error):
    site = make_site(
        (3, sum(split), 5, 7),
        residual=False,
        layout=layout,
        grad_layout="transposed",
        batch_statistics=batch_statistics,
    )
    z, _ = assert_equals_plain(cat_norm_act, site, split, plain_formula, error)
    if max(split) > 1:  # pieces of one channel alone may be called either
        assert z.stride() == torch.cat(pieces_of(site, split), 1).stride()


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 7), (2, 5, 3, 4, 2)], ids=str)
def test_other_dimensions(cat_norm_act, shape, make_site, plain_formula, error):
    assert_equals_plain(cat_norm_act, make_site(shape, residual=False), (2, 3), plain_formula, error)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_narrow_dtypes(cat_norm_act, dtype, tolerance, layout, batch_statistics, make_site, plain_formula, error):
    site = make_site(
        (3, 41, 6, 5),
        dtype=dtype,
        layout=layout,
        residual=False,
        batch_statistics=batch_statistics,
        activation=Activation("silu"),
    )
    z, dxs = assert_equals_plain(cat_norm_act, site, (8, 32, 1), plain_formula, error, tolerance)
    assert {t.dtype for t in (z, *dxs)} == {dtype}


@pytest.mark.parametrize("channels", [16, 48])
def test_large_results_past_the_caches(kernels, channels, make_site, plain_formula, error):
    """16 MiB and more are written past the caches, where every piece fills whole lines."""
    site = make_site((1, 3 * channels, 300, 300), dtype=torch.float32, layout="channels_last", residual=False)
    split = (channels, channels - 1, channels + 1) if channels == 16 else (channels,) * 3
    xs = [x.detach() for x in pieces_of(site, split)]
    with torch.no_grad():
        args = site.weight, site.bias, site.mean, site.var, *site.options
        assert error(ops.cat_norm_act(xs, *args), ops.norm_act(site.x, None, *args)) < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_bits_of_norm_act(kernels, dtype, layout, make_site):
    site = make_site((4, 70, 9, 5), dtype=dtype, layout=layout, residual=False, requires_grad=False)
    args = site.weight, site.bias, site.mean, site.var, *site.options
    z = ops.cat_norm_act([x.detach() for x in pieces_of(site, (64, 6))], *args)
    assert torch.equal(z, ops.norm_act(site.x, None, *args))


@pytest.mark.parametrize("which", ["weight", "bias", "both"])
def test_without_weight_or_bias(cat_norm_act, which, make_site, error):
    site = make_site((3, 6, 4, 4), residual=False)
    site = replace(site, **{name: None for name in ("weight", "bias") if which in (name, "both")})
    xs = pieces_of(site, (2, 4))
    parameters = [t for t in (site.weight, site.bias) if t is not None]
    args = site.weight, site.bias, site.mean, site.var, *site.options
    got = torch.autograd.grad(cat_norm_act(xs, *args), [*xs, *parameters], site.grad)
    want = torch.autograd.grad(ops.norm_act(torch.cat(xs, 1), None, *args), [*xs, *parameters], site.grad)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_zero_gamma(cat_norm_act, make_site, plain_formula, error):
    site = make_site((4, 5, 3, 3), residual=False)
    site = replace(site, weight=torch.zeros_like(site.weight).requires_grad_())
    _, dxs = assert_equals_plain(cat_norm_act, site, (2, 3), plain_formula, error)
    assert all(torch.count_nonzero(dx) == 0 for dx in dxs)


def test_expanded_gradient_of_a_sum(cat_norm_act, activation, make_site, plain_formula):
    site = make_site((4, 5, 3, 3), activation=activation, layout="channels_last", residual=False)
    xs = pieces_of(site, (2, 3))
    z = cat_norm_act(xs, site.weight, site.bias, site.mean, site.var, *site.options)
    got = torch.cat(torch.autograd.grad(z.sum(), xs), 1)
    (want,) = torch.autograd.grad(plain_formula(site).sum(), [site.x])
    slopes = torch.autograd.grad(plain_formula(replace(site, batch_statistics=False)).sum(), [site.x])[0]
    assert (got - want).abs().max() < 5e-8 * slopes.abs().max()


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_that_are_not_needed(cat_norm_act, needed, make_site, error):
    site = make_site((3, 6, 4, 4), residual=False)
    xs = [x.detach().requires_grad_(n) for x, n in zip(pieces_of(site, (2, 4)), needed, strict=True)]
    wanted = [*(x for x in xs if x.requires_grad), site.weight]
    args = site.weight, site.bias, site.mean, site.var, *site.options
    got = torch.autograd.grad(cat_norm_act(xs, *args), wanted, site.grad)
    want = torch.autograd.grad(ops.norm_act(torch.cat(xs, 1), None, *args), wanted, site.grad)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_one_tensor_twice(kernels, make_site, error):
    site = make_site((3, 3, 4, 4), residual=False)
    x = site.x
    grad, weight, bias, mean, var = (
        torch.cat((t, t), dim).detach()
        for t, dim in ((site.grad, 1), (site.weight, 0), (site.bias, 0), (site.mean, 0), (site.var, 0))
    )
    args = weight, bias, mean, var, *site.options
    got = torch.autograd.grad(ops.cat_norm_act([x, x], *args), x, grad)
    want = torch.autograd.grad(ops.norm_act(torch.cat((x, x), 1), None, *args), x, grad)
    assert error(got[0], want[0]) < 1e-12


def test_backward_twice_gives_the_same(cat_norm_act, make_site):
    site = make_site((3, 6, 4, 4), residual=False)
    xs = pieces_of(site, (2, 4))
    z = cat_norm_act(xs, site.weight, site.bias, site.mean, site.var, *site.options)
    first = torch.autograd.grad(z, [*xs, site.weight], site.grad, retain_graph=True)
    second = torch.autograd.grad(z, [*xs, site.weight], site.grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_gradcheck(cat_norm_act, smooth_activation, batch_statistics, make_site):
    site = make_site((3, 3, 2, 2), activation=smooth_activation, residual=False, batch_statistics=batch_statistics)

    def function(a, b, weight, bias):
        mean, var = site.mean, site.var
        if batch_statistics:
            mean, var = ops.moments(torch.cat((a, b), 1).detach())
        return cat_norm_act([a, b], weight, bias, mean, var, *site.options)

    inputs = [*pieces_of(site, (1, 2)), site.weight, site.bias]
    assert torch.autograd.gradcheck(function, inputs)
    if smooth_activation.name in ("silu", "identity"):
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kernels, layout, dtype, batch_statistics, make_site, opcheck):
    site = make_site((2, 5, 3, 4), dtype=dtype, layout=layout, residual=False, batch_statistics=batch_statistics)
    xs = pieces_of(site, (2, 3))
    values = site.weight, site.bias, site.mean, site.var
    opcheck(torch.ops.normpass.cat_norm_act.default, (xs, *values, *site.options))
    args = [t.detach() for t in xs], *(t.detach() for t in values), *site.options
    needs = [True, False, True, True]
    opcheck(torch.ops.normpass.cat_norm_act_backward.default, (site.grad.detach(), *args, needs))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 4, 1)], ids=str)
def test_opcheck_where_layouts_coincide(kernels, shape, make_site, opcheck):
    site = make_site(shape, layout="channels_last", residual=False, batch_statistics=False)
    values = site.weight, site.bias, site.mean, site.var
    opcheck(torch.ops.normpass.cat_norm_act.default, (pieces_of(site, (1, 2)), *values, *site.options))


def test_empty_batch(kernels, make_site):
    site = make_site((0, 5, 3, 3), residual=False, batch_statistics=False)
    xs = pieces_of(site, (2, 3))
    z = ops.cat_norm_act(xs, site.weight, site.bias, site.mean, site.var, *site.options)
    assert z.shape == site.x.shape
    assert [g.shape for g in torch.autograd.grad(z.sum(), xs)] == [x.shape for x in xs]
    with pytest.raises(ValueError, match="at least one value per channel"):
        ops.cat_norm_act(xs, site.weight, site.bias, site.mean, site.var, site.eps, True, "relu", [])


@pytest.mark.parametrize(
    "xs, message",
    [
        ([], "`xs` must hold one tensor at least"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)], r"`xs\[1\]` must have .*\(2, 3, 4\), got .*\(2, 3, 5\)"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double()], r"`xs\[1\]` must have .*float32.*got torch.float64"),
        ([torch.zeros(3)], r"`x` must have shape \(N, C, \*\)"),
        ([torch.zeros(2, 3, dtype=torch.int32)], "`x` must have a floating dtype"),
        ([torch.zeros(2, 2, 4), torch.zeros(2, 3, 4)], r"`mean` must have shape \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, xs, message):
    with pytest.raises(ValueError, match="normpass::cat_norm_act: " + message):
        ops.cat_norm_act(xs, None, None, torch.zeros(3), torch.ones(3), 1e-5, False)


def test_a_gradient_of_constant_statistics_is_not_lost_in_silence(make_site):
    site = make_site(residual=False, batch_statistics=False)
    site.mean.requires_grad_()
    with pytest.raises(ValueError, match="cat_norm_act: with batch_statistics=False `mean` is a constant"):
        ops.cat_norm_act([site.x], site.weight, site.bias, site.mean, site.var, *site.options)


# --- several norms that read one tensor ---------------------------------------------------------------


def two_norms(function, xs, site, other):
    """Two norms of other weights read the same pieces, in other orders."""
    a, b = xs
    values = site.weight, site.bias, site.mean, site.var
    turned = [torch.cat((t[2:], t[:2])) for t in (other.weight, other.bias, site.mean, site.var)]
    first = function([a, b], *values, *site.options)
    second = function([b, a], *turned, *site.options)
    return (first * site.grad).sum() + (second * other.grad).sum() + (a * a).sum()


def shared_readers():
    """`by_readers` for several calls: each tensor has one reader."""
    readers = {}

    def function(xs, weight, bias, mean, var, *options):
        memory_format = memory_format_of_pieces(xs)
        for x in xs:
            if id(x) not in readers:
                readers[id(x)] = Reader.apply(x, memory_format)
        read = [readers[id(x)] for x in xs]
        return CatNormAct.apply(weight, bias, mean, var, library.kernels_for("cpu"), memory_format, options, *read)

    return function


@pytest.fixture
def sites(make_site):
    if library.kernels_for("cpu") is None:
        pytest.skip(library.status()[0].words)
    return make_site((3, 6, 4, 4), residual=False), make_site((3, 6, 4, 4), residual=False, seed=1)


def gradients_of(function, site, other, **options):
    xs = pieces_of(site, (2, 4))
    return torch.autograd.grad(two_norms(function, xs, site, other), [*xs, site.weight], **options)


def test_gradients_of_several_norms_add_up(sites, error):
    want = gradients_of(ops.cat_norm_act, *sites)
    for a, b in zip(gradients_of(shared_readers(), *sites), want, strict=True):
        assert error(a, b) < 1e-12


def test_gradients_add_up_where_they_may_be_differentiated(sites, error):
    want = gradients_of(ops.cat_norm_act, *sites)
    for a, b in zip(gradients_of(shared_readers(), *sites, create_graph=True), want, strict=True):
        assert error(a, b) < 1e-12


def test_nothing_is_left_where_a_tensors_gradient_was_not_wanted(sites, error):
    site, other = sites
    xs = pieces_of(site, (2, 4))
    loss = two_norms(shared_readers(), xs, site, other)
    torch.autograd.grad(loss, [other.weight], retain_graph=True)  # the readers do not run
    got = torch.autograd.grad(loss, xs)
    want = torch.autograd.grad(two_norms(ops.cat_norm_act, xs, site, other), xs)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_nothing_is_left_by_a_backward_that_failed(sites, error):
    site, other = sites
    xs = pieces_of(site, (2, 4))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if Fails.armed:
                raise RuntimeError("no gradient")
            return grad

    Fails.armed = True
    loss = two_norms(shared_readers(), [Fails.apply(x) for x in xs], site, other)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.autograd.grad(loss, xs, retain_graph=True)
    Fails.armed = False
    got = torch.autograd.grad(loss, xs)
    want = torch.autograd.grad(two_norms(ops.cat_norm_act, xs, site, other), xs)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_a_piece_is_kept_once(sites, saved_sizes):
    site, other = sites
    xs = pieces_of(site, (2, 4))
    _, kept = saved_sizes(lambda: two_norms(shared_readers(), xs, site, other))
    whole = site.x.numel()
    assert [numel for numel in kept.values() if numel == whole] == [whole, whole]  # what the test multiplies
    assert {x.data_ptr() for x in xs} <= set(kept)
