"""Running statistics move once a step, by whichever function they are moved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import assert_equal, image, spread, train

import normpass
from normpass.analysis.fake_operators import Operators
from normpass.graph.operators import MOVES_STATISTICS
from normpass.passes.graph import rebuild_values

aten = torch.ops.aten


def tensors(n: nn.BatchNorm2d) -> tuple:
    return n.weight, n.bias, n.running_mean, n.running_var


def beside(n: nn.BatchNorm2d, x: Tensor) -> Tensor:
    aten.batch_norm_update_stats.default(x, n.running_mean, n.running_var, 0.1)  # its result is not read
    return F.batch_norm(x, None, None, n.weight, n.bias, True)


FUNCTIONS: dict[str, Callable[[nn.BatchNorm2d, Tensor], Tensor]] = {
    "F": lambda n, x: F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, n.training),
    "F instance": lambda n, x: F.instance_norm(x, n.running_mean, n.running_var, n.weight, n.bias, n.training),
    "torch": lambda n, x: torch.batch_norm(x, *tensors(n), n.training, 0.1, 1e-5, False),
    "torch, by name": lambda n, x: torch.batch_norm(
        input=x,
        weight=None,
        bias=n.bias,
        running_mean=n.running_mean,
        running_var=n.running_var,
        training=n.training,
        momentum=0.3,
        eps=1e-5,
        cudnn_enabled=True,
    ),
    "torch instance": lambda n, x: torch.instance_norm(x, *tensors(n), n.training, 0.1, 1e-5, False),
    "torch native": lambda n, x: torch.native_batch_norm(x, *tensors(n), n.training, 0.1, 1e-5)[0],
    "aten": lambda n, x: aten.batch_norm.default(x, *tensors(n), n.training, 0.1, 1e-5, False),
    "aten instance": lambda n, x: aten.instance_norm.default(x, *tensors(n), n.training, 0.1, 1e-5, False),
    "aten legit": lambda n, x: aten._native_batch_norm_legit.default(x, *tensors(n), n.training, 0.1, 1e-5)[0],
    "beside the norm": beside,
    "views": lambda n, x: F.batch_norm(x, n.running_mean[:], n.running_var.view(4), n.weight, n.bias, n.training),
}


class Net(nn.Module):
    """Every norm's result is cheap to make again, and saved."""

    def __init__(self, function: Callable[[nn.BatchNorm2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.norm = function, nn.BatchNorm2d(4)
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(torch.tanh(self.function(self.norm, self.first(x))))
        return self.last(torch.sigmoid(self.function(self.norm, y) * 2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_trains_alike(name: str) -> None:
    torch.manual_seed(0)
    plain = spread(Net(FUNCTIONS[name]))
    optimized = normpass.optimize(copy.deepcopy(plain))
    assert_equal(train(plain, (image(),)), train(optimized, (image(),)))


def test_each_that_may_be_made_again_has_a_form_that_moves_nothing() -> None:
    assert rebuild_values._AGAIN.keys() == MOVES_STATISTICS


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_a_move_that_no_schema_mentions_is_a_write(name: str, training: bool) -> None:
    """As `F.batch_norm` runs on other devices."""
    with FakeTensorMode():
        x, vectors = torch.empty(2, 4, 3, 3, device="cuda"), [torch.empty(4, device="cuda") for _ in range(4)]
        with Operators() as operators:
            getattr(aten, name).default(x, *vectors, training, 0.1, 1e-5)
    assert [any(t is v for v in vectors[2:]) for t in operators.written] == [True, True] * training
