"""The same by torch.compile: one argument instead of one line. Nothing has to be imported."""

import torch
from torch.nn import functional as F
from torchvision.models import resnet18


def main(steps: int = 5, batch_size: int = 8, size: int = 96, inner: str = "inductor") -> list[float]:
    """Train for `steps` random batches, compiled by `inner` ("inductor", "aot_eager", "eager"); the losses."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="normpass", options={"inner": inner}, fullgraph=True)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 10
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
