"""An installation compiles what has changed and nothing else. The compiler is a stub that notes what it is given."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools to build the package")

ROOT = Path(__file__).parents[2]
TOP = ("normpass", "passes", "kernels")
COMPILER = """#!/bin/sh
echo "$@" >> compiled
[ -e broken ] && exit 1
for last; do [ "$before" = -o ] && output=$last; before=$last; done
echo "$@" > "$output"
for input; do case "$input" in *.o) [ "$input" != "$output" ] && cat "$input" >> "$output";; esac; done
exit 0
"""
INSTALL = "from setuptools.build_meta import build_{kind} as build; build('wheels')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree as the package's, with two sources, a header and nothing in them."""
    packages = [path.parent.relative_to(ROOT) for top in TOP for path in (ROOT / top).rglob("__init__.py")]
    for name in (*packages, "kernels/include", "wheels"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "normpass/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("kernels/cpu/one.cpp", "kernels/cpu/two.cpp", "kernels/cpu/tile.h", "kernels/include/activation.h"):
        (tmp_path / name).write_text("\n")
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    return tmp_path


def compilations(tree: Path, kind: str = "editable", **variables: str) -> int:
    """How many sources are compiled by an installation."""
    compiler = str(tree / "compiler")
    environment = os.environ | {"CC": compiler, "CXX": compiler, "LDSHARED": compiler, "LDCXXSHARED": compiler}
    command = [sys.executable, "-W", "ignore", "-c", INSTALL.format(kind=kind)]
    (tree / "compiled").write_text("")
    done = subprocess.run(
        command, cwd=tree, env=environment | variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (tree / "compiled").read_text().count(".cpp")


def libraries(tree: Path) -> list[Path]:
    return sorted((tree / "kernels" / "cpu").glob("_*.so"))


def test_what_is_built_is_not_built_again(tree):
    assert compilations(tree) == 2 * len(libraries(tree)) > 0
    for path in tree.rglob("*"):
        path.touch()  # as a fresh clone or `touch pyproject.toml` leaves them
    assert compilations(tree) == 0
    assert compilations(tree, "wheel") == 0, "a wheel takes the libraries of the source tree"


@pytest.mark.parametrize(
    "changed", ["kernels/cpu/one.cpp", "kernels/cpu/tile.h", "kernels/include/activation.h", "setup.py"]
)
def test_a_change_builds_again(tree, changed):
    first = compilations(tree)
    times = os.stat(tree / changed)
    with open(tree / changed, "a") as file:
        file.write("\n")
    os.utime(tree / changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an archive that is unpacked
    assert compilations(tree) == first
    assert compilations(tree) == 0


def test_other_flags_build_again(tree):
    first = compilations(tree)
    assert compilations(tree, CXXFLAGS="-O0") == first


def test_a_library_of_other_sources_does_not_stay(tree):
    compilations(tree)
    assert libraries(tree)
    (tree / "kernels/cpu/one.cpp").write_text("int changed;\n")
    (tree / "broken").touch()
    compilations(tree)
    assert not libraries(tree)


def test_a_wheel_is_for_any_python(tree):
    compilations(tree, "wheel")
    (wheel,) = (tree / "wheels").glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert [name for name in ZipFile(wheel).namelist() if name.startswith("normpass/kernels/cpu/_")]
