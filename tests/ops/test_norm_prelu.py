"""PReLU behind a batch, group or instance norm: against the plain formula, in every layout, size and dtype."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_trains_alike, image, rewrites

import normpass
from normpass import kernels
from normpass.measure import kept_bytes, peak_bytes
from normpass.ops.group_norm_act import GroupNormOptions
from normpass.ops.norm_prelu import (
    PLACEHOLDER,
    BatchNormCall,
    GroupNormCall,
    NormPrelu,
    norm_prelu_on,
    rebuild_norm_prelu,
)

pytestmark = pytest.mark.skipif(kernels.kernels_for("cpu") is None, reason="the C++ kernels are not built")

SIZES = [(6, 8), (3, 8, 7), (2, 8, 5, 6), (1, 8, 4, 4), (2, 8, 3, 4, 2), (2, 64, 31, 33), (1, 8, 1, 90001)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = ("batch", "running", "group", "instance")


def call_of(kind: str, channels: int):
    if kind in ("batch", "running"):
        return BatchNormCall(1e-5, kind == "batch")
    groups = 4 if kind == "group" else channels
    return GroupNormCall(GroupNormOptions(groups, 1e-5, *PLACEHOLDER, kind == "instance"))


def tensors(size, is_last=False, slopes=None, affine=True, dtype=torch.float64, offset=1.0):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64) * 2 + offset
    x = x.contiguous(memory_format=LAST[x.dim()]) if is_last and x.dim() in LAST else x
    vectors = [torch.rand(size[1], dtype=torch.float64) - 0.3, torch.randn(size[1], dtype=torch.float64)]
    slope = torch.randn(slopes or size[1], dtype=torch.float64)
    found = [x.to(dtype), *[v.to(dtype) if affine else None for v in vectors], slope.to(dtype)]
    return [t if t is None else t.detach().requires_grad_() for t in found]


def statistics(kind, x):
    if kind in ("group", "instance"):
        return None, None
    wide = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    return (mean + 0.1, var * 1.2) if kind == "running" else (mean, var)


def plain(call, x, weight, bias, slope, mean, var):
    return F.prelu(call.formula(x, (weight, bias, mean, var)), slope)


def ours(call, *given):
    return norm_prelu_on("cpu", *given, call)[0]


def results(function, given, grad):
    leaves = [t for t in given[:4] if t is not None]
    z = function(*given)
    return [z.detach(), *torch.autograd.grad(z, leaves, grad)]


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_formula(kind):
    for size in SIZES:
        for is_last, slopes, affine in ((False, None, True), (True, 1, True), (True, None, False)):
            given = tensors(size, is_last, slopes, affine)
            given += statistics(kind, given[0])
            call, grad = call_of(kind, size[1]), torch.randn(size, dtype=torch.float64)
            expected = results(lambda *a, c=call: plain(c, *a), given, grad)
            for found, want in zip(results(lambda *a, c=call: ours(c, *a), given, grad), expected, strict=True):
                scale = max(1.0, float(want.abs().max()))
                torch.testing.assert_close(found, want, rtol=0, atol=2e-12 * scale * max(1, want.numel() == 1) * 10)
                assert found.shape == want.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrower_numbers_are_as_good_as_plains(kind, dtype):
    """No farther from float64 than plain's, but for one rounding."""
    for is_last in (False, True):
        given = tensors((4, 8, 9, 9), is_last, dtype=dtype)
        wide = [t if t is None else t.detach().double().requires_grad_() for t in given]
        given, wide = [*given, *statistics(kind, given[0])], [*wide, *statistics(kind, given[0].double())]
        call, grad = call_of(kind, 8), torch.randn(4, 8, 9, 9).to(dtype)
        want = results(lambda *a, c=call: plain(c, *a), wide, grad.double())
        theirs = results(lambda *a, c=call: plain(c, *a).to(dtype), given, grad)
        for found, other, exact in zip(results(lambda *a, c=call: ours(c, *a), given, grad), theirs, want, strict=True):
            scale = float(exact.abs().max())
            error, allowed = (found.double() - exact).abs().max(), (other.double() - exact).abs().max()
            roundings = 1 if exact.dim() > 1 else 4  # of sums
            assert error <= 1.5 * allowed + roundings * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind):
    size = (3, 4, 3, 2)
    for slopes in (1, 4):
        given = tensors(size, slopes=slopes)
        mean, var = statistics(kind, given[0])
        call = call_of(kind, 4)

        def function(x, weight, bias, slope, c=call, m=mean, v=var):
            if c == BatchNormCall(1e-5, True):
                v, m = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            return ours(c, x, weight, bias, slope, m, v)

        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nans_are_where_plain_has_them(value):
    for kind in ("running", "batch"):
        given = tensors((2, 4, 8, 8), dtype=torch.float32)
        with torch.no_grad():
            given[0][1, 2, 0, 7] = value
        given += statistics(kind, given[0])
        call, grad = call_of(kind, 4), torch.randn(2, 4, 8, 8)
        x, weight, bias, slope, mean, var = given
        moments = (None, None) if kind == "batch" else (mean, var)

        def by_torch(x, weight, bias, slope, *_, m=moments, k=kind):
            return F.prelu(F.batch_norm(x, *m, weight, bias, k == "batch"), slope)

        expected = results(by_torch, given, grad)
        for found, want in zip(results(lambda *a, c=call: ours(c, *a), given, grad), expected, strict=True):
            assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isinf(), want.isinf())


