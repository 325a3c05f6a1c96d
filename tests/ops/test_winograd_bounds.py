"""Where Winograd's convolution is not as exact as the sums it is left: tiles, weights, whole gradients."""

import pytest
import torch
import torch.nn.functional as F

from normpass import kernels as library
from normpass.ops import winograd_conv2d, winograd_weight_gradient

pytestmark = [
    pytest.mark.skipif(library.kernels_for("cpu") is None, reason="the vendor's convolutions run"),
    pytest.mark.usefixtures("always"),
]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
N, C, SIZE = 8, 32, 20


@pytest.fixture
def left(monkeypatch):
    """What was left to the vendor's of each call: a number of tiles, or "all"."""
    found = []
    kernels = library.kernels_for("cpu").winograd
    convolve, weight_gradient = kernels.convolve, kernels.weight_gradient

    def watched_convolve(*args):
        tiles = convolve(*args)
        found.append("all" if tiles is None else tiles.numel())
        return tiles

    def watched_gradient(*args):
        is_good = weight_gradient(*args)
        found.append(0 if is_good else "all")
        return is_good

    monkeypatch.setattr(kernels, "convolve", watched_convolve)
    monkeypatch.setattr(kernels, "weight_gradient", watched_gradient)
    return found


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lognormal(*shape, seed):
    return (3 * drawn(*shape, seed=seed)).exp() * drawn(*shape, seed=seed + 1).sign()


def sparse(*shape, seed, outliers=1e-4):
    chance = torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1))
    return drawn(*shape, seed=seed) * ((chance < 0.1) + 1e4 * (chance > 1 - outliers))


DATA = {
    "normal": drawn,
    "behind a ReLU": lambda *shape, seed: drawn(*shape, seed=seed).relu(),
    "lognormal": lognormal,
    "sparse with outliers": sparse,
    "sparse with few outliers": lambda *shape, seed: sparse(*shape, seed=seed, outliers=2e-6),
}


def operands(make, layout="channels_last", channels=C, results=C, size=SIZE, samples=N):
    memory_format = FORMATS[layout]
    x = make(samples, channels, size, size, seed=10).contiguous(memory_format=memory_format)
    grad = make(samples, results, size, size, seed=20).contiguous(memory_format=memory_format)
    weight = (drawn(results, channels, 3, 3, seed=30) / (9 * channels) ** 0.5).contiguous(memory_format=memory_format)
    return x, weight, grad


def all_three(x, weight, grad, padding=(1, 1)):
    return (
        winograd_conv2d(x, weight, None, padding),
        winograd_conv2d(grad, weight, None, padding, transposed=True),
        winograd_weight_gradient(grad, x, padding),
    )


def vendor(*args):
    with library.disabled("winograd"):
        return all_three(*args)


@pytest.mark.parametrize("channels", [16, 32, 512])
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("data", list(DATA))
def test_within_four_times_the_vendors_error(data, layout, channels):
    """The largest error and the mean, and beside the sum of the magnitudes that each result reads, in all channels."""
    size = {"channels": channels, "samples": 2, "size": 14} if channels > C else {"channels": channels}
    given = operands(DATA[data], layout, **size)
    exact, own, other = all_three(*(t.double() for t in given)), all_three(*given), vendor(*given)
    x, weight, grad = (t.double().abs() for t in given)
    x, grad = x.mean(1, keepdim=True), grad.mean(1, keepdim=True)
    read = vendor(x, torch.ones(1, 1, 3, 3).double(), grad)
    for a, b, true, scale in zip(own, other, exact, read, strict=True):
        errors = [(t - true).abs() for t in (a, b)]
        mine, its = ([e.max(), e.mean(), (e / scale.clamp(min=1e-30)).max()] for e in errors)
        assert all(m <= 4 * i for m, i in zip(mine, its, strict=True)), (mine, its)


def test_data_of_one_size_are_not_left(left):
    for data in ("normal", "behind a ReLU"):
        for layout in FORMATS:
            for size in (7, 8, 20):
                all_three(*operands(DATA[data], layout, size=size, samples=16))
    assert left == [0] * len(left) and len(left) == 36


def test_a_large_value_spoils_no_neighbour(left):
    """Each result is that without it where it is not read, to the bit or to its own rounding."""
    for layout in FORMATS:
        for at in ((11, 11), (0, 0), (19, 19), (0, 10), (19, 6), (12, 12)):
            x, weight, _ = operands(drawn, layout)
            before = winograd_conv2d(x, weight, None, (1, 1))
            for size in (1e6, 1e18, 2e38, float("inf"), float("nan")):
                x[2, 5, at[0], at[1]] = size
                after = winograd_conv2d(x, weight, None, (1, 1))
                expected = F.conv2d(x, weight, padding=1)
                read = torch.zeros(N, 1, SIZE, SIZE, dtype=torch.bool)
                read[2, 0, max(0, at[0] - 1) : at[0] + 2, max(0, at[1] - 1) : at[1] + 2] = True
                assert torch.allclose(after.masked_fill(read, 0), before.masked_fill(read, 0), rtol=0, atol=2e-6)
                assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert set(left) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (2, 0)])
