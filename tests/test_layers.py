"""Imports go down only: a file knows the files below it, never one above or beside it in another branch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "normpass": ROOT / "normpass",
    "normpass.passes": ROOT / "passes",
    "normpass.kernels": ROOT / "kernels",
}

# From the bottom up. The modules of one line do not know each other; "normpass" is the package's own
# `__init__`, "ops" and "passes" whole packages (whose own files may know each other).
ORDER = (
    ("_version", "errors", "graph", "untouched", "kernels", "kinds", "cumulative", "fake_norm", "random_state"),
    (
        "autocast",
        "dynamo_limits",
        "measure",
        "ops",
        "extras",
        "entries",
        "files",
        "fold",
        "grouping",
        "cuts",
        "environment",
        "shared_copy",
    ),
    ("operators", "recipe", "weights", "export", "timing", "trial", "capture", "verify"),
    ("notes",),
    ("facts", "nn", "replay", "functional", "serialised", "report", "agreement", "plots", "concatenation"),
    ("fake_run", "sites", "minimum_cut", "sharing", "two_readers", "convolution", "per_sample", "liveness", "cost"),
    ("rewrite", "joins", "plain_sites", "stand_ins", "units", "serial_norm", "choose"),
    ("planner", "traffic"),  # the planner is given the rewrites, it never imports them
    ("passes", "step_plan"),
    ("pipeline",),
    ("optimized",),
    ("collect",),
    ("explain", "tune"),
    ("budget",),
    ("api", "backend"),
    ("convert",),
    ("from_onnx",),
    ("normpass",),
    ("digits", "models"),
    ("bench_bytes", "bench_layers", "bench_serialised", "contenders", "overhead"),
    ("bench_convolutions", "bench_kernels", "bench_networks"),
    ("bench_tables",),
    ("bench", "demo", "cli_convert"),
    ("cli",),
    ("__main__",),
)
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
