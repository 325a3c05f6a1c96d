"""A whole training step as one CUDA graph: forward, backward and the optimizer are replayed without Python.

At small batches a GPU waits for the calls that launch its kernels; a graph has them launched together. What it replays
is fixed: the shapes, and the memory of inputs, parameters, gradients and the optimizer's state.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import normpass


def main(steps: int = 20, batch_size: int = 32, size: int = 224) -> list[float]:
    """Train for `steps` random batches; the losses. Without a GPU it says so and exits."""
    if not torch.cuda.is_available():
        raise SystemExit("examples/cuda_graph.py needs a GPU: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    model = resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    model = normpass.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)  # it counts its steps on the GPU
    images = torch.randn(batch_size, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device="cuda") % 10
    replay, loss = captured(model, optimizer, images, labels)
    losses = []
    for step in range(steps):
        images.normal_()  # the next batch, written where the graph reads it
        replay()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


def captured(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[Callable[[], None], Tensor]:
    """What replays one step on whatever `images` and `labels` hold by then, and the loss that it writes."""
    graph, beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # the model is captured by Dynamo, kernels are compiled, state is allocated
        for _ in range(3):
            train(model, optimizer, images, labels)
    torch.cuda.current_stream().wait_stream(beside)
    optimizer.zero_grad(set_to_none=True)  # gradients are to lie in the graph's memory
    with torch.cuda.graph(graph):
        loss = train(model, optimizer, images, labels)
    return graph.replay, loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One step; the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


if __name__ == "__main__":
    main()
