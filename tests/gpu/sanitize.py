"""Every CUDA kernel once, on small tensors: to be run under compute-sanitizer.

    python tests/gpu/sanitize.py compute-sanitizer memcheck
    python tests/gpu/sanitize.py compute-sanitizer racecheck

Where the sanitizer refuses the device or the process, that is said, and it is no failure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

import cuda_checks as checks
from cuda_checks import Site

from normpass.kernels.contract import Layout, Running
from normpass.kernels.cuda import library as cuda_library
from normpass.kernels.cuda.library import GuardedKernels

LAYOUTS = (Layout(3000, 24, 1), Layout(700, 5, 1), Layout(40, 300, 1), Layout(9, 24, 8), Layout(300, 3, 49))


def run(kernels: GuardedKernels) -> int:
    """Each kernel at each layout, compared with the formulas; how many calls that were."""
    calls = 0
    for dtype in checks.DTYPES:
        for layout in LAYOUTS if dtype in (torch.float32, torch.bfloat16) else LAYOUTS[:1]:
            site = Site(layout, dtype, "leaky_relu", residual=True, device="cuda")
            checks.check_moments(kernels, site.x, layout)
            checks.check_norm_act(kernels, site)
            checks.check_norm_act_backward(kernels, site)
            checks.check_gradient_in_two_parts(kernels, site)
            checks.check_mask(kernels, site)
            checks.check_normalized_residual(kernels, site)
            checks.check_inplace_abn_backward(kernels, site.keep_weight_from_zero())
            pieces = [1, 1, layout.channels - 2]
            checks.check_cat_norm_act(kernels, site, pieces)
            checks.check_cat_norm_act_backward(kernels, site, pieces, [True, False, True])
            calls += 9
    running = Running(torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda"), 0.1)
    kernels.running_stats(running, torch.ones(1000, device="cuda"), torch.ones(1000, device="cuda"), 10)
    torch.cuda.synchronize()
    return calls + 1


def under(sanitizer: str, tool: str) -> int:
    """This script under the sanitizer: 1 for what it found or for a wrong number."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    found = "ERROR SUMMARY" in done.stdout and "ERROR SUMMARY: 0 errors" not in done.stdout
    if done.returncode == 0 or found or "Traceback" in done.stdout:
        return int(done.returncode != 0 or found)
    last = (done.stdout.strip() or "no output").splitlines()[-1]
    print(f"SKIPPED: {tool} does not run here, status {done.returncode}: {last}")
    return 0


def main() -> int:
    found, words = cuda_library.load()
    print(words)
    if found is None:
        return 1
    print(f"{run(found)} calls compared")
    print("\n".join(found.failures))
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(under(*sys.argv[1:]) if len(sys.argv) == 3 else main())
