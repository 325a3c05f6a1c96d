"""What `make gpu` runs on a machine with a GPU: tests, compute-sanitizer, benchmarks; under 8 minutes in all.

    python tests/gpu/run_all.py FOLDER

Tests and sanitizer run at the same time, and beside them torch.compile fills its cache on disk, or compiling would
take most of the benchmarks' minutes. The benchmarks then have the machine to themselves. Every stage has a limit;
one that fails or runs out of time does not stop the next. A line for each is printed last, and the exit status says
whether all passed. FOLDER gets the logs, the JSON of the benchmarks and `summary.txt`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 470
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")

IMAGENET = "256x3x224x224"
NETWORKS = {
    "resnet50": (IMAGENET, "compile,compile_ban_recompute,compile_aggressive,compile@0.5,ours@0.5,ours@0.4"),
    "densenet121": (IMAGENET, "compile"),
    "mobilenet_v2": (IMAGENET, "compile"),
    "efficientnet_b0": (IMAGENET, "compile"),
    "deeplabv3_resnet50": ("16x3x513x513", "compile"),
}
"""Input and compiled contenders of each; more of them would not fit into the time."""
SLOWEST_TO_COMPILE_FIRST = ("densenet121", "resnet50", "efficientnet_b0", "deeplabv3_resnet50", "mobilenet_v2")


@dataclass(frozen=True)
class Stage:
    """Commands that run one after another, and how long they may take together."""

    name: str
    commands: Sequence[Sequence[str]]
    seconds: int
    log: str
    environment: dict[str, str] = field(default_factory=dict)
    counts: bool = True
    """whether a failure fails the whole run"""
    skipped: str = ""
    """why it is not run"""


@dataclass(frozen=True)
class Result:
    """How a stage ended, in words, how long it took, and whether that is good."""

    stage: Stage
    words: str
    seconds: float
    good: bool

    def __str__(self) -> str:
        return f"{self.stage.name:28} {self.words} ({self.seconds:.0f} s)"


class Running:
    """A stage under way: its commands one after another, each in a process group of its own."""

    def __init__(self, stage: Stage, folder: Path, deadline: float) -> None:
        self.stage, self.start = stage, time.monotonic()
        self.end = min(self.start + stage.seconds, deadline)
        self.waiting = [list(command) for command in stage.commands]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = (folder / stage.log).open("ab")
        self.words = ""
        self.good = True

    def poll(self) -> bool:
        """Take the next step; whether there is more to do."""
        if self.stage.skipped:
            self.words = f"skipped: {self.stage.skipped}"
            return self._close()
        if time.monotonic() > self.end:
            self._kill()
            self.words, self.good = "OUT OF TIME", False
            return self._close()
        if self.process is not None:
            status = self.process.poll()
            if status is None:
                return True
            if status != 0:
                self.words, self.good = f"FAILED with status {status}, see {self.stage.log}", False
        if not self.waiting:
            return self._close()
        self._begin(self.waiting.pop(0))
        return True

    def result(self) -> Result:
        return Result(self.stage, self.words or "passed", time.monotonic() - self.start, self.good)

    def _begin(self, command: list[str]) -> None:
        self.log.write(f"\n$ {' '.join(command)}\n".encode())
        self.log.flush()
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.stage.environment},
            start_new_session=True,  # so that a compiler's workers end with it
        )

    def _kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _close(self) -> bool:
        self.log.close()
        return False


def run_together(stages: Iterable[Stage], folder: Path, deadline: float) -> list[Result]:
    """Run the stages at the same time; their results, in order."""
    running = [Running(stage, folder, deadline) for stage in stages]
    results: dict[int, Result] = {}
    while len(results) < len(running):
        for index, stage in enumerate(running):
            if index not in results and not stage.poll():
                results[index] = stage.result()
                print(results[index], flush=True)
        time.sleep(0.2)
    return [results[index] for index in range(len(running))]


def tests() -> Stage:
    """Everything in tests/gpu, and what elsewhere has `cuda` in its name and does not replace the GPU."""
    pytest = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    folders = [str(ROOT / "tests" / name) for name in ("ops", "kernels/test_cuda_library.py", "test_measure.py")]
    return Stage("tests", [[*pytest, str(ROOT / "tests/gpu")], [*pytest, "-k", "cuda", *folders]], 160, "tests.log")


def sanitizer(tool: str) -> Stage:
    """compute-sanitizer over `sanitize.py`, without torch's pool, in which an access past an end goes unseen."""
    found = shutil.which("compute-sanitizer") or next((path for path in SANITIZERS if os.path.exists(path)), None)
    script = ROOT / "tests/gpu/sanitize.py"
    missing = "" if found else "compute-sanitizer is not installed"
    missing = missing or ("" if script.exists() else f"no {script.name}")
    command = [found or "", "--tool", tool, "--error-exitcode", "1", sys.executable, str(script)]
    no_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, [command], 160, f"{tool}.log", no_pool, skipped=missing)


