"""The picture of README: time of a step against the memory kept for backward, of four networks.

    python docs/draw.py

Draws `docs/pictures/frontier-light.svg` and `-dark.svg` from the records of `normpass bench` in `tests/bench/results`.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RECORDS = [
    HERE.parent / "tests" / "bench" / "results" / f"{name}_cpu_torch-2.15.0.json"
    for name in ("bench_batch16", "bench_batch16_efficientnet_b0")
]
CONTENDERS = {"ours": "normpass", "compile_aggressive": "torch.compile, aggressive_recomputation"}
NAMES = {"resnet50": "ResNet-50", "densenet121": "DenseNet-121", "mobilenet_v2": "MobileNetV2"}
NAMES["efficientnet_b0"] = "EfficientNet-B0"
THEMES = {"light": ("#1f2328", "#d0d7de", "#0b6fb8", "#c2571a"), "dark": ("#e6edf3", "#30363d", "#58a6ff", "#f0883e")}


def points() -> dict[str, dict[str, tuple[float, float, float, float]]]:
    """contender -> network -> kept and time as fractions of eager's, and the quartiles of the time."""
    found: dict[str, dict[str, tuple[float, float, float, float]]] = {name: {} for name in CONTENDERS}
    for path in RECORDS:
        rows = json.loads(path.read_text())["rows"]
        kept = {row["network"]: row["kept"] for row in rows if row["contender"] == row["base"]}
        for row in rows:
            if row["contender"] in found:
                network = row["network"].partition(":")[2]
                time = row["ratio"], row["ratio_low"], row["ratio_high"]
                found[row["contender"]][network] = (row["kept"] / kept[row["network"]], *time)
    return found


def draw(theme: str) -> None:
    """One SVG."""
    text, grid, *colours = THEMES[theme]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(1, 1, "s", color=text, label="eager")
    for (contender, by_network), colour in zip(points().items(), colours, strict=True):
        kept, time, low, high = zip(*by_network.values(), strict=True)
        spread = [[t - a for t, a in zip(time, low, strict=True)], [b - t for t, b in zip(time, high, strict=True)]]
        axes.errorbar(kept, time, spread, fmt="o", color=colour, elinewidth=1, alpha=0.9, label=CONTENDERS[contender])
        for network, x, y in zip(by_network, kept, time, strict=True):
            is_left = network == "efficientnet_b0"  # MobileNetV2 lies right of it
            place = {"xytext": (-7 if is_left else 7, -3), "ha": "right" if is_left else "left"}
            axes.annotate(NAMES[network], (x, y), color=colour, textcoords="offset points", fontsize=8, **place)
    axes.set(xlim=(0, 1.1), ylim=(0.55, 1.1))
    axes.set_xlabel("kept for backward, of eager's", color=text)
    axes.set_ylabel("time of a step, of eager's", color=text)
    axes.tick_params(colors=text)
    axes.grid(color=grid, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_color(grid)
    axes.legend(loc="lower right", labelcolor=text, facecolor="none", edgecolor=grid)
    axes.set_facecolor("none")
    path = HERE / "pictures" / f"frontier-{theme}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    for theme in THEMES:
        draw(theme)
