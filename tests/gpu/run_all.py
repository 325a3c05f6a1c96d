"""What `make gpu` runs on a machine with a GPU: answers in the order of their worth, each written when it is there.

    python3 tests/gpu/run_all.py FOLDER [SECONDS [STAGE…]]

Nothing is installed or built. FOLDER gets `summary.txt`, `rows.jsonl` and `log.txt`; `schedule.py` says how. Code in
build/gpu_cache (see `fill_cache.py`) is used where it fits, so that little has to be compiled. While correctness is
tested torch.compile fills its own cache on disk; from then on what is measured has the machine to itself. The last
seconds are for writing. The exit status says whether all that ran was right.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from schedule import Report, Schedule, Stage

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "gpu_cache"
TOTAL_SECONDS = 570
FOR_WRITING = 30
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")

CORRECT = (
    *("resnet18:float64", "resnet18:bfloat16", "mobilenet_v2:float64", "mobilenet_v2:bfloat16"),
    *("resnet18:float32", "mobilenet_v2:float32"),
    *("CUDA graph", "side stream", "threads"),
)
MAIN = tuple(
    f"resnet50:256:{name}"
    for name in (
        *("eager_channels_last", "ours", "ours@0.8", "ours@0.5", "compile", "compile_aggressive"),
        *("compile@0.5", "compile_normpass"),
    )
)
OTHERS = tuple(
    f"{network}:{batch}:{name}"
    for network, batch in (
        *(("densenet121", 256), ("mobilenet_v2", 256), ("efficientnet_b0", 256), ("resnet50", 32)),
        *(("densenet121", 32), ("mobilenet_v2", 32), ("efficientnet_b0", 32), ("deeplabv3_resnet50", 16)),
    )
    for name in ("eager_channels_last", "ours", "compile")
)
SHAPES = ("256x256x56x56", "256x64x112x112", "256x512x28x28", "256x1024x14x14", "256x2048x7x7", "256x64x56x56")
OPS = (
    *(f"op:{shape}" for shape in SHAPES),
    *(f"layer:{layer}:{SHAPES[0]}" for layer in ("bn_relu", "bn_add_relu", "bn_silu")),
    *(f"layer:bn_relu:{shape}" for shape in SHAPES[2:5]),
    *("op:32x256x56x56", "op:32x1024x14x14", "layer:bn_relu:32x256x56x56"),
)


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(HERE / name), *arguments]


def stages() -> list[Stage]:
    """In the order of their worth."""
    return [
        Stage("kernels", [sys.executable, "-m", "normpass", "kernels"], 40, is_shown=True),
        Stage("correctness", script("correctness.py"), 75, CORRECT, 40),
        Stage("ResNet-50", script("step_times.py"), 220, MAIN, 90),
        Stage("ops", script("op_table.py"), 80, OPS, 40),
        Stage("other networks", script("step_times.py"), 110, OTHERS, 60),
        *tests(),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]


def compile_cache() -> Stage:
    """One step of what torch.compile is to compile, beside the tests of correctness."""
    compiled = tuple(item for item in MAIN if ":compile" in item)
    return Stage("compile cache", script("step_times.py", "--once"), 110, compiled)


def tests() -> list[Stage]:
    """Everything in tests/gpu, and what elsewhere has `cuda` in its name and does not replace the GPU."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    others = [str(ROOT / "tests" / name) for name in ("ops", "kernels/test_cuda_library.py", "measure")]
    return [
        Stage("tests of the kernels", [*pytest, str(HERE)], 120),
        Stage("tests of the ops", [*pytest, "-k", "cuda", *others], 60),
    ]


def sanitizer(tool: str) -> Stage:
    """compute-sanitizer over `sanitize.py`, without torch's pool, in which an access past an end goes unseen."""
    found = shutil.which("compute-sanitizer") or next((path for path in SANITIZERS if os.path.exists(path)), "")
    command = [sys.executable, str(HERE / "sanitize.py"), found, tool]
    missing = "" if found else "compute-sanitizer is not installed"
    return Stage(tool, command, 90, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, skipped=missing)


def prepare(folder: Path) -> dict[str, str]:
    """A package of links, as an installed one looks, and the environment that finds it and our caches."""
    package = folder / "normpass"
    package.mkdir()
    for path in [*(ROOT / "normpass").iterdir(), ROOT / "passes", ROOT / "kernels"]:
        (package / path.name).symlink_to(path)
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    CACHE.mkdir(parents=True, exist_ok=True)
    return {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(CACHE), "PYTHONUNBUFFERED": "1"}


def main(folder: Path, seconds: float, wanted: Sequence[str] = ()) -> int:
    """Run everything, or the stages that are `wanted`; 0 if all that ran was right."""
    report, deadline = Report(folder), time.monotonic() + seconds - FOR_WRITING
    with tempfile.TemporaryDirectory() as links:
        os.environ.update(prepare(Path(links)))
        os.chdir(links)  # nothing is imported from the working folder by chance
        schedule = Schedule(report, deadline)
        try:
            run(schedule, [stage for stage in stages() if stage.name in wanted or not wanted])
        finally:
            schedule.end_beside()
    report.say(f"failed: {'; '.join(report.failed)}" if report.failed else "all that ran was right")
    report.close()
    return 1 if report.failed else 0


def run(schedule: Schedule, chosen: Sequence[Stage]) -> None:
    """The stages in their order; what compiles beside them ends before anything is timed."""
    for stage in chosen:
        if stage.name == "correctness":
            schedule.begin_beside(compile_cache())
        schedule.run(stage)
        schedule.end_beside()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python3 tests/gpu/run_all.py FOLDER [SECONDS [STAGE…]]")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else TOTAL_SECONDS
    sys.exit(main(Path(sys.argv[1]).absolute(), seconds, sys.argv[3:]))
