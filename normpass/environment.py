"""What a benchmark was taken with: versions, device, cache, and the OpenMP runtimes of this process."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from normpass._version import __version__

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 32 * 2**20
_MAPS = Path("/proc/self/maps")
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def environment(device: str, command: str) -> dict[str, Any]:
    """Command, date, device, versions and allocator of a run, as JSON holds them.

    Args:
        device: "cpu" or "cuda". The clocks of a GPU are as they were found: nothing here sets them.
    """
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def device_name(device: str) -> str:
    """The device in words: its name, and for the CPU its instructions and threads."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)} (clocks untouched)"
    threads = torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU {platform.machine()} {instructions}, {threads} thread{'' if threads == 1 else 's'}"


def versions() -> dict[str, str]:
    """Of normpass, Python, torch and, where they are there, the libraries that matter for a result."""
    found = {"normpass": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "timm", "triton", "cuda-bindings"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's largest cache; for a CPU that does not say, 32 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max([int(size[:-1]) * 1024 for size in sizes if size.endswith("K")], default=_USUAL_CACHE)


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes in this process; None where the system does not say (only Linux does).

    More than one means more threads than cores: each runtime has a pool of its own.
    """
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _OPENMP.search(path))


def memory_bytes() -> int:
    """What this machine has; 1 PiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**50
