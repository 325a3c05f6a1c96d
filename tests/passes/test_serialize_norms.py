"""Norm, activation, convolution and moments block by block: the same numbers, and only where it is asked for."""

import copy

import pytest
import torch
from sub_batches import Bottleneck
from torch import fx, nn
from training import assert_equal, image, spread, train

import normpass
from normpass.bench.serialized import as_function, tuned
from normpass.graph.nodes import key_of
from normpass.measure import kept_bytes
from normpass.passes.graph.serialize_norms import SerializeNorms
from normpass.pipeline import Request, rewrite
from normpass.recipe.notes import recording
from normpass.runtime.functional import split_norm_act
from normpass.runtime.norm_blocks import merge_moments, norm_act_with_moments, serial_norm_act_conv
from normpass.serialize.traffic import graph_of

KINDS = {
    "1x1": dict(kernel_size=1),
    "3x3": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=3, padding=1, stride=2),
    "1x1 stride": dict(kernel_size=1, stride=2),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "dilation, no bias": dict(kernel_size=3, dilation=2, bias=False),
}


def layers(kind="1x1", dtype=torch.float64, affine=True, channels=6, out=8):
    torch.manual_seed(0)
    norm, conv, behind = (
        nn.BatchNorm2d(channels, affine=affine),
        nn.Conv2d(channels, out, **KINDS[kind]),
        nn.BatchNorm2d(out),
    )
    return spread(nn.ModuleList([norm, conv, behind])).to(dtype)


def plain(modules, x):
    norm, conv, behind = modules
    return torch.relu(behind(conv(nn.functional.silu(norm(x)))))


def blocked(modules, x, block_bytes):
    norm, conv, behind = modules
    c, moments = serial_norm_act_conv(as_function(norm), x, None, "silu", [], block_bytes, *arguments(conv))
    return norm_act_with_moments(as_function(behind), c, moments, None, "relu", [], ""), moments


def arguments(conv):
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_bytes", [1, 4000, 12000])
def test_the_same_numbers(kind, channels_last, block_bytes):
    modules = layers(kind)
    x = image(5, 6, 9, 9) + 1
    if channels_last:
        x, modules = x.to(memory_format=torch.channels_last), modules.to(memory_format=torch.channels_last)
    x.requires_grad_()
    other = copy.deepcopy(modules)
    y = plain(modules, x)
    z, moments = blocked(other, x, block_bytes)
    assert moments is not None and z.stride() == y.stride()
    grad = image(*y.shape, seed=2)
    expected = torch.autograd.grad(y, [x, *modules.parameters()], grad)
    found = torch.autograd.grad(z, [x, *other.parameters()], grad)
    scale = max(float(a.abs().max()) for a in expected)
    for a, b in zip((y, *expected), (z, *found), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * scale)
    for (name, a), b in zip(modules.named_buffers(), other.buffers(), strict=True):
        if "num_batches" in name:
            continue  # counted by a node of its own
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["eval", "no affine", "input", "weights"])
def test_norms_in_eval_mode_and_what_is_frozen(frozen):
    modules = layers("3x3", affine=frozen != "no affine")
    x = image(5, 6, 9, 9).requires_grad_(frozen != "input")
    modules[0].train(frozen != "eval")
    if frozen == "weights":
        modules[1].weight.requires_grad_(False)
        modules[0].bias.requires_grad_(False)
    other = copy.deepcopy(modules)
    inputs = [[t for t in (x, *m.parameters()) if t.requires_grad] for m in (modules, other)]
    y, (z, _) = plain(modules, x), blocked(other, x, 4000)
    grad = image(*y.shape, seed=2)
    for a, b in zip(torch.autograd.grad(y, inputs[0], grad), torch.autograd.grad(z, inputs[1], grad), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-11)


def test_second_derivatives():
    def penalty(y, x, modules):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *modules.parameters()], allow_unused=True)

    modules = layers("3x3")
    x = image(3, 6, 5, 5, requires_grad=True)
    expected = penalty(plain(modules, x), x, modules)
    other = copy.deepcopy(modules)
    found = penalty(blocked(other, x, 1)[0], x, other)
    scale = max(float(a.abs().max()) for a in expected if a is not None)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrower_dtypes(dtype, bound):
    modules, x = layers("1x1"), image(16, 6, 9, 9)
    reference = plain(modules, x)
    narrow = copy.deepcopy(modules).to(dtype)
    x = x.to(dtype).to(memory_format=torch.channels_last)
    found, _ = blocked(narrow, x.requires_grad_(), 4000)
    assert found.dtype == dtype
    apart = (found.double() - reference).abs().mean() / reference.abs().mean()
    assert apart < bound
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in narrow.parameters())


