"""One of some processes with SyncBatchNorms: `run_processes("sync_worker.py", WORLD, …, CHECK…)`.

Each check is a function of this process's rank and the parts of the batch; all run in the same processes.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import begin, end
from sync_training import check, optimized, summed, synced, trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import spread

import normpass
from normpass import kernels
from normpass.capture.dynamo import raising
from normpass.collect import captured_graphs
from normpass.measure.memory import profiled
from normpass.passes import SerializeMinibatch, SerializeNorms
from normpass.pipeline import Request

C = 4
Sizes = Sequence[int]


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Net(nn.Module):
    """A residual block and a norm that is used twice."""

    def __init__(self, act: nn.Module | None = None, **options: object):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C, **options), act or nn.ReLU())
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C, **options)
        self.act = act or nn.ReLU()
        self.last = nn.Conv2d(2 * C, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.act(self.norm(self.conv(h)) + h)
        return self.last(self.act(self.norm(torch.cat([self.conv(h), h], 1)[:, C:])).repeat(1, 2, 1, 1))


def net(*args: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return spread(Net(*args, **options))


def collectives_of(call: Callable[[], object]) -> list[tuple[str, int]]:
    """The collectives of a call, each with how many values every process gives."""
    with profiled(shapes=True) as events:
        call()
    found = (e for e in events if e.kind() == "push" and e.name().startswith("_c10d_functional::a"))
    return [(e.name().rpartition(":")[2], e.shapes()[0][0]) for e in found]


# --- one process with the whole batch ---------------------------------------------------------------


def check_networks(rank: int, sizes: Sizes) -> None:
    """Activations, and what a norm may be without."""
    x = image(sum(sizes), 3, 6, 6)
    check(net(), x, sizes, rank)
    check(net(nn.SiLU(), momentum=None), x, sizes, rank)
    check(net(nn.ELU(), affine=False), x, sizes, rank)
    check(net(nn.LeakyReLU(0.1), track_running_stats=False), x, sizes, rank)
    check(net(nn.Hardswish()).requires_grad_(False), x.clone().requires_grad_(), sizes, rank)
    check(net(nn.Softplus()), x.to(memory_format=torch.channels_last).requires_grad_(), sizes, rank)


def check_dimensions(rank: int, sizes: Sizes) -> None:
    """Rows, signals, volumes, and one value per channel and process."""
    torch.manual_seed(1)
    rows = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    signals = nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.SiLU(), nn.Conv1d(6, 2, 1))
    volumes = nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 2, 1))
    total = sum(sizes)
    for model, shape in ((rows, (5,)), (signals, (5, 7)), (volumes, (2, 3, 4, 3))):
        check(spread(model), image(total, *shape).requires_grad_(), sizes, rank)


def check_modes(rank: int, sizes: Sizes) -> None:
    """Eval mode, a frozen norm and a group of one process: no collective, the numbers of BatchNorm."""
    own = image(sum(sizes), 3, 6, 6)[: max(sizes)]
    plain, model = net(), optimized(net())
    for m in (plain, model):
        m.train()
        m.stem[1].eval()
        m.norm.eval()
    found = collectives_of(lambda: torch.testing.assert_close(model(own), plain(own)))
    alone = [dist.new_group([r]) for r in range(len(sizes))][rank]
    single = normpass.optimize(nn.SyncBatchNorm.convert_sync_batchnorm(net(), alone))
    found += collectives_of(lambda: torch.testing.assert_close(single(own), net()(own)))
    found += collectives_of(lambda: torch.testing.assert_close(optimized(net()).eval()(own), net().eval()(own)))
    assert not found, found


def check_groups(rank: int, sizes: Sizes) -> None:
    """A group that is not the default one; one that is changed after the first call."""
    everyone = dist.new_group(list(range(len(sizes))))
    check(
        net(),
        image(sum(sizes), 3, 6, 6),
        sizes,
        rank,
        lambda m: normpass.optimize(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m), everyone)),
    )
    alone = [dist.new_group([r]) for r in range(len(sizes))][rank]
    model, own = optimized(net()), image(5, 3, 6, 6)
    before = model(own[rank:])
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.process_group = alone
    torch.testing.assert_close(model(own[rank:]), net()(own[rank:]))
    assert not torch.allclose(before, model(own[rank:]))


def check_dtypes(rank: int, sizes: Sizes) -> None:
    """float32, bfloat16 and autocast: as near to float64 as rounding allows."""
    x, first = image(sum(sizes), 3, 6, 6), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    whole = _one_step(net(), x, slice(0, len(x)), len(x))
    for dtype, autocast, limit in (
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.1),
        (torch.float32, True, 0.1),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            own = _one_step(optimized(net().to(dtype)), x[mine].to(dtype), mine, len(x))
        for found, expected, part in zip(own, whole, (mine, mine, slice(None)), strict=True):
            differences = (found - expected[part]).abs().flatten().tolist()
            assert max(differences, default=0.0) <= limit * float(expected.abs().max()), (dtype, autocast)


def _one_step(model: nn.Module, x: Tensor, mine: slice, total: int) -> tuple[Tensor, ...]:
    """Output, gradient of x and a running variance, in float64."""
    own = x.clone().requires_grad_()
    output = model(own)
    summed(output.double(), mine, total).backward()
    return output.detach().double(), own.grad.double(), model.norm.running_var.double()


def check_around(rank: int, sizes: Sizes) -> None:
    """Who else reads a norm's input, a checkpoint, other sizes at every call, sub-batches, no kernels."""
    x = image(sum(sizes), 3, 8, 8)
    check(spread(Readers()), x.clone().requires_grad_(), sizes, rank)
    check(spread(Readers(in_checkpoint=True)), x, sizes, rank, limit=1e-9)
    with kernels.disabled():
        check(net(nn.SiLU()), x, sizes, rank)
    model, plain = optimized(net()), net()
    for size in (6, 9, 7):
        y = model(image(sum(sizes), 3, size, size)[sum(sizes[:rank]) : sum(sizes[: rank + 1])])
        whole = plain(image(sum(sizes), 3, size, size))
        torch.testing.assert_close(y, whole[sum(sizes[:rank]) : sum(sizes[: rank + 1])])
    for serialize in (SerializeMinibatch(sub_batch=1), SerializeMinibatch(buffer_bytes=4096)):
        check(net(), x, sizes, rank, lambda m, s=serialize: normpass.optimize(synced(m), serialize=s))


