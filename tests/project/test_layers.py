"""Imports go down only: a file knows the files below it, never one above or beside it in another branch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "normpass": ROOT / "normpass",
    "normpass.passes": ROOT / "passes",
    "normpass.kernels": ROOT / "kernels",
}

# From the bottom up: the folders, and the files beside them. Those of one line do not know each other; "normpass" is
# the package's own `__init__`. Files of one folder may know each other, but not in a circle.
ORDER = (
    ("_version", "errors"),
    ("kernels", "onlookers"),
    ("copies", "environment", "extras", "files", "ops"),
    ("graph", "measure", "models", "recipe"),
    ("capture", "runtime"),
    ("analysis", "nn"),
    ("rewrite", "serialize"),
    ("passes",),
    ("pipeline",),
    ("optimized",),
    ("collect",),
    ("budget", "report"),
    ("options",),
    ("api", "backend"),
    ("bench", "conversion", "demo"),
    ("normpass",),
    ("cli",),
    ("__main__",),
)
BRANCHES = ("sites", "graph", "changes")
"""Folders of `passes`, which do not know each other."""
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}


def source_files() -> list[tuple[str, Path]]:
    """Dotted module name and path of every file of the package."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def imports(module: str, path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that the file imports, wherever the statement stands; `from p import m` names `p.m`."""
    package = f"{module}.__init__" if path.name == "__init__.py" else module
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner if inner in MODULES else source), node


def layer(module: str) -> str:
    """The entry of ORDER that a module of the package belongs to."""
    _, _, inside = module.partition(".")
    return inside.partition(".")[0] or "normpass"


FILES = source_files()
MODULES = {module for module, _ in FILES}
each_file = pytest.mark.parametrize("module, path", FILES, ids=[module for module, _ in FILES])


@each_file
def test_imports_go_down_only(module, path):
    own = layer(module)
    assert own in HEIGHT, f"{path.name} is new: give it its place in ORDER"
    for name, node in imports(module, path):
        if name.partition(".")[0] != "normpass" or layer(name) == own:
            continue
        assert HEIGHT[layer(name)] < HEIGHT[own], f"{path}:{node.lineno}: `{own}` imports `{layer(name)}`"


@each_file
def test_imports_are_by_full_name(module, path):
    for name, node in imports(module, path):
        top = name.partition(".")[0]
        assert top not in ("passes", "kernels"), f"{path}:{node.lineno}: write `normpass.…`, not `{name}`"
        stars = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        assert not stars, f"{path}:{node.lineno}: name what you import"


@pytest.mark.parametrize(
    "path", [p for m, p in FILES if layer(m) in ("ops", "passes", "kernels")], ids=lambda p: p.stem
)
def test_rewrites_and_ops_do_not_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}:{node.lineno}: prints"


def test_every_name_of_the_order_exists():
    assert set(HEIGHT) == {layer(module) for module, _ in FILES}


def test_branches_of_the_passes_do_not_know_each_other():
    for module, path in FILES:
        own = module.split(".")[2:3]
        if layer(module) != "passes" or own[0:1] == [] or own[0] not in BRANCHES:
            continue
        for name, node in imports(module, path):
            other = name.removeprefix("normpass.passes.").partition(".")[0]
            assert other not in BRANCHES or other == own[0], f"{path}:{node.lineno}: `{own[0]}` imports `{other}`"


def test_no_circles():
    """Every file can be read after those that it imports."""
    known = {module: {name for name, _ in imports(module, path)} & MODULES - {module} for module, path in FILES}
    while ready := {module for module, others in known.items() if not others & known.keys()}:
        known = {module: others for module, others in known.items() if module not in ready}
    assert not known


def test_files_are_short():
    """A file is one concept: 400 lines at most, of the tests as well; and at most 15 stand beside the folders."""
    paths = [*(path for _, path in FILES), *(ROOT / "tests").rglob("*.py")]
    long = {str(path): lines for path in paths if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
    assert len(list(FOLDERS["normpass"].glob("*.py"))) <= 15


def test_every_folder_is_packaged():
    """`packages` of pyproject.toml is the tree."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert declared == sorted(module for module, path in FILES if path.name == "__init__.py")
