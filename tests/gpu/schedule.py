"""Runs the parts of the GPU run one after another and writes what they measure as soon as it is there.

A stage is a command that gets the names of its items and prints `rows.py`'s lines. What takes its process down, or
takes too long, is a row with an error, and the command is started again with the items behind it. Everything is on disk
before the next line is read: the run may be killed at any moment.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_LOG = 8 * 2**20
"""Bytes of the children's output that are kept."""

MOST_WORDS = 600
"""Characters of a row in the summary."""


@dataclass(frozen=True)
class Stage:
    """A command with items, or without; and how long it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    items: tuple[str, ...] = ()
    item_seconds: float = 1e9
    environment: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""
    """why it is not run"""
    is_shown: bool = False
    """whether each of its lines belongs into the summary"""


class Report:
    """`summary.txt`, `rows.jsonl` and `log.txt` in a folder, each line written at once; the summary is printed too."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._clock, self._start, self._logged = clock, clock(), 0
        self._files = {name: (folder / name).open("w") for name in ("summary.txt", "rows.jsonl", "log.txt")}
        self.failed: list[str] = []

    def say(self, words: str) -> None:
        line = f"{self._clock() - self._start:6.1f} {words}"
        print(line, flush=True)
        self._write("summary.txt", line)

    def row(self, stage: str, row: dict[str, Any]) -> None:
        self._write("rows.jsonl", json.dumps({"stage": stage, **row}))
        values = json.dumps({k: v for k, v in row.items() if k not in ("part", "item")})
        self.say(f"{stage}: {row.get('item', '')} {values[:MOST_WORDS]}")
        if "error" in row:
            self.failed.append(f"{stage}: {row.get('item', '')}")

    def log(self, line: str) -> None:
        self._logged += len(line)
        if self._logged < MOST_LOG:
            self._write("log.txt", line)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, line: str) -> None:
        self._files[name].write(line + "\n")
        self._files[name].flush()


class Child:
    """A running command: its lines one by one, and its end with all that it has started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # so that a compiler's workers end with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode(errors="replace").rstrip("\n"))
        self._lines.put(None)

    def line(self, seconds: float) -> str | None:
        """The next line; "" when there was none for so long; None at the end."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def status(self) -> int:
        return self._process.wait()

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


Start = Callable[[Sequence[str], Mapping[str, str]], Child]


class Schedule:
    """Stages until a deadline, by `clock`."""

    def __init__(
        self,
        report: Report,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        start: Start = Child,
    ) -> None:
        self._report, self._deadline, self._clock, self._start = report, deadline, clock, start
        self._beside: list[Child] = []

    def begin_beside(self, stage: Stage) -> None:
        """Start a stage that nothing is read from, beside the following ones."""
        self._beside.append(self._start([*stage.command, *stage.items], stage.environment))

    def end_beside(self) -> None:
        for child in self._beside:
            child.kill()
        self._beside.clear()

    def run(self, stage: Stage) -> None:
        """The stage, with all its items or as many as there is time for."""
        left, end = list(stage.items), min(self._clock() + stage.seconds, self._deadline)
        if stage.skipped or self._clock() >= self._deadline:
            self._report.say(f"{stage.name}: skipped, {stage.skipped or 'no time is left'}")
            return
        self._report.say(f"{stage.name}: begins")
        while self._run_once(stage, left, end):
            pass
        if left:
            self._report.say(f"{stage.name}: not run for lack of time: {' '.join(left)}")

    def _run_once(self, stage: Stage, left: list[str], end: float) -> bool:
        """One process; whether another one is to go on with the items that are left."""
        child = self._start([*stage.command, *left], stage.environment)
        item, item_end = "", end
        try:
            while True:
                line = child.line(max(min(1.0, item_end - self._clock()), 0.0))
                if line is None:
                    return self._ended(stage, item, left, child.status())
                self._heard(stage, line)
                if line.startswith("BEGIN "):
                    item, item_end = line[6:], min(self._clock() + stage.item_seconds, end)
                    left.remove(item)
                elif line.startswith("ROW "):
                    self._report.row(stage.name, json.loads(line[4:]))
                    item = ""
                elif self._clock() >= item_end:
                    return self._late(stage, item, left, end)
        finally:
            child.kill()

    def _heard(self, stage: Stage, line: str) -> None:
        if line:
            self._report.log(line)
        if line and (stage.is_shown or line.startswith(("FAILED ", "ERROR ", "SKIPPED: "))):
            self._report.say(f"{stage.name}: {line}")

    def _ended(self, stage: Stage, item: str, left: list[str], status: int) -> bool:
        if item:
            self._report.row(stage.name, {"item": item, "error": f"its process ended with status {status}"})
            return bool(left)
        if status != 0 and not stage.items:
            self._report.row(stage.name, {"error": f"status {status}: see log.txt"})
        elif status == 0:
            self._report.say(f"{stage.name}: done")
        if left and len(left) == len(stage.items):  # it did not even begin: neither would it again
            self._report.row(stage.name, {"error": f"ended with status {status} before its first item: see log.txt"})
            left.clear()
        return bool(left)

    def _late(self, stage: Stage, item: str, left: list[str], end: float) -> bool:
        whole = self._clock() >= end
        words = "the stage was out of time" if whole else f"took more than {stage.item_seconds:.0f} s"
        self._report.row(stage.name, {"item": item, "error": words})
        return bool(left) and not whole
