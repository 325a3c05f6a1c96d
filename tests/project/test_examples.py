"""Every file in `examples/` runs, in small; a new one needs its entry here."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import normpass

FOLDER = Path(__file__).parents[2] / "examples"


def losses_are_finite(losses):
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def memory_shrinks(found):
    for before, after in found.values():
        assert 0 < after < before
    before, after = found["kept for backward"]
    assert after < before / 2


def about_half_is_kept(found):
    for before, after in found.values():
        assert 0 < after < 0.6 * before


def every_norm_was_trained(runs):
    assert len(runs) == 5 and all(0 <= run["error"] <= 100 for run in runs)
    assert runs[-1]["decided"] == 9 and len(runs[-1]["usage"]) > 5


def agrees(found):
    assert found["error"] < 1e-4
    assert found["same"] == 1


# name -> (the sizes to run it with, what must hold of its result)
EXAMPLES = {
    "train_resnet": ({"steps": 3, "batch_size": 4, "size": 32}, losses_are_finite),
    "micro_batches": (
        {"batch_sizes": (4,), "seeds": 1, "epochs": 1, "width": 4, "trained": 24},
        every_norm_was_trained,
    ),
    "segmentation": ({"steps": 3, "batch_size": 2, "size": 16, "width": 4}, losses_are_finite),
    "compile_backend": ({"steps": 3, "batch_size": 4, "size": 32, "inner": "eager"}, losses_are_finite),
    "cuda_graph": ({"steps": 3, "batch_size": 4, "size": 32}, losses_are_finite),
    "convert_to_onnx": ({"steps": 2, "batch_size": 4, "size": 32}, agrees),
    "other_norms": ({"channels": 8, "size": 8}, about_half_is_kept),
    "densenet_memory": ({"blocks": (2, 2), "batch_size": 2, "size": 32}, memory_shrinks),
}


NEEDS_GPU = {"cuda_graph"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example(path):
    assert path.stem in EXAMPLES, f"examples/{path.name} is new: give it an entry in {Path(__file__).name}"
    sizes, check = EXAMPLES[path.stem]
    example = loaded(path)
    if path.stem in NEEDS_GPU and not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=f"examples/{path.name} needs a GPU: torch.cuda.is_available"):
            example.main(**sizes)
        return
    check(example.main(**sizes))


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_step_that_the_cuda_graph_captures():
    """On the CPU, without the graph."""
    train, model = loaded(FOLDER / "cuda_graph.py").train, normpass.optimize(nn.Sequential(nn.Linear(4, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    losses = [train(model, optimizer, x, labels) for _ in range(3)]
    assert losses[2] < losses[0] and not losses[0].requires_grad