def test_autocast():
    modules = layers("3x3", torch.float32)
    x = image(6, 6, 9, 9).bfloat16().requires_grad_()
    other = copy.deepcopy(modules)
    with torch.autocast("cpu", torch.bfloat16):
        y, (z, moments) = plain(modules, x), blocked(other, x, 3000)
    assert moments is not None and z.dtype == y.dtype
    y.float().square().mean().backward()
    expected, x.grad = [x.grad, *(p.grad for p in modules.parameters())], None
    z.float().square().mean().backward()
    found = [x.grad, *(p.grad for p in other.parameters())]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=0, atol=3e-2 * float(a.abs().max()) + 1e-4)


def test_moments_are_merged_exactly():
    x = torch.randn(1000, 4, dtype=torch.float64) * 3 + 1e4
    sizes = [1, 99, 400, 500]
    parts = [(len(p), p.mean(0), p.var(0, correction=0)) for p in x.split(sizes)]
    mean, var = merge_moments(parts)
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(var, x.var(0, correction=0), rtol=1e-10, atol=0)


def test_only_x_is_kept():
    modules, x = layers("1x1", torch.float32, channels=8, out=8), torch.randn(8, 8, 16, 16).requires_grad_()
    x = x.to(memory_format=torch.channels_last).detach().requires_grad_()

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_ = modules

        def forward(self, x):
            with recording():
                norm, conv = as_function(modules[0]), arguments(modules[1])
                return serial_norm_act_conv(norm, x, None, "relu", [], 20000, *conv)[0]

    assert kept_bytes(Region(), x) < 2000


def test_what_cannot_be_divided_runs_whole():
    modules, x = layers("3x3"), image(5, 6, 9, 9)
    assert blocked(modules, x, 10**9)[1] is None  # one block
    wide = copy.deepcopy(modules)
    wide[1].float()
    with pytest.raises(RuntimeError, match="type"):  # of the convolution itself
        blocked(wide, x, 1)


# --- in a graph -------------------------------------------------------------------------------------


class Projected(Bottleneck):
    """The projection is added out of place: what it is added to is then no norm's result that is written to."""

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        return self.relu(self.bn3(self.conv3(h)) + self.project(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.block = Bottleneck(nn.BatchNorm2d, 8, 4, 8)
        self.last = Projected(nn.BatchNorm2d, 8, 4, 16, 2)

    def forward(self, x):
        return self.last(self.block(self.act(self.bn(self.conv(x))))).mean((2, 3))


INNER = ("block.conv2", "block.conv3", "last.conv2", "last.conv3")


class Rewritten:
    """A forward after the ordinary rewrites and this one, a graph for each mode; `graph` is that of training."""

    def __init__(self, model, **options):
        self.model, self.rewrite, self.programs = model, SerializeNorms(**options), {}
        self.graph = self.program(torch.randn(5, 3, 9, 9, dtype=next(model.parameters()).dtype))[0].graph

    def program(self, x):
        if self.model.training not in self.programs:
            program, values = graph_of(self.model, x)
            rewritten = rewrite(program, values, Request())
            program, facts = rewritten.graph_module, rewritten.found.facts
            graph = program.graph
            self.matched, refusals = self.rewrite.match(graph, facts)
            self.reasons = {refusal.path: refusal.reason for refusal in refusals}
            self.done = self.rewrite.apply(graph, facts).done
            graph.lint()
            place = next(index for index, value in enumerate(values) if value is x)
            self.programs[self.model.training] = fx.GraphModule(program, graph), values, place
        return self.programs[self.model.training]

    def __call__(self, _, x):
        program, values, place = self.program(x)
        with recording():
            return program(*values[:place], x, *values[place + 1 :])[0]


def test_nothing_is_done_unless_it_is_named():
    found = Rewritten(Net())
    assert set(found.matched) == set(INNER) and found.done == ()
    assert not any(n.target in (serial_norm_act_conv, norm_act_with_moments) for n in found.graph.nodes)
    assert "other readers" in found.reasons["block.conv1"]


@pytest.mark.parametrize("paths", [INNER, ("block.conv2",), ("last.conv3", "elsewhere")])
def test_trains_the_same_in_a_network(paths):
    model = spread(Net())
    other = copy.deepcopy(model)
    run = Rewritten(other, block_bytes=3000, paths=paths)
    assert set(run.done) == set(paths) & set(INNER)
    assert sum(n.target is serial_norm_act_conv for n in run.graph.nodes) == len(run.done)
    x = image(5, 3, 9, 9, requires_grad=True)
    assert_equal(train(model, (x,)), train(other, (x,), run=run))


def test_moments_are_taken_once(monkeypatch):
    """Of what is made block by block no norm takes the moments again."""
    import normpass.runtime.functional as functional

    counted = []
    original = functional.moments_with_update
    monkeypatch.setattr(functional, "moments_with_update", lambda k, x, r: counted.append(x.shape) or original(k, x, r))
    for paths, expected in (((), 8), (INNER, 4)):
        run = Rewritten(Net(), block_bytes=3000, paths=paths)
        counted.clear()
        run(None, torch.randn(5, 3, 9, 9))
        assert len(counted) == expected


def test_a_chain_passes_moments_on():
    graph = Rewritten(Net(), paths=INNER).graph
    calls = [n for n in graph.nodes if n.target is serial_norm_act_conv]
    given = [n.args[2] is not None for n in calls]
    assert given == [False, True, False, True]
    assert not any(n.target is split_norm_act and key_of(n).endswith(("bn2", "bn3")) for n in graph.nodes)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: setattr(m.block, "conv2", nn.Conv2d(4, 4, 3, padding="same")), "padding 'same'"),
        (lambda m: setattr(m.block, "bn2", nn.GroupNorm(2, 4)), "no batch norm alone reads its result"),
    ],
)
def test_convolutions_that_are_refused(change, reason):
    model = Net()
    change(model)
    found = Rewritten(model, paths=INNER)
    assert "block.conv2" not in (*found.matched, *found.done) and reason in found.reasons["block.conv2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.block, "conv2", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        lambda m: m.block.conv2.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ],
)
def test_something_between_norm_and_convolution(change):
    """A padding or a hook is a node like any other: the convolution does not read the norm's result."""
    model = Net()
    change(model)
    spread(model)
    other = copy.deepcopy(model)
    run = Rewritten(other, block_bytes=3000, paths=INNER)
    assert "block.conv2" not in (*run.matched, *run.reasons) and "block.conv3" in run.done
    x = image(5, 3, 9, 9, requires_grad=True)
    assert_equal(train(model, (x,)), train(other, (x,), run=run))