def test_z_is_made_again_to_the_bit_and_only_what_is_needed_is_computed():
    given = tensors((2, 8, 5, 6), dtype=torch.float32)
    call = call_of("group", 8)
    z, mean, var = norm_prelu_on("cpu", *given, None, None, call)
    assert torch.equal(rebuild_norm_prelu(*given, mean, var, call), z)
    x, weight, bias, slope = (t.detach() for t in given)
    for i in range(4):
        leaves = [x, weight, bias, slope]
        leaves[i] = leaves[i].clone().requires_grad_()
        (got,) = torch.autograd.grad(NormPrelu.apply(*leaves, None, None, "cpu", call)[0].sum(), leaves[i])
        whole = torch.autograd.grad(norm_prelu_on("cpu", *given, None, None, call)[0].sum(), given[i])[0]
        torch.testing.assert_close(got, whole)


class Net(nn.Module):
    def __init__(self, norm, slopes=1, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(count))
        self.norms = nn.ModuleList(norm(8) for _ in range(count))
        self.acts = nn.ModuleList(nn.PReLU(slopes) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
            x = act(norm(conv(x)))
        return x


NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "layer": lambda c: nn.LayerNorm([c, 8, 8]),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_trains_alike(norm):
    for slopes, last in ((1, False), (8, True)):
        model, x = Net(NORMS[norm], slopes).double(), image(requires_grad=True)
        if last:
            model = model.to(memory_format=torch.channels_last)
        assert_trains_alike(model, x)
    assert set(rewrites(model, x).values()) <= {"split_bn", "fuse_norm_act", "split_norm"}


def test_what_is_kept_is_what_was_planned():
    for norm in ("batch", "group", "instance"):
        layers = [(nn.Conv2d(16, 16, 3, padding=1), NORMS[norm](16), nn.PReLU(16)) for _ in range(8)]
        model, x = nn.Sequential(*[layer for three in layers for layer in three]), torch.randn(2, 16, 32, 32)
        optimized = normpass.optimize(copy.deepcopy(model))
        plain_bytes, kept = kept_bytes(model, x), kept_bytes(optimized, x)
        assert kept <= 0.36 * plain_bytes
        (graph,) = normpass.explain(model, x).graphs
        assert abs(graph.kept_after - kept) <= 0.001 * kept
        assert peak_bytes(optimized, x) <= peak_bytes(model, x)


@pytest.mark.parametrize("what", ["weight", "slope", "bias"])
def test_a_vector_that_changes_before_backward(what):
    """As with plain layers: the weight and the slope are refused, the bias is not noticed."""
    outcomes = []
    for make in (lambda m: m, normpass.optimize):
        model = make(Net(nn.BatchNorm2d).double())
        loss = model(image()).sin().sum()
        with torch.no_grad():
            {"weight": model.norms[0].weight, "bias": model.norms[0].bias, "slope": model.acts[0].weight}[what].mul_(2)
        try:
            loss.backward()
            outcomes.append([p.grad for p in model.parameters()])
        except RuntimeError as error:
            outcomes.append(str(error).partition(":")[0])
    if what == "bias":
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    else:
        assert isinstance(outcomes[0], str) and outcomes[0] == outcomes[1]


class Around(nn.Module):
    """A PReLU that cannot be one with its norm, or not quite."""

    def __init__(self, tail):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.act, self.second = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.PReLU(4),
            nn.Conv2d(4, 4, 1),
        )
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.tail(self, self.norm(self.first(x))))


