"""`convert`: a trained model as a file that needs neither normpass nor, for ONNX, torch.

model ──eval──► torch.export ──fold──► exported program ──► .onnx or .pt2 ──verify──► the file under its name

Nothing stands under the file's name unless what is in it was run and agrees with the model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normpass.api import check_example_inputs, restore
from normpass.conversion.agreement import Agreement, OnnxRuntime, check_onnx, compare, run_torch
from normpass.conversion.export import Arguments, export_folded, nodes_of, opset_of, quiet, to_onnx
from normpass.copies.trial import call_arguments
from normpass.copies.untouched import untouched
from normpass.errors import ConversionError, InvalidInputError, InvalidModelError
from normpass.extras import needed
from normpass.files import appearing, path_of
from normpass.nn.norm import BatchNormLike
from normpass.nn.plain import as_plain_norms
from normpass.optimized import is_optimized, state_of

FORMATS = (".onnx", ".pt2", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it compares with the model."""

    out: str
    agreement: Agreement | None
    """None for weights alone, which are compared bit for bit"""
    folded: int = 0
    """norms that went into a convolution"""
    left: dict[str, str] = field(default_factory=dict)
    """the norms that stay, and why"""
    operators: dict[str, int] = field(default_factory=dict)
    opset: int | None = None
    dynamic_batch: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"wrote {self.out}" + (f" (opset {self.opset})" if self.opset else "")]
        if self.agreement is None:
            return f"{lines[0]}: the weights, bit for bit"
        lines.append(f"{self.folded} norms folded, {len(self.left)} left")
        lines += [f"  {name}: {why}" for name, why in self.left.items()]
        lines.append(f"largest error {self.agreement}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    out: str | Path,
    example_inputs: Tensor | tuple | dict | None = None,
    *,
    opset: int | None = None,
    dynamic_batch: bool = False,
) -> Conversion:
    """Write `model`, in eval mode and with its norms folded into the convolutions, to the file `out`.

    The file is verified before it gets its name: run on random inputs against the model itself, at the batch size
    of `example_inputs` and, with `dynamic_batch`, at another. The model is left as it is.

    Args:
        model: plain or optimized (also one whose function was changed: what is written is the changed function).
        out: `.onnx` (standard operators only), `.pt2` (of torch.export) or `.safetensors` (the state_dict alone).
        example_inputs: a tensor, tuple or dict of arguments that give the shapes; not needed for `.safetensors`.
        opset: of the ONNX operators; None for torch's default.
        dynamic_batch: the first dimension of every input may have any size.

    Returns:
        What was folded and how far the outputs lie apart.

    Raises:
        InvalidInputError: files, shapes or an opset that do not fit.
        InvalidModelError: the model cannot be exported.
        NotAvailableError: a package is missing (`pip install "normpass[convert]"`).
        ConversionError: what was converted differs from the model; nothing is written.
    """
    out = path_of(out, "out")
    model = _checked(model, out, opset)
    with appearing(out) as file, untouched(model):
        writers: dict[str, Callable[..., Conversion]] = {".onnx": _write_onnx, ".pt2": _write_pt2}
        write = writers.get(out.suffix, _write_weights)
        return write(model.eval(), file, out, _arguments(model, out, example_inputs), opset, dynamic_batch)


def _checked(model: Any, out: Path, opset: int | None) -> nn.Module:
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"`model` must be a torch.nn.Module, it is a {type(model).__name__}")
    if out.suffix not in FORMATS:
        raise InvalidInputError(f"`{out}`: the suffix says what to write: {', '.join(FORMATS)}")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise InvalidInputError(f"`opset` must be a whole number, it is {opset!r}")
    if opset is not None and out.suffix != ".onnx":
        raise InvalidInputError(f"`{out}` has no opset: leave it out, or write .onnx")
    return model


def _arguments(model: nn.Module, out: Path, example_inputs: Any) -> Arguments:
    if out.suffix == ".safetensors":
        return Arguments((), {})
    if example_inputs is None:
        raise InvalidInputError(
            f"`{out}` needs the inputs' shapes: give `example_inputs` (--input on the command line)"
        )
    check_example_inputs(model, example_inputs)
    return Arguments(*call_arguments(example_inputs))


