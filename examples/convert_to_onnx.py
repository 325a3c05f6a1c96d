"""Train, convert, and run the file in onnxruntime: no torch and no BatchNorm left in it."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.nn import functional as F
from torchvision.models import resnet18

import normpass
from normpass.demo import digits


def main(steps: int = 20, batch_size: int = 16, size: int = 64) -> dict[str, float]:
    """Train for `steps` batches and convert: error of the file's outputs, and the share of equal predictions."""
    torch.manual_seed(0)
    model = normpass.optimize(resnet18(num_classes=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _, (images, labels) in zip(range(steps), digits.batches(batch_size, size), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        conversion = normpass.convert(model, path, images[:1], dynamic_batch=True)
        print(conversion)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]

    with torch.no_grad():
        expected = model.eval()(images).argmax(1)
    same = float((torch.from_numpy(outputs).argmax(1) == expected).float().mean())
    print(f"the same digit for {same:.0%} of {len(images)} images")
    return {"error": conversion.agreement.largest_error, "same": same}


if __name__ == "__main__":
    main()