TAILS = {
    "a computed slope": lambda m, y: F.prelu(y, m.act.weight.abs()),
    "two readers": lambda m, y: F.prelu(y, m.act.weight) + y,
    "written afterwards": lambda m, y: F.prelu(y, m.act.weight).mul_(2.0).add_(1.0),
    "no gradient of the slope": lambda m, y: F.prelu(y, m.act.weight.detach()),
    "a join": lambda m, y: F.prelu(y + y.mean(), m.act.weight),
    "twice": lambda m, y: m.act(m.act(y)),
}


@pytest.mark.parametrize("name", TAILS)
def test_around_a_prelu(name):
    assert_trains_alike(Around(TAILS[name]).double(), image(requires_grad=True))


def test_concatenations_are_still_not_stored():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * i) for i in range(3))
            self.acts = nn.ModuleList(nn.PReLU() for _ in range(3))

        def forward(self, x):
            pieces = [x * 1]
            for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
                pieces.append(conv(act(norm(torch.cat(pieces, 1)))))
            return pieces[-1]

    model, x = Dense().double(), image(requires_grad=True)
    assert "share_statistics" in rewrites(model, x).values()
    assert_trains_alike(model, x)


def test_a_gradient_penalty_autocast_and_a_compiler():
    grads = []
    for make in (lambda m: m, normpass.optimize):
        model, x = make(Net(nn.BatchNorm2d).double()), image(requires_grad=True)
        (inner,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        (inner.square().sum() + model(x).sum()).backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    model, x = Net(NORMS["group"]), image().float()
    optimized, outputs = normpass.optimize(copy.deepcopy(model)), []
    for m in (model, optimized):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(m(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0.05)
    compiled = torch.compile(copy.deepcopy(model), backend="normpass", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_kernels_switched_off_between_forward_and_backward():
    model = Net(nn.BatchNorm2d).double()
    optimized = normpass.optimize(copy.deepcopy(model))
    optimized(image()).sum().backward()
    optimized.zero_grad()
    loss = optimized(image()).sin().sum()
    with kernels.disabled():
        loss.backward()
    model(image()).sum()
    model(image()).sin().sum().backward()
    for a, b in zip(model.parameters(), optimized.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


def test_strides_are_plains():
    """Of results and gradients, where dimensions of one value are too."""
    for size in ((1, 4, 3, 3), (2, 4, 1, 3), (2, 4, 1, 1), (2, 1, 3, 3), (1, 4, 1, 5)):
        for is_last in (False, True):
            for norm in (nn.BatchNorm2d(size[1]), nn.GroupNorm(1, size[1])):
                model = nn.Sequential(norm, nn.PReLU(size[1])).double()
                optimized = normpass.optimize(copy.deepcopy(model))
                x = torch.randn(size, dtype=torch.float64)
                x = (x.contiguous(memory_format=torch.channels_last) if is_last else x).requires_grad_()
                outs = [m(x * 1) for m in (model, optimized)]
                assert outs[0].stride() == outs[1].stride(), (size, is_last, norm)
                torch.testing.assert_close(outs[0], outs[1])
