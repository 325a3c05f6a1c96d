"""The benchmarks: what takes part, what is counted, and that no contender changes what another measures."""

import copy
import dataclasses
import json
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config

from normpass import environment
from normpass.bench import contenders
from normpass.bench import convolutions as bench_convolutions
from normpass.bench import layers as bench_layers
from normpass.bench import networks as bench_networks
from normpass.bench import ops as bench_kernels
from normpass.bench import run as bench
from normpass.bench import tables as bench_tables
from normpass.bench.layers import Case
from normpass.bench.networks import Setting
from normpass.kernels import kernels_for
from normpass.measure import Ratio, timing
from normpass.recipe.recipes import Rebuilds
from normpass.report.plots import Point

CPU = torch.device("cpu")
SMALL = (2, 3, 6, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Its result is a dict, as that of torchvision's segmentation networks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x):
        return {"out": self.blocks(self.stem(x))}


@pytest.fixture
def network(monkeypatch):
    """The name of a network of the tests' own."""
    monkeypatch.setattr(bench_networks.models, "load", lambda name: Net())
    return "tests:Net"


# --- timing -------------------------------------------------------------------------------------------


def test_rounds_alternate_and_phases_add_up():
    log = []

    def step(name):
        def run(turn, clock):
            log.append(name)
            for _ in range(3):
                clock.lap()

        return run

    times = timing.alternate({"a": step("a"), "b": step("b")}, CPU, rounds=3, least_seconds=0)
    assert log[-6:] == ["a", "b", "b", "a", "a", "b"]
    first, second, both = times["a"]
    assert len(both.times) == 3
    for parts in zip(first.times, second.times, both.times, strict=True):
        assert parts[0] + parts[1] == pytest.approx(parts[2])


def test_a_short_call_is_repeated():
    calls = 0

    def step(turn, clock):
        nonlocal calls
        calls += 1
        clock.lap()
        time.sleep(0.001)
        clock.lap()

    timing.alternate({"a": step}, CPU, rounds=1, least_seconds=0.01)
    assert calls > 4


@pytest.mark.parametrize("steps, rounds", [({}, 1), ({"a": print}, 0)])
def test_alternate_refuses_its_arguments(steps, rounds):
    with pytest.raises(ValueError, match="needs steps and `rounds`"):
        timing.alternate(steps, CPU, rounds)


# --- layers and ops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", bench_layers.LAYERS)
def test_layers(layer):
    rows = {row.contender: row for row in bench_layers.bench_layer(Case(layer, SMALL), 2, "aot_eager")}
    names = ["ours", "ours_kept", "eager", "eager_out_of_place", "eager_contiguous", "compile", "copy"]
    assert list(rows) == names
    assert all(row.error == "" for row in rows.values())
    assert list(rows["ours"].phases) == ["forward", "backward", "both"]
    assert rows["eager"].phases["both"].ratio == Ratio(1.0, 1.0, 1.0)
    assert rows["copy"].phases["both"].of_copy == 1.0
    assert rows["ours"].phases["both"].seconds > 0


@pytest.mark.parametrize("layer", bench_layers.LAYERS)
def test_the_contenders_compute_the_same(layer):
    case = Case(layer, SMALL)
    x, dz, *residual = bench_layers.make_inputs(case, 3 if bench_layers.LAYERS[layer].residual else 2)[0]
    results = []
    for module in bench_layers.contenders(case, "aot_eager").values():
        leaf = x.clone().requires_grad_()
        z = module(leaf, *(residual or [None]))
        results.append((z.detach(), *torch.autograd.grad(z, (leaf, *module.parameters()), dz)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_a_layer_in_sixteen_bits_and_contiguous():
    rows = bench_layers.bench_layer(Case("bn_add_relu", SMALL, torch.bfloat16, "contiguous"), 1, None)
    assert [row.contender for row in rows] == ["ours", "ours_kept", "eager", "eager_out_of_place", "copy"]
    assert {(row.dtype, row.layout) for row in rows} == {("bfloat16", "contiguous")}


def test_what_cannot_run_is_a_row_with_its_reason(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(bench_layers.Ours, "forward", refuse)
    rows = {row.contender: row for row in bench_layers.bench_layer(Case("bn_relu", SMALL), 1, None)}
    assert rows["ours"].error == "RuntimeError: no kernel for this"
    assert rows["ours"].phases == {}
    assert rows["eager"].error == ""
    assert "did not run" in text(bench_tables.layer_table([list(rows.values())], "here"))


def test_ops_alone():
    rows = {row.kernel: row for row in bench_kernels.bench_kernels(Case("bn_relu", SMALL), 2)}
    assert list(rows) == [*bench_kernels.KERNELS, "copy"]
    assert rows["copy"].of_copy == 1.0
    assert all(row.seconds > 0 and row.of_copy > 0 and row.call_microseconds > 0 for row in rows.values())
    assert rows["norm_act_backward"].arrays == 5 and rows["norm_add_act_backward"].arrays == 7
    shown = text(bench_tables.kernel_table([list(rows.values())], "here"))
    assert "one call" in shown and f"{rows['moments'].call_microseconds:.1f} µs" in shown


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_convolutions_beside_the_vendors(layout):
    found = [
        *bench_convolutions.bench_convolution(bench_convolutions.THREE, (2, 16, 8, 8), 24, layout, 2),
        *bench_convolutions.bench_convolution(bench_convolutions.FIVE, (2, 16, 8, 8), 16, layout, 2),
        *bench_convolutions.bench_convolution(bench_convolutions.NORM, (2, 16, 8, 8), 16, layout, 2),
    ]
    assert [row.computes for row in found] == ["y", "dx", "dweight", "dx", "dweight", "y", "gradients"]
    assert all(row.seconds > 0 and row.vendor_seconds > 0 and row.ratio.median > 0 for row in found)
    shown = text(bench_tables.convolution_table(found, "here"))
    assert "2x16x8x8 to 24" in shown and "depthwise 5x5" in shown


@pytest.mark.parametrize("layer", bench_layers.LAYERS)
def test_ours_rebuilds_what_somebody_reads_in_backward(layer):
    """As in training: once a step, and the bytes of it count as ours alone."""
    case, kind = Case(layer, SMALL), bench_layers.LAYERS[layer]
    x, dz, *residual = bench_layers.make_inputs(case, 3 if kind.residual else 2)[0]
    found = {}
    for name, module in bench_layers.contenders(case, None).items():
        with Rebuilds() as rebuilds:
            z = module(x.clone().requires_grad_(), *(residual or [None]))
            torch.autograd.grad(z, list(module.parameters()), dz)
        found[name] = rebuilds.total
    assert found.pop("ours") == 1 and set(found.values()) == {0}
    assert kind.arrays == ((4, 7, 11) if kind.residual else (3, 5, 8)) == kind.arrays_of("eager")
    assert kind.arrays_of("ours") == ((4, 10, 14) if kind.residual else (3, 7, 10))


def test_the_collector_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(timing.gc, "collect", lambda: calls.append(1))
    timing.alternate({"a": lambda turn, clock: (clock.lap(), clock.lap())}, CPU, rounds=5, least_seconds=0)
    assert calls == [1]


def test_a_gpu_has_rows_of_small_batches():
    batches = {shape.partition("x")[0] for shape in bench_layers.DEFAULT_SHAPES["cuda"]}
    assert batches == {"256", "32"}


def test_the_fraction_of_the_copy_counts_arrays():
    one = timing.StepTime.of((1.0, 2.0))
    four = timing.StepTime.of((4.0, 8.0))
    assert bench_layers.of_copy(four, one, arrays=8) == 1.0
    assert bench_layers.of_copy(four, one, arrays=2) == 0.25


def test_geometric_mean_of_the_shapes():
    def row(contender, ratio):
        phase = bench_layers.Phase(1e-3, 1e-3, 1e-3, Ratio(ratio, ratio, ratio), 0.5)
        phases = dict.fromkeys(bench_layers.PHASES, phase)
        return bench_layers.LayerRow("bn_relu", SMALL, "float32", "contiguous", contender, phases)

    cases = [[row("ours", ratio), row("eager", 1.0), row("aten", 2 * ratio)] for ratio in (0.25, 1.0)]
    last = text(bench_tables.layer_table(cases, "here")).splitlines()[-2]
    assert [cell.strip() for cell in last.split("│")][1:-1] == ["geometric mean", *[""] * 4, *["0.50"] * 3, "1.00"]


# --- networks -----------------------------------------------------------------------------------------


@pytest.mark.nets
def test_every_contender_on_a_network(network):
    setting = Setting((2, 3, 32, 32), rounds=1, compile_backend="aot_eager")
    names = (*contenders.CONTENDERS, "compile@0.5", "ours@0.3")
    rows = {row.contender: row for row in bench_networks.bench_network(network, setting, names)}
    assert list(rows) == list(names)
    assert {row.error for row in rows.values()} == {""}
    kept = {name: row.kept for name, row in rows.items()}
    assert kept["ours"] == kept["ours_reference"] < 0.7 * kept["eager"]
    assert kept["checkpoint"] < kept["eager"]
    assert kept["ours@0.3"] <= 0.3 * kept["eager"]
    points = bench_tables.frontier_points([dataclasses.asdict(row) for row in rows.values()])
    assert {p.group for p in points} == {"eager", "normpass", "torch.compile"}
    assert next(p for p in points if p.name == "eager") == Point("eager", "eager", 1.0, 1.0)
    assert rows["ours"].most_rebuilds == 1
    assert rows["eager"].ratio == 1.0
    for name in contenders.COMPILED:
        assert rows[name].compiled_while_timed == 0
    assert kept["compile"] >= kept["compile_ban_recompute"] > kept["compile@0.5"]
    assert kept["compile_aggressive"] < kept["compile"]


@pytest.mark.parametrize("name", ["nobody", "eager@0.5", "ours@2", "ours@x", "compile@"])
def test_no_such_contender(name):
    with pytest.raises(bench_networks.BenchError, match=f"no contender `{name}`: choose from .*ours@FRACTION"):
        bench_networks.check_contenders(["eager", name], "eager")


def test_flags_hold_while_their_contender_compiles():
    seen = []

    def backend(graph, inputs):
        seen.append((config.ban_recompute_materialized_backward, config.activation_memory_budget))
        return graph

    x = torch.randn(2, 3, 8, 8)
    torch.compiler.reset()
    contenders.compiled(Net(), backend)(x)
    contenders.compiled(Net(), backend, ban_recompute_materialized_backward=False)(x)
    contenders.compiled(Net(), backend, activation_memory_budget=0.5)(x)
    torch.compiler.reset()
    assert seen == [(True, 1.0), (False, 1.0), (True, 0.5)]
    assert config.ban_recompute_materialized_backward


def test_autocast_and_channels_last(network):
    setting = Setting((2, 3, 16, 16), torch.bfloat16, channels_last=True, rounds=1)
    rows = bench_networks.bench_network(network, setting)
    assert [(row.contender, row.layout) for row in rows] == [
        ("eager", "contiguous"),
        ("eager_channels_last", "channels_last"),
        ("ours", "channels_last"),
    ]
    assert {row.base for row in rows} == {"eager_channels_last"}
    job = contenders.CONTENDERS["ours"].job(Net(), torch.randn(2, 3, 16, 16), True, torch.bfloat16, "aot_eager")
    assert job()["out"].dtype == torch.bfloat16
    assert job()["out"].is_contiguous(memory_format=torch.channels_last)


def test_contenders_have_networks_of_their_own():
    plain = Net()
    before = copy.deepcopy(plain.state_dict())
    jobs = [c.job(plain, torch.randn(2, 3, 8, 8), False, torch.float32, "aot_eager") for c in ALL]
    parameters = [{id(p) for p in job.parameters()} for job in (*jobs, plain)]
    assert sum(map(len, parameters)) == len(set().union(*parameters))
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


def test_the_reference_has_no_kernels():
    with contenders.CONTENDERS["ours_reference"].around():
        assert kernels_for("cpu") is None


def test_checkpoint_runs_each_block_twice_for_the_same_gradients():
    plain, x = Net(), torch.randn(2, 3, 8, 8)
    wrapped = contenders.checkpointed(copy.deepcopy(plain))
    for model in (plain, wrapped):
        model(x)["out"].square().sum().backward()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert [int(block.norm.num_batches_tracked) for block in wrapped.blocks] == [2, 2, 2]
    assert int(wrapped.stem[1].num_batches_tracked) == 1


def test_a_base_that_fails_is_an_error(network, monkeypatch):
    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(contenders, "checkpointed", refuse)
    setting = Setting((2, 3, 8, 8), rounds=1)
    with pytest.raises(bench_layers.BenchError, match="`checkpoint`, the base of the ratios, fails on tests:Net"):
        bench_networks.bench_network(network, setting, ("eager", "checkpoint"), "checkpoint")


# --- records ------------------------------------------------------------------------------------------


def test_a_record_is_written_as_it_grows(tmp_path):
    record = bench.Record(tmp_path / "r.json", environment.environment("cpu", "normpass bench"))
    record.write()
    assert "rows" not in json.loads(record.path.read_text())
    for count in (1, 2):
        record.add("rows", [bench_networks.Row("net", SMALL, "float32", "contiguous", "eager")])
        found = json.loads(record.path.read_text())
        assert len(found["rows"]) == count
    assert found["command"] == "normpass bench"
    assert found["rows"][0]["seconds"] is None


def test_openmp_runtimes(tmp_path, monkeypatch):
    paths = ("/a b/libgomp.so.1", "/usr/lib/libomp.so", "/usr/lib/libcompress.so", "/a b/libgomp.so.1")
    lines = [f"7f00-7f01 r-xp 00000000 08:01 {inode} {path}" for inode, path in enumerate(paths)]
    (tmp_path / "maps").write_text("\n".join([*lines, "7f02-7f03 rw-p 00000000 00:00 0"]))
    monkeypatch.setattr(environment, "_MAPS", tmp_path / "maps")
    assert environment.openmp_runtimes() == ["/a b/libgomp.so.1", "/usr/lib/libomp.so"]
    monkeypatch.setattr(environment, "_MAPS", tmp_path / "none")
    assert environment.openmp_runtimes() is None


ALL = tuple(contenders.CONTENDERS.values())


def text(table):
    """A table as it is printed."""
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()
