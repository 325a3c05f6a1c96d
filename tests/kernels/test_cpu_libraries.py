"""Every library that was built for this processor computes the same step, not only the best one."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normpass
from normpass import kernels
from normpass.kernels.cpu import library as cpu_library

NAMES = cpu_library.INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-4}


@pytest.fixture(params=NAMES)
def library(request, monkeypatch):
    path = Path(cpu_library.__file__).with_name(f"_{request.param}.so")
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    loaded = cpu_library.CpuKernels(path)
    monkeypatch.setitem(kernels._loaded, "cpu", (loaded, request.param))
    return loaded


class Net(nn.Module):
    """A residual join, a concatenation that two norms read, depthwise convolutions, several activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(c) for c in (20, 20, 28, 28, 28)])
        self.same = nn.Conv2d(20, 20, 1)
        self.grow = nn.Conv2d(20, 8, 3, padding=1)
        self.more = nn.Conv2d(28, 28, 1)
        self.depthwise = nn.Conv2d(28, 28, 5, padding=2, groups=28)
        self.joined = nn.Conv2d(28, 28, 3, stride=2, padding=1, groups=28)
        self.head = nn.Conv2d(28, 2, 1)

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        x = F.relu(self.norms[1](self.same(x)) + x)
        x = torch.cat([x, self.grow(x)], 1)
        a, b = F.leaky_relu(self.norms[2](x)), F.gelu(self.norms[3](x))
        return self.head(self.joined(F.silu(self.norms[4](self.depthwise(self.more(a) + b)))))


def step(model, x):
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("allow_lossy", [False, True])
def test_a_step(library, memory_format, dtype, allow_lossy, monkeypatch):
    torch.manual_seed(0)
    plain = Net().to(dtype, memory_format=memory_format)
    optimized = normpass.optimize(copy.deepcopy(plain), allow_lossy=allow_lossy)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(6, 3, 17, 13, dtype=dtype).contiguous(memory_format=memory_format)
    used = []
    norm_act = library.norm_act
    monkeypatch.setattr(library, "norm_act", lambda *args: used.append(1) or norm_act(*args))
    found, expected = step(optimized, x), step(exact, x.double())
    assert used
    for a, b in zip(found, expected, strict=True):
        if b.is_floating_point():
            assert (a - b).abs().max() <= TOLERANCES[dtype] * max(float(b.abs().max()), 1e-2)
