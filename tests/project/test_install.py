"""Without a compiler the package is built all the same, runs the references, and says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="needs setuptools to build the package")

ROOT = Path(__file__).parents[2]
SOURCES = ("normpass", "passes", "kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

TRAIN = """
import torch, normpass
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
optimized, x = normpass.optimize(net), torch.randn(2, 3, 8, 8, dtype=torch.float64)
for model in (net, optimized):
    model(x).square().sum().backward()
for plain, ours in zip(net.parameters(), optimized.parameters()):
    assert torch.allclose(plain.grad, ours.grad, rtol=1e-9), (plain.grad, ours.grad)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the package as it is built where PATH has no compiler."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    (folder / "bin").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")} | {"PATH": str(folder / "bin")}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-lib", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def run(built: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(built)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=built, env=environment, capture_output=True, text=True, check=False
    )


def test_without_a_compiler_it_builds_and_says_what_is_missing(built):
    assert not list(built.rglob("*.so"))
    done = run(built, "-m", "normpass", "kernels")
    assert done.returncode == 0, done.stderr
    assert "not built when normpass was installed: install a C++ compiler" in done.stdout


def test_without_kernels_it_trains_the_same(built):
    done = run(built, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
