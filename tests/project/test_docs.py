"""The code of README and of the guides runs as it stands there; commands are ones that exist; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import image

import normpass
import normpass.nn
import normpass.passes
from normpass.cli.bench import with_benchmark
from normpass.cli.main import _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
NEEDS = {"conversion.md": "onnxruntime"}


def blocks(page: Path, language: str) -> list[str]:
    """The code between ``` fences of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def names() -> dict[str, Any]:
    """What the code takes as there."""
    return {"model": network(), "images": image(4, 3, 16, 16).float(), "torch": torch, "normpass": normpass}


@each_page
def test_the_code_runs(page, tmp_path, monkeypatch):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    given = names()
    for code in blocks(page, "python"):
        exec(code, given)
        given = names() if page.name == "README.md" else given  # each block there stands for itself


@each_page
def test_the_commands_exist(page):
    for text in [*blocks(page, "console"), *blocks(page, "")]:
        for line in text.splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("normpass ", "make ")) else []
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
            elif words:
                words = words[1:]
                _parser().parse_args(with_benchmark(words) if words[0] == "bench" else words)


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    links = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1400