def trial_calls(arguments: Arguments, dynamic_batch: bool) -> list[tuple[int | None, Arguments]]:
    """Two calls with random inputs: at two batch sizes where the batch is dynamic, else twice as given."""
    if not dynamic_batch:
        sizes = {t.shape[0] for t in arguments.tensors if t.dim()}
        size = sizes.pop() if len(sizes) == 1 else None
        return [(size, arguments.random(None, seed)) for seed in (1, 2)]
    size = arguments.batch
    return [(size, arguments.random(size, 1)), (size + 2, arguments.random(size + 2, 2))]


def _as_layers(model: nn.Module) -> nn.Module:
    """With layers of torch for the Kalman norms and for the switchable ones that have chosen, which fold.

    What is changed in captured graphs alone is changed where forward calls it.
    """
    changes: tuple[Any, ...] = ()
    if is_optimized(model):
        changes, model = state_of(model).request.changes, restore(model, keep_changes=True)
    if any(isinstance(m, BatchNormLike) for m in model.modules()):
        model = as_plain_norms(model)
    for change in changes:
        if change.applies_to_graph and change.changes_eval:
            _run_under(change.calls, model)
    return model.eval()


def _run_under(calls: Callable[[], AbstractContextManager], model: nn.Module) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args: Any, **kwargs: Any) -> Any:
        with calls():
            return forward(*args, **kwargs)

    model.forward = changed  # type: ignore[method-assign]


def _write_onnx(
    model: nn.Module, file: Path, out: Path, arguments: Arguments, opset: int | None, dynamic_batch: bool
) -> Conversion:
    exported = export_folded(_as_layers(model), arguments, dynamic_batch)
    proto = to_onnx(exported, opset, dynamic_batch)
    check_onnx(proto)
    runtime = OnnxRuntime(proto)
    agreement = compare(run_torch(model), runtime, trial_calls(arguments, dynamic_batch), runtime.name)
    file.write_bytes(proto.SerializeToString())
    return Conversion(
        str(out),
        agreement,
        len(exported.folded.folded),
        exported.folded.left,
        dict(Counter(node.op_type for node in nodes_of(proto.graph))),
        opset_of(proto),
        dynamic_batch,
        versions_of("torch", "onnx", "onnxscript", "onnxruntime"),
    )


def _write_pt2(
    model: nn.Module, file: Path, out: Path, arguments: Arguments, opset: None, dynamic_batch: bool
) -> Conversion:
    exported = export_folded(_as_layers(model), arguments, dynamic_batch)
    with quiet():
        torch.export.save(exported.program, file)
        loaded = torch.export.load(file).module()
    agreement = compare(run_torch(model), run_torch(loaded), trial_calls(arguments, dynamic_batch), "torch")
    functions = (n.target for n in exported.program.graph.nodes if n.op == "call_function")
    return Conversion(
        str(out),
        agreement,
        len(exported.folded.folded),
        exported.folded.left,
        dict(Counter(str(getattr(function, "__name__", function)) for function in functions)),
        dynamic_batch=dynamic_batch,
        versions=versions_of("torch"),
    )


def _write_weights(model: nn.Module, file: Path, out: Path, *_: object) -> Conversion:
    safetensors = needed("safetensors.torch")
    # A copy each: the format has no shared storage, and every name is wanted.
    state = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in _state(model).items()}
    safetensors.save_file(state, file, metadata={"format": "pt"})
    loaded = safetensors.load_file(file)
    if loaded.keys() != state.keys() or any(not torch.equal(loaded[n], t) for n, t in state.items() if not _nan(t)):
        raise ConversionError(f"the weights in `{out}` are not the model's; nothing was written")
    return Conversion(str(out), None, versions=versions_of("torch", "safetensors"))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of torch and of these packages."""
    return {name: str(needed(name).__version__) if name != "torch" else torch.__version__ for name in packages}
