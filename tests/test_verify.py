"""The checks that run after a rewrite find what they are there to find."""

import pytest
import torch
from torch import nn

import normpass
from normpass import module as module_file
from normpass.errors import VerificationError
from normpass.verify import verify_outputs, verify_state


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


def test_a_wrong_rewrite_is_found_on_example_inputs(monkeypatch):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert isinstance(normpass.optimize(net(), x), normpass.Optimized)

    def wrong(captured, options):
        for node in captured.graph.nodes:
            if node.target == "2":  # the ReLU
                node.replace_all_uses_with(node.args[0])
        return build(captured, options)

    build = module_file.build_program
    monkeypatch.setattr(module_file, "build_program", wrong)
    with pytest.raises(VerificationError, match="returns other values"):
        normpass.optimize(net(), x)


@pytest.mark.parametrize(
    "plain, other",
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64) + 1e-5),
        (torch.ones(2), torch.tensor([1.0, float("nan")])),
        ((torch.ones(2),), [torch.ones(2)]),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2))),
    ],
)
def test_outputs_that_differ(plain, other):
    verify_outputs(plain, plain)
    with pytest.raises(VerificationError):
        verify_outputs(plain, other)


def test_state_that_differs():
    model = net()
    verify_state(model, model)
    with pytest.raises(VerificationError, match="no longer the given model's tensor"):
        verify_state(model, net())
    with pytest.raises(VerificationError, match="keys changed"):
        verify_state(model, nn.Sequential(*list(model)[:-1]))
