"""Batch, group, Kalman and sparse switchable norm at 32, 4 and 2 samples a batch, on scikit-learn's digits.

    python examples/micro_batches.py --json examples/results/micro_batches.json --plot micro_batches.png

trains a small residual network once for every norm, batch size and seed, prints the mean error on held-out images
with its spread over the seeds, records everything and draws it. Runs that the file has already are not repeated,
so it can be run in parts: --norms, --batch-sizes, --seeds.

The last maps are 1×1: at 2 samples a batch those norms see two values a channel. `kalman` has the authors' rule,
by which a prediction is used only where the predicted variance is on average below 100 times the observed one, which
two values nearly never are; `kalman_inf` uses every prediction. The weight of the prediction is the authors': 0.9
for micro-batches, 0.05 for large batches. The radius of the switchable norm reaches 1 in the middle of the training,
so that a decided network is still trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normpass
from normpass.demo import digits
from normpass.nn import RadiusSchedule, freeze_decided, parameter_groups, usage
from normpass.passes import Kalman

NORMS = ("batch", "group", "kalman", "kalman_inf", "switchable")
TRAINED = 1200
"""of the 1797 images; the others are held out"""
LEARNING_RATE = 0.1
"""at 32 samples a batch, and in proportion at other sizes"""


class Block(nn.Module):
    """conv, norm, ReLU, conv, norm, and a shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three blocks on 8×8 images: 4×4, 2×2 and 1×1 maps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def with_group_norm(model: nn.Module) -> nn.Module:
    """The same network with 4 groups wherever there is a BatchNorm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(4, child.num_features))
    return model


def build(norm: str, batch_size: int, width: int) -> nn.Module:
    model = SmallResNet(width)
    if norm == "group":
        return with_group_norm(model)
    if norm.startswith("kalman"):
        weight = 0.9 if batch_size < 8 else 0.05
        ratio = math.inf if norm == "kalman_inf" else 100.0
        return normpass.optimize(model, changes=(Kalman(prediction_weight=weight, largest_ratio=ratio),))
    if norm == "switchable":
        return normpass.optimize(model, changes=("sparse_switchable",))
    return model


def train(norm: str, batch_size: int, seed: int, epochs: int, width: int, trained: int) -> dict[str, Any]:
    """One run: its error on the held-out images, in per cent, and for switchable norm its usage over training."""
    images, labels = digits._load()
    torch.manual_seed(seed)
    model = build(norm, batch_size, width)
    groups = parameter_groups(model, LEARNING_RATE * batch_size / 32, weight_decay=1e-4)
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, momentum=0.9)
    steps = epochs * (trained // batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    radius = RadiusSchedule(model, steps // 2) if norm == "switchable" else None
    used = []
    for step, chosen in enumerate(drawn(trained, batch_size, epochs, seed)):
        if radius is not None and step % max(steps // 40, 1) == 0:
            used.append({"step": step, "radius": radius.radius, **usage(model)})
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        decay.step()
        if radius is not None:
            radius.step()
    model.eval()
    with torch.no_grad():
        wrong = model(images[trained:]).argmax(1) != labels[trained:]
    run: dict[str, Any] = {"norm": norm, "batch_size": batch_size, "seed": seed, "epochs": epochs}
    run["error"] = round(100 * float(wrong.float().mean()), 3)
    run["diverged"] = not all(bool(p.isfinite().all()) for p in model.parameters())
    if radius is not None:
        run["usage"] = [*used, {"step": steps, "radius": radius.radius, **usage(model)}]
        run["decided"] = len(freeze_decided(model))
    return run


def drawn(trained: int, batch_size: int, epochs: int, seed: int) -> Any:
    """Indices of every batch; the order differs from epoch to epoch and seed to seed, not from norm to norm."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(trained, generator=generator).split(batch_size):
            if len(chosen) == batch_size:
                yield chosen


# --- results ----------------------------------------------------------------------------------------


def table(runs: list[dict[str, Any]]) -> str:
    """Mean error in per cent ± standard deviation over the seeds: norms by batch sizes, as Markdown."""
    sizes = sorted({run["batch_size"] for run in runs}, reverse=True)
    lines = ["| error, % | " + " | ".join(f"{size} a batch" for size in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for norm in (n for n in NORMS if any(run["norm"] == n for run in runs)):
        cells = []
        for size in sizes:
            errors = errors_of(runs, norm, size)
            spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
            cells.append(f"{statistics.mean(errors):.2f} ± {spread:.2f} ({len(errors)})" if errors else "not measured")
        lines.append(f"| {norm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors_of(runs: list[dict[str, Any]], norm: str, batch_size: int) -> list[float]:
    return [run["error"] for run in runs if (run["norm"], run["batch_size"]) == (norm, batch_size)]


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Errors by batch size, and what the switchable layers used over training, averaged over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({run["batch_size"] for run in runs})
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for offset, norm in enumerate(n for n in NORMS if any(run["norm"] == n for run in runs)):
        found = [(i, errors_of(runs, norm, size)) for i, size in enumerate(sizes)]
        places = [i + 0.06 * (offset - 2) for i, errors in found if errors]
        means = [statistics.mean(errors) for _, errors in found if errors]
        spreads = [statistics.stdev(errors) if len(errors) > 1 else 0.0 for _, errors in found if errors]
        axes[0].errorbar(places, means, spreads, marker="o", capsize=3, label=norm)
    axes[0].set(xlabel="samples a batch", ylabel="error, %", title="held-out digits")
    axes[0].set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes[0].legend(fontsize=8)
    curves = [run["usage"] for run in runs if run["norm"] == "switchable" and run["batch_size"] == sizes[0]]
    for axis, which in zip(axes[1:], ("mean", "var"), strict=True):
        points = min((len(curve) for curve in curves), default=0)
        steps = [curves[0][i]["step"] for i in range(points)] if curves else []
        for norm in ("instance", "layer", "batch"):
            shares = [statistics.mean(curve[i][which][norm] for curve in curves) for i in range(points)]
            axis.plot(steps, shares, label=norm)
        axis.set(xlabel="step", ylabel="share", ylim=(0, 1), title=f"used for the {which}, {sizes[0]} a batch")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    norms: Sequence[str] = NORMS,
    batch_sizes: Sequence[int] = (32, 4, 2),
    seeds: int = 5,
    epochs: int = 4,
    width: int = 16,
    trained: int = TRAINED,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> list[dict[str, Any]]:
    """Train what is not recorded yet; returns every run."""
    runs: list[dict[str, Any]] = []
    if json_file is not None and json_file.exists():
        runs = json.loads(json_file.read_text())["runs"]
    known = {(run["norm"], run["batch_size"], run["seed"]) for run in runs}
    for norm, batch_size, seed in itertools.product(norms, batch_sizes, range(seeds)):
        if (norm, batch_size, seed) in known:
            continue
        runs.append(train(norm, batch_size, seed, epochs, width, trained))
        print(f"{norm}, {batch_size} a batch, seed {seed}: {runs[-1]['error']:.2f} %", flush=True)
        if json_file is not None:
            record(runs, json_file)
    print(table(runs))
    if plot is not None:
        draw(runs, plot)
    return runs


def record(runs: list[dict[str, Any]], path: Path) -> None:
    runs = sorted(runs, key=lambda run: (run["norm"], run["batch_size"], run["seed"]))
    versions = {name: version(name) for name in ("torch", "scikit-learn")}
    result = {"device": "CPU, one thread", "versions": versions, "trained": TRAINED, "runs": runs}
    path.write_text(json.dumps(result, default=float) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=NORMS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(32, 4, 2))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--json", dest="json_file", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**vars(arguments()))