# --- tuning -----------------------------------------------------------------------------------------


def test_tuning_returns_a_block_only_if_one_is_faster():
    norm, conv, _ = layers("1x1", torch.float32)
    x = torch.randn(8, 6, 9, 9).to(memory_format=torch.channels_last)
    before = copy.deepcopy(norm.state_dict())
    best, ratios = tuned(norm, conv, x, blocks=(2000, 8000), rounds=2)
    assert set(ratios) == {2000, 8000} and all(r > 0 for r in ratios.values())
    assert best == (min(ratios, key=ratios.get) if min(ratios.values()) < 1 else None)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert norm.weight.grad is None


# --- optimize ---------------------------------------------------------------------------------------


class SeesStatistics(Net):
    """Reads the running statistics of the norm before a convolution that is named, before that runs."""

    def forward(self, x):
        block, x = self.block, self.act(self.bn(self.conv(x)))
        y = torch.relu(block.bn1(block.conv1(x)))
        seen = block.bn1.running_mean.sum()
        return block.conv3(torch.relu(block.bn2(block.conv2(y)))) * seen


def test_what_is_named_runs_block_by_block():
    rewrite = SerializeNorms(block_bytes=3000, paths=("block.conv2", "last.conv3", "block"))
    model, x = spread(Net()), image(5, 3, 9, 9, requires_grad=True)
    optimized = normpass.optimize(copy.deepcopy(model), serialize=rewrite)
    assert_equal(train(copy.deepcopy(model), (x,)), train(optimized, (x,)))
    regions = normpass.explain(model, x.detach(), serialize=rewrite).regions
    assert [line for line in regions if "block by block" in line] == [
        "block.conv2: block by block, with the norm before it",
        "last.conv3: block by block, with the norm before it",
    ]
    assert "block.conv3 may be named in `paths`" in regions
    assert "block runs whole: no convolution behind a norm has this name" in regions
    assert any(line.startswith("block.conv1 runs whole: the norm's result has other readers") for line in regions)


def test_no_norm_passes_who_reads_its_statistics():
    rewrite = SerializeNorms(block_bytes=3000, paths=("block.conv2",))
    model, x = spread(SeesStatistics()), image(5, 3, 9, 9, requires_grad=True)
    optimized = normpass.optimize(copy.deepcopy(model), serialize=rewrite)
    assert_equal(train(copy.deepcopy(model), (x,)), train(optimized, (x,)))
    (line,) = [r for r in normpass.explain(model, x.detach(), serialize=rewrite).regions if "block.conv2" in r]
    assert "something else sees the parameters or statistics of the norm" in line


@pytest.mark.parametrize("options", [{"block_bytes": 0}, {"block_bytes": "1MB"}, {"paths": "block.conv2"}])
def test_wrong_options(options):
    with pytest.raises(normpass.InvalidInputError, match=next(iter(options))):
        SerializeNorms(**options)
