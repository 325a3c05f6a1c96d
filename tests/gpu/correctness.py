"""Whether optimized networks train as plain ones do on this GPU: numbers first, then streams, graphs and threads.

    python correctness.py resnet18:float32 mobilenet_v2:bfloat16 "side stream" …

Plain is run in float64 too: what is compared is the distance from that, ours against plain's own. In float32 that is
large (networks that are not trained flip ReLUs at every rounding); what float64 shows is exact.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import rows
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normpass
from normpass import kernels, models

DEVICE = "cuda"
SHAPE = (16, 3, 96, 96)
STEPS = 3
LEARNING_RATE = 1e-4
SLACK = 4.0
"""How many times as far from float64 as plain ours may be; and plain's distance counts as at least `FLOOR`."""
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-3}

Trained = dict[str, Tensor]


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = models.load(f"torchvision:{name}").to(DEVICE).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(SHAPE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return model, x


def one_step(model: nn.Module, x: Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    with torch.autocast(DEVICE, dtype, enabled=dtype.itemsize == 2):
        y = model(x)
    target = torch.arange(len(y), device=y.device)
    loss = F.cross_entropy(y.float() if y.dtype.itemsize == 2 else y, target)
    loss.backward()
    optimizer.step()
    return y.detach()


def trained(model: nn.Module, x: Tensor, dtype: torch.dtype, steps: int = STEPS) -> Trained:
    """What some steps leave: output and gradients of the first and the last, parameters, running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    found: Trained = {}
    for step in range(steps):
        y = one_step(model, x * (1 + 0.1 * step), dtype, optimizer)
        found |= left("first" if step == 0 else "last", model, y) if step in (0, steps - 1) else {}
    return found


def left(when: str, model: nn.Module, y: Tensor) -> Trained:
    """What a step leaves, in float64."""
    found = {f"{when} output": y, **{f"{when} grad {n}": p.grad for n, p in model.named_parameters()}}
    found |= {f"{when} state {n}": t for n, t in model.state_dict().items() if t.is_floating_point()}
    return {n: t.detach().double().clone() for n, t in found.items() if t is not None}


def kind_of(name: str) -> str:
    when, kind, *_ = name.split(" ")
    return f"{when} {'statistics' if 'running' in name else kind}"


def distances(found: Trained, truth: Trained) -> dict[str, float]:
    """By kind: the norm of the difference over the norm of all tensors of the kind."""
    squares: dict[str, list[float]] = {}
    for name, want in truth.items():
        of_kind = squares.setdefault(kind_of(name), [0.0, 0.0])
        of_kind[0] += float((found[name] - want).square().sum())
        of_kind[1] += float(want.square().sum())
    return {kind: (off / max(size, 1e-300)) ** 0.5 for kind, (off, size) in squares.items()}


def compared(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps of plain, ours and float64."""
    model, x = network(name)
    if dtype == torch.float64:
        model, x = model.double(), x.double()
    ours = normpass.optimize(copy.deepcopy(model))
    truth = trained(copy.deepcopy(model).double(), x.double(), torch.float64)
    of_plain, of_ours = distances(trained(model, x, dtype), truth), distances(trained(ours, x, dtype), truth)
    found: dict[str, Any] = {"plain": rounded(of_plain), "ours": rounded(of_ours)}
    worse = [k for k in of_ours if not of_ours[k] <= SLACK * max(of_plain[k], FLOOR[dtype])]
    return {**found, "error": f"ours is farther from float64 in {', '.join(worse)}"} if worse else found


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.2g}") for name, value in values.items()}


def same_as_usual(run: Callable[[nn.Module, Tensor], Trained]) -> dict[str, Any]:
    """`run` of an optimized ResNet-18 against its usual steps."""
    model, x = network("resnet18")
    usual = trained(normpass.optimize(copy.deepcopy(model)), x, torch.float32)
    found = rounded(distances(run(normpass.optimize(model), x), usual))
    worse = [k for k, value in found.items() if not value <= (1e-4 if k.startswith("first") else 1e-2)]
    return {"ours": found, **({"error": f"differs in {', '.join(worse)}"} if worse else {})}


def on_a_side_stream(model: nn.Module, x: Tensor) -> Trained:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = trained(model, x, torch.float32)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return found


def in_a_thread(model: nn.Module, x: Tensor) -> Trained:
    """Forward in a thread that has called no CUDA before; backward runs in autograd's own."""
    found: list[Trained] = []
    thread = threading.Thread(target=lambda: found.append(trained(model, x, torch.float32)))
    thread.start()
    thread.join()
    return found[0]


def in_a_graph(model: nn.Module, x: Tensor) -> Trained:
    """Every step a replay of one captured step. What warming up has changed is put back."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer, given = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one_step(model, given, torch.float32, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = one_step(model, given, torch.float32, optimizer)
    model.load_state_dict(before)
    found: Trained = {}
    for step in range(STEPS):
        given.copy_(x * (1 + 0.1 * step))
        graph.replay()
        found |= left("first" if step == 0 else "last", model, y) if step in (0, STEPS - 1) else {}
    return found


WAYS = {"side stream": on_a_side_stream, "threads": in_a_thread, "CUDA graph": in_a_graph}


def measured(item: str) -> dict[str, Any]:
    if item in WAYS:
        found = same_as_usual(WAYS[item])
    else:
        name, _, dtype = item.partition(":")
        found = compared(name, getattr(torch, dtype))
    device = kernels.kernels_for(DEVICE)
    failures = ["no kernels"] if device is None else list(device.failures)
    return {**found, **({"error": "; ".join(failures)} if failures else {})}


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    sys.exit(rows.run_items("correctness", sys.argv[1:], measured))
