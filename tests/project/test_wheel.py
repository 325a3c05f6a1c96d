"""The wheel of `make wheel` installs where there is no compiler, runs its kernels there and does the demo's job.

It takes the libraries that the installation has built. torch and the demo's packages are those of this environment.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = {package.metadata["Name"] for package in distributions()}
MISSING = {"pip", "setuptools", "auditwheel"} - INSTALLED

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux"),
    pytest.mark.skipif(MISSING, reason=f"needs {', '.join(MISSING)}: the extra `test` has them"),
]


def run(*command: str | Path, cwd: Path, path: Path, **variables: str) -> str:
    """Where PATH has nothing but the folder `path`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PATH": str(path)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder, scripts = tmp_path_factory.mktemp("wheel"), Path(sysconfig.get_path("scripts"))
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    run(sys.executable, "-W", "ignore", "-c", build, folder, cwd=ROOT, path=scripts)
    (built,) = folder.glob("*.whl")
    arguments = ("repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder / "dist", built)
    run(sys.executable, "-m", "auditwheel", *arguments, cwd=folder, path=scripts)
    (repaired,) = (folder / "dist").glob("*.whl")
    return repaired


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel and, seen from there, the packages of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder, path=folder).strip())
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    run(*install, cwd=folder, path=folder)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_its_name(wheel):
    assert "-py3-none-manylinux" in wheel.name


def test_its_kernels_run_without_a_compiler(fresh):
    said = run(fresh, "-m", "normpass", "kernels", cwd=fresh.parent, path=fresh.parent)
    assert "C++, " in said and "not built" not in said, said
    where = run(fresh, "-c", "import normpass.kernels as k; print(k.__file__)", cwd=fresh.parent, path=fresh.parent)
    assert where.startswith(str(fresh.parents[1])), "it is the wheel's package that runs"


@pytest.mark.nets
def test_it_runs_the_demo(fresh, tmp_path):
    said = run(fresh, "-m", "normpass", "demo", cwd=tmp_path, path=fresh.parent)
    assert "the losses agree" in said
    assert (tmp_path / "normpass-demo.png").exists()
