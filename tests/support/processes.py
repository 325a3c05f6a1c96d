"""Scripts run by several processes at once: `python SCRIPT RANK WORLD RENDEZVOUS_FILE ARGUMENTS…`, over gloo."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

HERE = Path(__file__).parent


def run_processes(
    script: str, world: int, folder: Path, *arguments: str, dies: Sequence[int] = (), timeout: float = 300
) -> list[str]:
    """What each process printed. All have to end well, those in `dies` with another code than 0."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    rendezvous = folder / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(world), str(rendezvous), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = []
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=timeout)
            outputs.append(output)
            assert (process.returncode != 0) == (rank in dies), f"process {rank}: {output}"
    finally:
        for process in processes:
            process.kill()
    return outputs


def begin(timeout: float = 60) -> tuple[int, int, list[str]]:
    """Inside such a script: join the others; the rank, how many there are, and the other arguments."""
    rank, world, rendezvous, *arguments = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(rank),
        world_size=int(world),
        timeout=datetime.timedelta(seconds=timeout),
    )
    return int(rank), int(world), arguments


def end() -> None:
    """Leave: gloo's threads may end an orderly exit with `terminate called without an active exception`."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
