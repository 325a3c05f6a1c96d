"""Whatever `changes=` takes by name keeps to the contract, is documented, and is undone by `restore`."""

from pathlib import Path

import pytest
import torch
from torch import nn

import normpass
from normpass.passes import CHANGES

ROOT = Path(__file__).parents[2]
each_change = pytest.mark.parametrize("name", CHANGES)


@each_change
def test_the_contract_is_kept(name):
    change = CHANGES[name]()
    assert isinstance(change.applies_to_graph, bool) and isinstance(change.changes_eval, bool)
    assert callable(change.change_modules) and callable(change.change_graph)
    if change.applies_to_graph and change.changes_eval:
        assert callable(change.calls), "`normpass.convert` runs forward under it"


@each_change
def test_it_is_documented(name):
    assert f"normpass.passes.{CHANGES[name].__name__}" in (ROOT / "docs" / "reference.md").read_text()


@each_change
def test_restore_undoes_it(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    restored = normpass.restore(normpass.optimize(model, changes=(name,)))
    assert [type(layer) for layer in restored] == [type(layer) for layer in model]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), restored.eval()(x))
