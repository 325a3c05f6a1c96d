"""`make gpu` without a GPU: the order, the clock, what is on disk when it is killed, and that its parts run at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

import correctness
import fill_cache
import op_table
import run_all
import step_times
from schedule import Report, Schedule, Stage

from normpass.bench.contenders import contender

GPU = Path(__file__).parents[1] / "gpu"


class Clock:
    """Seconds that pass only when a child is waited for."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class StubChild:
    """Says each line of `script` after so many seconds of the clock; a number alone is the exit status."""

    def __init__(self, clock, script):
        self.clock, self.script, self.killed = clock, list(script), False

    def line(self, seconds):
        if not self.script or isinstance(self.script[0], int):
            return None
        after, words = self.script[0]
        if after > seconds:
            self.clock.now += seconds
            self.script[0] = (after - seconds, words)
            return ""
        self.clock.now += after
        self.script.pop(0)
        return words

    def status(self):
        return self.script[0] if self.script else 0

    def kill(self):
        self.killed = True


def row(item, **values):
    return f"ROW {json.dumps({'item': item, **values})}"


@pytest.fixture
def run_with(tmp_path):
    """Makes a `Run`, and closes its files."""
    made = []

    def make(deadline, **scripts):
        made.append(Run(tmp_path, deadline, **scripts))
        return made[-1]

    yield make
    for run in made:
        run.report.close()


class Run:
    """A schedule whose children follow a script: a list of lines for each start of a command, by its name."""

    def __init__(self, folder, deadline, **scripts):
        self.clock, self.scripts, self.started = Clock(), scripts, []
        self.report, self.folder = Report(folder, self.clock), folder
        self.schedule = Schedule(self.report, deadline, self.clock, self.start)

    def start(self, command, environment):
        self.started.append(list(command))
        return StubChild(self.clock, self.scripts[command[0]].pop(0))

    def rows(self):
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]

    def summary(self):
        return (self.folder / "summary.txt").read_text()


def items_of(*names, seconds=1.0):
    return [line for n in names for line in ((0, f"BEGIN {n}"), (seconds, row(n, ms=1)))]


def test_rows_come_in_order_and_at_once(run_with):
    run = run_with(100, a=[[(0, "BEGIN x"), (1, row("x", ms=3)), (0, "BEGIN y"), (1, row("y", error="bad"))]])
    seen, plain = [], run.start
    run.schedule._start = lambda *args: plain(*args)
    run.report.log = lambda line: seen.append(len(run.rows()))
    run.schedule.run(Stage("a", ["a"], 10, ("x", "y")))
    assert seen == [0, 0, 1, 1], "each row is on disk before the next line is read"
    assert [(r["stage"], r["item"]) for r in run.rows()] == [("a", "x"), ("a", "y")]
    assert run.report.failed == ["a: y"] and 'a: x {"ms": 3}' in run.summary()


def test_what_takes_its_process_down_does_not_stop_the_rest(run_with):
    scripts = [[*items_of("x"), (0, "BEGIN y"), 139], items_of("z")]
    run = run_with(100, a=scripts)
    run.schedule.run(Stage("a", ["a"], 10, ("x", "y", "z")))
    assert [r["item"] for r in run.rows()] == ["x", "y", "z"] and "status 139" in run.rows()[1]["error"]
    assert run.started == [["a", "x", "y", "z"], ["a", "z"]]


def test_an_item_that_hangs_is_given_up(run_with):
    run = run_with(100, a=[[(0, "BEGIN x"), (1e6, "never")], items_of("y")])
    run.schedule.run(Stage("a", ["a"], 60, ("x", "y"), item_seconds=20))
    assert "more than 20 s" in run.rows()[0]["error"] and run.rows()[1]["ms"] == 1 and run.clock.now <= 22


def test_a_stage_and_the_whole_end_in_time(run_with):
    run = run_with(50, a=[items_of(*"uvwxyz", seconds=8)], b=[[(1e6, "never")]], c=[[]])
    run.schedule.run(Stage("a", ["a"], 30, tuple("uvwxyz")))
    assert [r["item"] for r in run.rows()] == ["u", "v", "w", "x"] and run.clock.now == 30
    assert "out of time" in run.rows()[3]["error"] and "not run for lack of time: y z" in run.summary()
    run.schedule.run(Stage("b", ["b"], 500))
    assert run.clock.now == 50 and "out of time" in run.rows()[4]["error"]
    run.schedule.run(Stage("c", ["c"], 10))
    assert "c: skipped, no time is left" in run.summary() and len(run.started) == 2


def test_a_command_that_does_not_begin_is_not_tried_for_ever(run_with, tmp_path):
    run = run_with(50, a=[[(1, "ImportError: no module"), 1]], b=[[3]])
    run.schedule.run(Stage("a", ["a"], 30, ("x", "y")))
    run.schedule.run(Stage("b", ["b"], 30))
    run.schedule.run(Stage("absent", ["no"], 10, skipped="not installed"))
    assert len(run.started) == 2 and [r["stage"] for r in run.rows()] == ["a", "b"]
    assert "ImportError" in (tmp_path / "log.txt").read_text() and "absent: skipped, not installed" in run.summary()


