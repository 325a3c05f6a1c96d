"""Whether a converted model computes what the model does: on random inputs, at two batch sizes.

The largest error is the largest difference over the largest magnitude of the output it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normpass.conversion.export import Arguments, operators_beyond_onnx, opset_of
from normpass.errors import ConversionError, InvalidInputError
from normpass.extras import needed

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest error that is rounding, by the narrowest floating dtype of the outputs."""


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of two forms of one model lie apart."""

    runner: str
    """what ran the converted model: `onnxruntime CPUExecutionProvider`, `torch`"""
    batch_sizes: tuple[int | None, ...]
    """None where the inputs have no batch size in common"""
    largest_error: float
    tolerance: float

    def __str__(self) -> str:
        sizes = " and ".join(map(str, dict.fromkeys(self.batch_sizes)))
        calls = f"{len(self.batch_sizes)} random inputs, batch size {sizes}"
        return f"{self.largest_error:.1e} (tolerance {self.tolerance:.0e}): {self.runner}, {calls}"


Run = Callable[[Arguments], Sequence[Tensor]]


def compare(expected: Run, found: Run, calls: Iterable[tuple[int | None, Arguments]], runner: str) -> Agreement:
    """Run both for every (batch size, arguments).

    Raises:
        ConversionError: other outputs, or an error beyond the tolerance.
    """
    worst, tolerance, sizes = 0.0, min(TOLERANCES.values()), []
    for size, arguments in calls:
        before, after = expected(arguments), found(arguments)
        if [t.shape for t in before] != [t.shape for t in after]:
            raise ConversionError(
                f"at batch size {size} the model returns shapes {[tuple(t.shape) for t in before]} and the converted "
                f"one {[tuple(t.shape) for t in after]}; nothing was written"
            )
        worst = max([worst, *map(largest_error, before, after)])
        tolerance = max([tolerance, *(TOLERANCES.get(t.dtype, 0.0) for t in before)])
        sizes.append(size)
    if not worst <= tolerance:
        raise ConversionError(
            f"the converted model differs by {worst:.1e} of the largest output ({runner}), above the tolerance of "
            f"{tolerance:.0e}; nothing was written"
        )
    return Agreement(runner, tuple(sizes), worst, tolerance)


def largest_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference, as a fraction of the largest magnitude expected; infinite where NaNs differ."""
    if expected.numel() == 0:
        return 0.0
    a, b = expected.detach().double(), found.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = a.isfinite()
    difference = (a - b)[finite].abs().max() if bool(finite.any()) else a.new_zeros(())
    scale = a[finite].abs().max() if bool(finite.any()) else a.new_zeros(())
    return float(difference / scale) if float(scale) > 0 else float(difference)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors in a model's outputs, in their order, on the CPU."""
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def run_torch(model: Callable) -> Run:
    """A module or exported program as what `compare` runs, without gradients."""

    def run(arguments: Arguments) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(model(*arguments.args, **arguments.kwargs))

    return run


class OnnxRuntime:
    """A session of onnxruntime, on the GPU where there is one.

    Raises:
        InvalidInputError: onnxruntime cannot load the model.
        NotAvailableError: it is not installed.
    """

    def __init__(self, proto: Any):
        runtime = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what matters is raised
        try:
            self.session = runtime.InferenceSession(proto.SerializeToString(), options, providers=_providers(runtime))
        except Exception as error:
            strange = operators_beyond_onnx(proto)
            advice = f"replace {', '.join(strange)} by standard operators" if strange else "use another opset"
            raise InvalidInputError(
                f"onnxruntime {runtime.__version__} cannot load the graph, of opset {opset_of(proto)} "
                f"({' '.join(str(error).split())[:200]}): {advice}"
            ) from error
        self.inputs = self.session.get_inputs()

    @property
    def name(self) -> str:
        return f"onnxruntime {self.session.get_providers()[0]}"

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        named = dict(zip((i.name for i in self.inputs), (t.cpu().numpy() for t in arguments.tensors), strict=True))
        try:
            return [torch.from_numpy(array) for array in self.session.run(None, named)]
        except Exception as error:
            shapes = [tuple(t.shape) for t in arguments.tensors]
            raise ConversionError(
                f"onnxruntime does not run the graph on inputs of shape {shapes} "
                f"({' '.join(str(error).split())[:200]}); nothing was written"
            ) from error


def _providers(runtime: Any) -> list[Any]:
    if torch.cuda.is_available() and "CUDAExecutionProvider" in runtime.get_available_providers():
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def check_onnx(proto: Any) -> None:
    """Run `onnx.checker` with shape inference.

    Raises:
        ConversionError: it finds something.
    """
    onnx = needed("onnx")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ConversionError(f"onnx.checker: {' '.join(str(error).split())[:300]}; nothing was written") from error
