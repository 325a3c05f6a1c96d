"""Plans from files, or edited: what is wrong is said with the name of the entry. Files appear whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normpass
from normpass.files import MOST_BYTES, appearing, read_json, write_json

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*blocks, nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 8, 1))


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return normpass.plan(model(), X, 0.9).to_json()


Edit = Callable[[dict[str, Any]], Any]


def at(path: str, value: Any) -> Edit:
    """The plan with `value` at a dotted path."""

    def edit(plan: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = plan
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place[int(last) if isinstance(place, list) else last] = value

    return edit


WRONG: dict[str, tuple[Edit, str]] = {
    "version 1": (at("version", 1), "version 2, its `version` is 1"),
    "version true": (at("version", True), "its `version` is True"),
    "no version": (lambda p: p.pop("version"), "`plan`: `version` is missing"),
    "no decisions": (lambda p: p.pop("decisions"), "`plan`: `decisions` is missing"),
    "another entry": (at("rebuild", []), "`plan`: `rebuild` is not known; known are version, budget"),
    "budget": (at("budget", 0.5), "`plan.budget` must be text, it is 0.5"),
    "decisions are a list": (at("decisions", []), "`plan.decisions` must be an object"),
    "another decision": (at("decisions.keep", []), "`plan.decisions`: `keep` is not known"),
    "kept is text": (at("decisions.kept", "0"), "`plan.decisions.kept` must be a list of names, it is '0'"),
    "kept holds a number": (at("decisions.kept", ["0", 3]), r"`plan.decisions.kept\[1\]` must be text, it is 3"),
    "kept twice": (at("decisions.kept", ["0", "0"]), "`plan.decisions.kept`: `0` is there twice"),
    "kept and rebuilt": (lambda p: p["decisions"].update(kept=["1"], rebuilt=["1"]), "`1` is both in `kept` and"),
    "kept is no value": (at("decisions.kept", ["7"]), "`plan.decisions.kept`: `7` is no result that can be kept or"),
    "rebuilt is no value": (at("decisions.rebuilt", ["7"]), "`plan.decisions.rebuilt`: `7` is no result"),
    "replayed is no pooling": (at("decisions.replayed", ["0"]), "`0` is no result that is a max pooling"),
    "not in the model": (at("decisions.rebuilt", ["layer9"]), "names what is not in this Sequential: layer9"),
    "rewrites is a list": (at("decisions.rewrites", ["1"]), "`plan.decisions.rewrites` must be an object"),
    "unknown rewrite": (at("decisions.rewrites", {"1": "split"}), "rewrites.1`: `split` is no rewrite; known are"),
    "a rewrite is a number": (at("decisions.rewrites", {"1": 1}), "`plan.decisions.rewrites.1` must be text"),
    "lossy": (at("decisions.rewrites", {"5": "inplace_abn"}), "`inplace_abn` is lossy: give `allow_lossy=True`"),
    "no norm": (at("decisions.rewrites", {"0": "split_bn"}), "`0` is no norm of the model"),
    "refused": (at("decisions.rewrites", {"1": "share_statistics"}), "rewrites.1`: `share_statistics` is refused"),
    "rows": (at("rows", {}), "`plan.rows` must be a list"),
    "a row": (at("rows", [7]), r"`plan.rows\[0\]` must be an object"),
    "a row without bytes": (lambda p: p["rows"][0].pop("bytes"), r"`plan.rows\[0\]`: `bytes` is missing"),
    "a row with more": (at("rows.0.colour", 1), r"`plan.rows\[0\]`: `colour` is not known"),
    "negative bytes": (at("rows.0.bytes", -1), r"`plan.rows\[0\].bytes` must be a whole number of at least 0"),
    "bytes are a float": (at("rows.0.bytes", 1.5), r"`plan.rows\[0\].bytes` must be a whole number"),
    "nan": (at("rows.0.seconds", float("nan")), r"`plan.rows\[0\].seconds` must be a number"),
    "infinite": (at("predicted.plain.seconds", float("inf")), "`plan.predicted.plain.seconds` must be a number"),
    "huge": (at("rows.0.seconds", 10**400), r"`plan.rows\[0\].seconds` must be a number"),
    "a prediction": (at("predicted.mine", {}), "`plan.predicted`: `mine` is not known"),
    "predicted text": (at("predicted.plain.kept", "1"), "`plan.predicted.plain.kept` must be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, good: dict[str, Any]) -> None:
    edit, message = WRONG[name]
    plan = copy.deepcopy(good)
    edit(plan)
    with pytest.raises(normpass.InvalidInputError, match=message) as raised:
        normpass.optimize(model(), X, plan=plan)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("plan", [3, [], None, (), {1: 2}, {}])
def test_what_is_no_plan(plan: Any) -> None:
    with pytest.raises(normpass.InvalidInputError, match="plan"):
        normpass.StepPlan.from_json(plan)


def test_a_good_one_is_read_as_it_was(good: dict[str, Any], tmp_path: Path) -> None:
    plan = normpass.StepPlan.from_json(good)
    plan.save(tmp_path / "plan.json")
    read = normpass.StepPlan.from_json(read_json(tmp_path / "plan.json", "plan"))
    assert read == plan and read.to_json() == good
    normpass.optimize(model(), X, plan=str(tmp_path / "plan.json"))


def test_a_plan_for_other_inputs_is_said(good: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for count, is_said in ((2, False), (3, True)):
        normpass.optimize(model(), torch.randn(count, 3, 8, 8), plan=good)
        assert ("the plan was made for other inputs" in caplog.text) is is_said


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "cut off": (b'{"version": 2', "Expecting"),
    "twice": (b'{"version": 2, "decisions": {"kept": [], "kept": ["0"]}}', '"kept" is twice in one object'),
    "nan": (b'{"version": 2, "decisions": {}, "rows": [NaN]}', "NaN is no number of JSON"),
    "infinite": (b'{"version": -Infinity}', "-Infinity is no number"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "latin": ('{"budget": "½"}'.encode("latin-1"), "codec can't decode"),
    "digits": (b"9" * 10_000, "digits"),
    "zeros": (b"\0" * 64, "Expecting value"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_json(name: str, tmp_path: Path) -> None:
    content, reason = FILES[name]
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(normpass.InvalidInputError, match=f"`plan`: `.*plan.json` cannot be read as JSON: .*{reason}"):
        normpass.optimize(model(), plan=path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "huge.json", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(normpass.InvalidInputError, match="cannot be read as JSON"):
            read_json(path, "plan")


# --- files appear whole or not at all ---------------------------------------------------------------


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "plan.json", tmp_path / "link.json"
    link.symlink_to(target)
    for content in ([1], [2]):  # a target that is not there yet, and one that is
        write_json(link, content)
        assert link.is_symlink() and json.loads(target.read_text()) == content
    assert os.listdir(tmp_path / "folder") == ["plan.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_that_is_there_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(mode)
    write_json(path, [1])
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "new.json", [1])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o640


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, object())
    with pytest.raises(KeyError), appearing(path) as file:
        file.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_json(pipe, [1])
    assert json.loads(reader.communicate(timeout=20)[0]) == [1]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe.json"]


@pytest.mark.parametrize("path", ["", "none/plan.json", "x" * 300 + ".json"])
def test_places_where_nothing_can_be_written(path: str, tmp_path: Path) -> None:
    with pytest.raises(normpass.InvalidInputError, match="cannot write") as raised:
        write_json(tmp_path / path, [1])
    assert isinstance(raised.value, OSError) and raised.value.strerror


KILLED = """
import pathlib, sys, time
from normpass.files import appearing
with appearing(pathlib.Path(sys.argv[1])) as file:
    file.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_a_file_whose_name_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert all("unfinished" in name for name in os.listdir(tmp_path) if name != "plan.json")