@pytest.mark.parametrize("size", [5, 8, 9])
def test_tiles_at_every_place(size, padding):
    """Whichever tile is left, its results come from where they should: odd sizes, edges, transposed."""
    for layout in FORMATS:
        for transposed in (False, True):
            x, weight, _ = operands(drawn, layout, size=size, samples=16)
            if transposed and min(size - 2 * p + 2 for p in padding) < 1:
                continue
            place = [(n, *divmod(n * 7 % size**2, size)) for n in range(0, 16, 3)]
            for n, row, column in place:
                x[n, 3, row, column] = 1e12
            got = winograd_conv2d(x, weight, None, padding, transposed)
            expected = winograd_conv2d(x.double(), weight.double(), None, padding, transposed)
            bound = winograd_conv2d(x.double().abs(), weight.double().abs(), None, padding, transposed)
            assert ((got - expected).abs() <= 1e-6 * bound).all()


def masked(weight):
    weight[:, :, 1, 2:] = 0
    weight[:, :, 2] = 0


def zero_tap(weight):
    weight[:, :, 0, 2] = 0


def zero_tap_of_a_group(weight):
    weight[:8, 16:24, 1, 1] = 0


def zero_tap_of_a_result(weight):
    weight[7, :, 0, 1] = 0


def zero_tap_of_a_source(weight):
    weight[:, 7, 0, 1] = 0


def small_tap(weight):
    weight[:, :, 2, 0] *= 1e-3


def not_a_number(weight):
    weight[3, 4, 0, 0] = float("nan")


def infinite(weight):
    weight[3, 4, 2, 2] = float("inf")


def huge(weight):
    weight[3, 4, 1, 1] = 1e20


NO_WEIGHT = [
    masked,
    zero_tap,
    zero_tap_of_a_group,
    zero_tap_of_a_result,
    zero_tap_of_a_source,
    small_tap,
    not_a_number,
    infinite,
    huge,
]


@pytest.mark.parametrize("change", NO_WEIGHT)
@pytest.mark.parametrize("layout", list(FORMATS))
def test_weights_that_are_left(change, layout, left):
    x, weight, grad = operands(drawn, layout)
    change(weight)
    y, dx, _ = all_three(x, weight, grad)
    assert left == ["all", "all", 0]
    expected = vendor(x, weight, grad)
    assert torch.equal(y.nan_to_num(7), expected[0].nan_to_num(7))
    assert torch.equal(dx.nan_to_num(7), expected[1].nan_to_num(7))


def test_weights_that_are_not(left):
    """Dead channels, no weight at all, a zero by chance."""
    x, weight, _ = operands(drawn, channels=64, results=64)
    for place in ((slice(3, 5),), (slice(None), slice(3, 9)), (), (3, 4, 0, 0)):
        changed = weight.clone()
        changed[place] = 0
        winograd_conv2d(x, changed, None, (1, 1))
    assert left == [0] * 4


def test_where_most_tiles_are_uneven_all_are_left(left):
    x, weight, grad = operands(lognormal)
    got, expected = all_three(x, weight, grad), vendor(x, weight, grad)
    assert left == ["all"] * 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_large_values_in_one_place_of_both(left):
    """Eight of nine taps know nothing of their product."""
    for samples in (1, 8, 16):
        x, weight, grad = operands(drawn, samples=samples)
        x[:, :, 9, 9], grad[:, :, 9, 9] = 1e6, 1e6
        got = winograd_weight_gradient(grad, x, (1, 1))
        with library.disabled("winograd"):
            expected = winograd_weight_gradient(grad, x, (1, 1))
        assert torch.equal(got, expected)
    assert left == ["all"] * 3


def test_gradients_that_are_not_finite():
    """As plain's: infinities and NaNs at the taps that read them."""
    for value in (float("inf"), float("nan"), 2e38):
        for which, results in ((0, C), (1, C), (1, 1)):
            pair = list(operands(drawn, results=results, samples=2)[::2])
            pair[which][1, 0, 0, 5] = value
            x, grad = pair
            got = winograd_weight_gradient(grad, x, (1, 1))
            with library.disabled("winograd"):
                expected = winograd_weight_gradient(grad, x, (1, 1))
            assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_threads_decide_alike(left):
    x, weight, grad = operands(lambda *shape, seed: sparse(*shape, seed=seed, outliers=2e-6))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results = [all_three(x, weight, grad) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            found.append(results[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert len({str(left[i : i + 2]) for i in range(0, len(left), 3)}) == 1


def test_the_switch(left):
    given = operands(drawn)
    with library.disabled("winograd"):
        assert library.kernels_for("cpu").winograd is None and library.is_disabled("winograd")
        all_three(*given)
    assert not left and library.kernels_for("cpu").winograd is not None
    with (
        pytest.raises(ValueError, match=r'`name` is "conv", it must be one of all, winograd'),
        library.disabled("conv"),
    ):
        pass
