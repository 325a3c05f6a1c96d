"""The demo from end to end, in small, and its verdict."""

import struct
from dataclasses import replace

import pytest

from normpass.cli import main as cli
from normpass.demo import training as demo
from normpass.measure import Ratio, StepTime, Timeline

TIMELINE = Timeline((0.0, 0.1, 0.2, 0.4), (0, 2**20, 2**21, 0), 2)
TIME = StepTime(1.0, 1.0, 1.0, (1.0,))
RESULT = demo.Result("net", ((2.0, 2.0),), (2**21, 2**20), (TIMELINE, TIMELINE), (TIME, TIME), Ratio(1.0, 1.0, 1.0))


def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_ROUNDS", 1)
    png = tmp_path / "plot.png"
    assert cli.main(["demo", "--steps", "2", "--batch", "4", "--size", "32", "--out", str(png)]) == 0
    out = capsys.readouterr().out
    assert "the losses agree" in out
    assert all(what in out for what in ("kept for backward", "peak memory", "difference", "optimized / plain"))
    assert png.name in out.replace("\n", "")
    width, height = png_size(png)
    assert width > 600 and height > 300
    assert png.stat().st_size > 10_000  # an empty plot of that size takes about 3000


def test_plot_of_a_file_with_any_name(tmp_path):
    demo.plot(RESULT, tmp_path / "plot")
    assert png_size(tmp_path / "plot")[0] > 600


@pytest.mark.parametrize("losses", [((2.0, 2.0), (1.0, 1.00001)), ((2.0, float("nan")),)])
def test_different_losses_fail(losses, tmp_path, capsys, monkeypatch):
    result = replace(RESULT, losses=losses)
    assert not result.agrees
    monkeypatch.setattr(demo, "run", lambda *_: result)
    assert cli.main(["demo", "--out", str(tmp_path / "plot.png")]) == 1


@pytest.mark.parametrize("module, package", demo._NEEDS.items())
def test_missing_package(module, package, capsys, monkeypatch):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == f'normpass: error: the demo needs {package}: pip install "normpass[demo]"\n'


def png_size(path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])