def check_options(rank: int, sizes: Sizes) -> None:
    """What keeps z alone, and what needs the moments block by block, leave the norm to others and say why."""
    x = image(sum(sizes), 3, 8, 8)
    lossy = lambda m: normpass.optimize(synced(m), allow_lossy=True)  # noqa: E731
    check(net(nn.LeakyReLU(0.1)), x, sizes, rank, lossy)
    rows = captured_graphs(synced(net(nn.LeakyReLU(0.1))), ((x,), {}), Request(allow_lossy=True)).graphs[0].choices
    assert [c.rewrite for c in rows] == ["split_bn"] * 3, rows
    reason = "its statistics are those of all processes, and their gradient needs its input"
    assert [r.reason for c in rows for r in c.refusals if r.rewrite == "inplace_abn"].count(reason) == 2
    layers = net().stem, nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 2, 1)
    model = synced(nn.Sequential(*layers).double())
    text = str(normpass.explain(model, x, serialize=SerializeNorms(paths=("1",))))
    assert "1 runs whole: the norm that reads its result has the statistics of all processes" in text, text


class Readers(nn.Module):
    """A norm whose input is its residual too, and read by a convolution."""

    def __init__(self, in_checkpoint: bool = False):
        super().__init__()
        torch.manual_seed(2)
        self.in_checkpoint = in_checkpoint
        self.conv, self.norm = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, track_running_stats=not in_checkpoint)
        self.next, self.last = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def part(self, h: Tensor) -> Tensor:
        return F.silu(self.norm(h) + h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        z = checkpoint(self.part, h, use_reentrant=False) if self.in_checkpoint else self.part(h)
        return self.last(F.relu_(self.next(h) + z))


# --- what communicates ------------------------------------------------------------------------------


def check_collectives(rank: int, sizes: Sizes) -> None:
    """One in forward and one in backward for each call of a norm, of 2C + 1 and 2C values; none for what is rebuilt."""
    model, own = optimized(net(nn.SiLU())), image(sum(sizes), 3, 6, 6)[: sizes[rank]]
    summed(model(own), slice(0, len(own)), len(own)).backward()  # captured
    outputs: list[Tensor] = []
    forward = collectives_of(lambda: outputs.append(model(own)))
    backward = collectives_of(lambda: outputs[0].square().sum().backward())
    assert forward == [("all_gather_into_tensor", 2 * C + 1)] * 3, forward
    assert backward == [("all_reduce", 2 * C)] * 3, backward


def check_alone(rank: int, sizes: Sizes) -> None:
    """`explain`, `plan` and example inputs run a model without the other processes: here on one of them only."""
    model, x = synced(net()), image(4, 3, 6, 6)
    if rank == 0:
        text = str(normpass.explain(model, x, memory_budget=0.7))
        assert "SyncBatchNorm" in text and "3 of 3 norms rewritten" in text, text
        planned = normpass.plan(model, x, 0.7)
        assert planned.planned is not None and planned.plain is not None
        assert planned.planned.kept < planned.plain.kept
        with redirect_stdout(io.StringIO()):
            normpass.optimize(model, x)
    dist.barrier()


def check_budget(rank: int, sizes: Sizes) -> None:
    """Within a budget; a plan from a trial fits what trains."""
    x = image(sum(sizes), 3, 16, 16)
    for budget in (0.4, 0.6):
        given = x[: max(sizes)]
        check(net(), x, sizes, rank, lambda m, b=budget, g=given: normpass.optimize(synced(m), g, memory_budget=b))


# --- who converts, wraps and compiles ---------------------------------------------------------------


def check_converted_later(rank: int, sizes: Sizes) -> None:
    """convert_sync_batchnorm before or after optimize; after it has run, too."""
    x = image(sum(sizes), 3, 6, 6)
    check(net(), x, sizes, rank, lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(normpass.optimize(copy.deepcopy(m))))
    model = normpass.optimize(net())
    model.eval()(x)
    model.train()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before = trained(optimized(net()), x, sizes, rank)
    for name, value in trained(model, x, sizes, rank).items():
        assert torch.equal(value, before[name]), name
    again = copy.deepcopy(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in normpass.restore(again).modules()) == 2


def check_ddp(rank: int, sizes: Sizes) -> None:
    """Under DistributedDataParallel, whose gradients are means; converted later: on a CPU it refuses the layer."""
    x = image(sum(sizes), 3, 6, 6)
    whole = trained(net(), x, sizes, None, steps=1)
    for unused in (False, True):
        for wrap in (normpass.optimize, lambda m: nn.Sequential(normpass.optimize(m))):
            ddp = DistributedDataParallel(wrap(net()), find_unused_parameters=unused)
            nn.SyncBatchNorm.convert_sync_batchnorm(ddp.module)
            first = sum(sizes[:rank])
            mine = slice(first, first + sizes[rank])
            summed(ddp(x[mine]), mine, len(x)).backward()
            for name, p in ddp.module.named_parameters():
                expected = whole[f"0 gradient {name.removeprefix('0.')}"]
                torch.testing.assert_close(
                    p.grad * len(sizes), expected, rtol=0, atol=1e-9 * float(expected.abs().max() + 1)
                )


def check_compiled(rank: int, sizes: Sizes) -> None:
    """One graph, equal numbers."""
    x = image(sum(sizes), 3, 6, 6)
    counters = torch._dynamo.utils.counters
    for inner in ("eager", "aot_eager", "inductor"):
        counters.clear()
        options = {"inner": inner}
        check(
            net(),
            x,
            sizes,
            rank,
            lambda m, o=options: torch.compile(synced(m), backend="normpass", fullgraph=True, options=o),
        )
        assert counters["stats"]["unique_graphs"] == 1, (inner, counters["stats"])
    counters.clear()
    check(net(), x, sizes, rank, lambda m: torch.compile(optimized(m), backend="aot_eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]


def check_twice(rank: int, sizes: Sizes) -> None:
    """The gradient of a gradient is refused; the gradient with a graph is not."""
    model, own = optimized(net()), image(4, 3, 6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(F.softplus(model(own)).sum(), own, create_graph=True)
    (expected,) = torch.autograd.grad(F.softplus(model(own)).sum(), own)
    torch.testing.assert_close(gradient, expected)
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        assert "gradient of a SyncBatchNorm's gradient" in str(error), error
    else:
        raise AssertionError("a second derivative was computed")


def main() -> None:
    rank, world, names = begin(timeout=100)
    sizes = {2: [3, 2], 3: [4, 1, 0]}[world]
    with raising():
        for name in names:
            globals()[f"check_{name}"](rank, sizes)
            print(name, "ok", flush=True)
    end()


if __name__ == "__main__":
    main()