def test_stages_are_in_the_order_of_their_worth_and_fit():
    names = [stage.name for stage in run_all.stages()]
    assert names[:5] == ["kernels", "correctness", "ResNet-50", "ops", "other networks"]
    assert sum(stage.seconds for stage in run_all.stages()[:5]) <= run_all.TOTAL_SECONDS
    assert len(set(names)) == len(names)
    for stage in [*run_all.stages(), run_all.compile_cache()]:
        for item in stage.items:
            if item.count(":") == 2 and not item.startswith("layer:"):
                assert contender(item.split(":")[2])
        scripts = [Path(word) for word in stage.command if str(word).endswith(".py")]
        assert all(script.exists() for script in scripts)


def test_what_compiles_beside_ends_before_anything_is_timed(run_with):
    stages = [stage for stage in run_all.stages() if stage.items]
    python, events = sys.executable, []
    run = run_with(1000)

    def start(command, environment):
        script = next((Path(word).name for word in command if word.endswith(".py")), "")
        events.append((script, "--once" in command))
        child = StubChild(run.clock, items_of(*command[command.index(str(GPU / script)) + 1 :], seconds=0.1))
        child.kill = lambda: events.append(("end of", script, "--once" in command))
        return child

    run.schedule._start = start
    run_all.run(run.schedule, stages)
    begin, end = events.index(("step_times.py", True)), events.index(("end of", "step_times.py", True))
    assert begin < events.index(("correctness.py", False)) < end < events.index(("step_times.py", False)), python


CHILD = """
import sys, time
sys.path.insert(0, {folder!r})
import rows
def measured(item):
    if item == "slow":
        time.sleep(600)
    return dict(ms=1)
rows._context_is_lost = lambda: False
sys.exit(rows.run_items("part", sys.argv[1:], measured))
"""
PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from schedule import Report, Schedule, Stage
report = Report(Path(sys.argv[1]))
Schedule(report, time.monotonic() + 600).run(Stage("a", [sys.executable, "-c", sys.argv[2]], 600, ("x", "y", "slow")))
"""


def test_killed_at_any_moment_what_was_measured_is_there(tmp_path):
    command = [sys.executable, "-c", PARENT.format(folder=str(GPU)), str(tmp_path), CHILD.format(folder=str(GPU))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while (tmp_path / "rows.jsonl").exists() is False or (tmp_path / "rows.jsonl").read_text().count("\n") < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(process.pid, signal.SIGKILL)
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["item"] for r in rows] == ["x", "y"] and "x" in (tmp_path / "summary.txt").read_text()


@pytest.fixture
def on_the_cpu(monkeypatch):
    for part in (correctness, step_times):
        monkeypatch.setattr(part, "DEVICE", "cpu")
    monkeypatch.setattr(correctness, "SHAPE", (4, 3, 33, 33))
    monkeypatch.setattr(op_table, "DEVICE", torch.device("cpu"))
    for part in (step_times, op_table):
        monkeypatch.setattr(part, "ROUNDS", 1)
    monkeypatch.setitem(step_times.SIZES, "resnet18", 32)


@pytest.mark.nets
def test_the_parts_run_on_the_cpu(on_the_cpu):
    """What needs no GPU of them: a mistake in a script would cost the whole run."""
    found = step_times.measured("resnet18:2:ours")
    assert len(found["ms"]) == 3 and found["peak"] > found["kept"] > 0 and found["rebuilds"] > 0
    assert step_times.measured("resnet18:2:eager_channels_last", once=True) == {}
    assert {"moments", "copy"} <= op_table.measured("op:2x4x8x8").keys()
    found = correctness.measured("resnet18:float64")
    assert "error" not in found and len(found["ours"]) == 8
    assert "error" not in correctness.same_as_usual(correctness.in_a_thread)


def test_a_wrong_gradient_is_seen(on_the_cpu, monkeypatch):
    plain = correctness.normpass.optimize

    def wrong(model):
        optimized = plain(model)
        next(p for n, p in optimized.named_parameters() if n == "layer1.0.bn1.weight").register_hook(lambda g: 1.01 * g)
        return optimized

    monkeypatch.setattr(correctness.normpass, "optimize", wrong)
    assert "farther from float64 in first grad" in correctness.compared("resnet18", torch.float64)["error"]


def test_the_cache_has_what_the_networks_need():
    """ResNet-50's: the sources, and the layouts at full width."""
    found = set(fill_cache.variants())
    names = {variant.source for variant in found}
    assert names == {path.stem for path in (GPU.parents[1] / "kernels/cuda").glob("*.cu")} - {"probe"}
    from normpass.kernels.contract import Layout
    from normpass.kernels.cuda.geometry import geometry
    from normpass.kernels.cuda.plans import Join, variant_of

    for channels, dtype in ((64, torch.bfloat16), (2048, torch.float32), (1000, torch.bfloat16)):
        shape = geometry(Layout(256 * 49, channels, 1), dtype.itemsize, 16, 132)
        for activation, residual in (("relu", True), ("relu", False), ("identity", False), ("silu", False)):
            for op in ("norm_act", "norm_act_backward"):
                assert variant_of(op, dtype, shape, activation, Join(residual)) in found
        assert variant_of("moments", dtype, shape) in found
