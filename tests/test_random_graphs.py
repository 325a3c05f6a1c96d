"""Random graphs of convolutions, norms, activations, joins and in-place operations train like the plain model."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import normpass

CHANNELS = 4
ACTIVATIONS = (
    lambda: nn.ReLU(),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.SiLU(inplace=True),
    lambda: nn.LeakyReLU(0.1),
    lambda: nn.Hardswish(),
    lambda: nn.ELU(),
    lambda: nn.Sigmoid(),
    lambda: nn.Identity(),
)
BINARY = {
    "add": lambda a, b: a + b,
    "iadd": lambda a, b: a.add_(b),
    "mul": lambda a, b: a * b,
    "imul": lambda a, b: a.mul_(b),
    "gate": lambda a, b: a * F.adaptive_avg_pool2d(b, 1).sigmoid(),
    "cat": lambda a, b: torch.cat((a, b), 1)[:, 1 : CHANNELS + 1],
    "swap": lambda a, b: torch.cat((*a.chunk(2, 1)[1:], b.chunk(2, 1)[0]), 1),
}
UNARY = {
    "relu": F.relu,
    "relu_": lambda a: a.relu_(),
    "pool": lambda a: F.max_pool2d(a, 3, 1, 1),
    "average": lambda a: F.avg_pool2d(a, 3, 1, 1),
    "up": lambda a: F.max_pool2d(F.interpolate(a, scale_factor=2), 2),
    "pad": lambda a: F.pad(a, (1, 0, 0, 1))[:, :, 1:, :-1],
    "view": lambda a: a.flatten(2).view(a.shape),
    "scale": lambda a: a * 0.5,
    "tanh": torch.tanh,
}
LAYERS = ("conv", "norm", "act")


@st.composite
def steps(draw):
    """(operation, operands, detail), each operand an index into what is there by then."""
    program = []
    for there in range(1, draw(st.integers(3, 12)) + 1):
        index = st.integers(0, there - 1)
        recent = st.one_of(st.just(there - 1), index)
        kind = draw(st.sampled_from((*LAYERS, *LAYERS, *LAYERS, *BINARY, *UNARY)))
        program.append((kind, draw(recent), draw(index), draw(st.integers(0, len(ACTIVATIONS) - 1))))
    return tuple(program)


class Random(nn.Module):
    """Runs a program over a growing list of (N, 4, H, W) tensors."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList(self._layer(kind, detail) for kind, _, _, detail in program)
        self.last = nn.Conv2d(CHANNELS, 2, 1)

    @staticmethod
    def _layer(kind, detail):
        if kind == "conv":
            return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=1 + detail % 2, bias=detail % 3 == 0)
        if kind == "norm":
            return nn.BatchNorm2d(CHANNELS, affine=detail % 4 != 0, track_running_stats=detail % 5 != 0)
        return ACTIVATIONS[detail]() if kind == "act" else nn.Identity()

    def forward(self, x):
        values = [x]
        for (kind, first, second, _), layer in zip(self.program, self.layers, strict=True):
            if kind in LAYERS:
                values.append(layer(values[first]))
            elif kind in BINARY:
                values.append(BINARY[kind](values[first], values[second]))
            else:
                values.append(UNARY[kind](values[first]))
        return self.last(values[-1])


def train(model):
    """Outputs, gradients and buffers of two steps, then the outputs in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results = []
    for step in range(2):
        x = torch.randn(3, CHANNELS, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y = model(x * 1.0)
        optimizer.zero_grad()
        y.square().mean().backward()
        results += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        results += [b.clone() for b in model.buffers()]
        optimizer.step()
    model.eval()
    return [*results, model(x * 1.0).detach()]


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps())
def test_random_graphs_train_the_same(program):
    torch.manual_seed(0)
    plain = Random(program).double()
    optimised = normpass.optimize(copy.deepcopy(plain))
    try:
        expected = train(plain)
    except RuntimeError as error:
        assume("modified by an inplace operation" not in str(error) and "leaf Variable" not in str(error))
        raise
    actual = train(optimised)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