def fill_compile_cache() -> Stage:
    """One step of everything that the benchmarks compile."""
    networks = [
        bench(name, contenders := NETWORKS[name][1], rounds=1, base=contenders.partition(",")[0])
        for name in SLOWEST_TO_COMPILE_FIRST
    ]
    return Stage("torch.compile's cache", [bench_kernels(rounds=1), *networks], 160, "compile.log", counts=False)


def bench(network: str, contenders: str, rounds: int, base: str, json_file: Path | None = None) -> list[str]:
    """`normpass bench` of one network, bf16 autocast, channels_last."""
    command = [sys.executable, "-m", "normpass", "bench", f"torchvision:{network}", "--input", NETWORKS[network][0]]
    command += "--device cuda --dtype bfloat16 --channels-last".split()
    command += ["--with", contenders, "--base", base, "--rounds", str(rounds)]
    return command if json_file is None else [*command, "--json", str(json_file)]


def bench_kernels(rounds: int, json_file: Path | None = None) -> list[str]:
    """`normpass bench kernels` of every layer, ResNet-50's shapes."""
    command = [sys.executable, "-m", "normpass", "bench", "kernels", "--device", "cuda", "--rounds", str(rounds)]
    command += ["--layer", "bn_relu", "bn_add_relu", "bn_silu"]
    return command if json_file is None else [*command, "--json", str(json_file)]


def bench_serialised(json_file: Path) -> Stage:
    """Sub-batches around the size of the L2: ResNet-50's regions at batch 256, and a whole step with GroupNorm."""
    command = [sys.executable, "-m", "normpass.bench_serialised", "--device", "cuda", "--batch", "256"]
    command += ["--dtype", "bfloat16", "--rounds", "5", "--json", str(json_file)]
    return Stage("bench serialised", [command], 90, "bench.log", counts=False)


def benchmarks(folder: Path, scratch: Path) -> list[Stage]:
    """The kernels, then each network."""
    kernels = Stage("bench kernels", [bench_kernels(20, folder / "bench_kernels.json")], 110, "bench.log")
    stages = [Stage("kernels", [[sys.executable, "-m", "normpass", "kernels"]], 30, "bench.log"), kernels]
    for name, (_, compiled) in NETWORKS.items():
        contenders = f"eager_channels_last,ours,{compiled}"
        command = bench(name, contenders, 10, "eager_channels_last", scratch / f"{name}.json")
        stages.append(Stage(f"bench {name}", [command], 110, "bench.log"))
    stages.append(bench_serialised(folder / "bench_serialised.json"))
    return stages


def gather(scratch: Path, target: Path) -> None:
    """What the benchmarks of the networks wrote, in one file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(scratch.glob("*.json"))}
    target.write_text(json.dumps(found, indent=1) + "\n")


def main(folder: Path) -> int:
    """Run everything; 0 if all passed."""
    deadline = time.monotonic() + TOTAL_SECONDS
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.log"), *folder.glob("bench_*.json"), *folder.glob("summary.txt")]:
        old.unlink()
    together = [tests(), sanitizer("memcheck"), sanitizer("racecheck"), fill_compile_cache()]
    results = run_together(together, folder, deadline)
    with tempfile.TemporaryDirectory() as scratch:
        for stage in benchmarks(folder, Path(scratch)):
            results += run_together([stage], folder, deadline)
            gather(Path(scratch), folder / "bench_networks.json")
    passed = all(result.good or not result.stage.counts for result in results)
    summary = "\n".join([*map(str, results), f"gpu: {'passed' if passed else 'FAILED'}"])
    (folder / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/gpu/run_all.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
