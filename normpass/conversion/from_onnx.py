"""`convert_onnx`: conv → BatchNormalization → activation in an ONNX graph, folded and fused.

onnxscript's rewriter does the rewriting: BatchNormalization into Conv, ConvTranspose and Gemm, Pad into Conv, chains
of Relu and Clip into one, Clip-and-Div spellings into HardSigmoid and HardSwish. A norm in training mode stays (its
statistics are the batch's). The result has standard operators alone, and is compared with the graph it came from by
running both.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from normpass.conversion.agreement import OnnxRuntime, check_onnx, compare
from normpass.conversion.convert import Conversion, versions_of
from normpass.conversion.export import Arguments, innermost, nodes_of, opset_of, quiet
from normpass.environment import memory_bytes
from normpass.errors import ConversionError, InvalidInputError
from normpass.extras import needed
from normpass.files import appearing, path_of

LOWEST_OPSET = 13
_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 6: torch.int32, 7: torch.int64, 9: torch.bool}
"""By the number of the element type in ONNX."""
_FREE = 4
"""The size given to a dimension that may have any, other than the batch."""
_RULES = "onnxscript.rewriter.rules.common"
_HARD_SWISH = 14
"""The first opset that has the operator."""
_PRODUCERS = ("Conv", "ConvTranspose", "Gemm")


def convert_onnx(source: str | Path, out: str | Path) -> Conversion:
    """Write the ONNX graph in `source`, with its norms folded, to `out`.

    Args:
        source: an ONNX file of opset 13 or newer.
        out: another file, or the same, which is then replaced.

    Raises:
        InvalidInputError: `source` is no such file, or `out` cannot be written.
        ConversionError: the result differs from the source; nothing is written.
        NotAvailableError: onnx, onnxscript or onnxruntime is not installed.
    """
    source, out = path_of(source, "source"), path_of(out, "out")
    if out.suffix != ".onnx":
        raise InvalidInputError(f"`{out}`: from ONNX only ONNX can be written; name a file that ends in .onnx")
    before = read_onnx(source)
    with appearing(out) as file:
        after = rewritten(before)
        check_onnx(after)
        plain, folded, calls = OnnxRuntime(before), OnnxRuntime(after), _calls(before)
        _check_runs(source, plain, calls[0][1])
        agreement = compare(plain, folded, calls, folded.name)
        file.write_bytes(after.SerializeToString())
    left = {norm.name or norm.output[0]: why for norm, why in norms_left(after)}
    return Conversion(
        str(out),
        agreement,
        _count(before, "BatchNormalization") - _count(after, "BatchNormalization"),
        left,
        dict(Counter(node.op_type for node in nodes_of(after.graph))),
        opset_of(after),
        any(size is None for shape, _ in _inputs(before) for size in shape[:1]),
        versions_of("onnx", "onnxscript", "onnxruntime"),
    )


def read_onnx(path: Path) -> Any:
    """The `onnx.ModelProto` in a file, checked.

    Raises:
        InvalidInputError: no such file, no ONNX in it, or an opset below 13.
    """
    onnx = needed("onnx")
    if not path.is_file():
        raise InvalidInputError(f"no file `{path}`: name an ONNX file")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # of protobuf, of the checker, of the file
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(f"`{path}` is no valid ONNX file ({reason}): export it again") from error
    if opset_of(proto) < LOWEST_OPSET:
        raise InvalidInputError(
            f"`{path}` has opset {opset_of(proto)}, below {LOWEST_OPSET}: "
            "convert it with onnx.version_converter.convert_version, or export it anew"
        )
    return proto


def rewritten(proto: Any) -> Any:
    """The graph with its norms folded and its activations fused, as another `onnx.ModelProto`.

    Raises:
        ConversionError: the rewriter fails.
    """
    onnx, ir, rewriter = needed("onnx"), needed("onnx_ir"), needed("onnxscript.rewriter")
    passes = needed("onnx_ir.passes.common")
    try:
        with quiet():
            typed = onnx.shape_inference.infer_shapes(proto)
            model = ir.serde.deserialize_model(typed)
            needed("onnxscript.optimizer").fold_constants(model)
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            for rules in (_norm_rules(), _other_rules(opset_of(proto), _has_types(typed))):
                model = rewriter.rewrite(model, pattern_rewrite_rules=rules)
            return ir.serde.serialize_model(model)
    except Exception as error:
        raise ConversionError(f"onnxscript's rewriter failed ({innermost(error)}); nothing was written") from error


def _has_types(proto: Any) -> bool:
    """Whether the type of everything that a Relu or Clip reads is known, as the rules for these need."""
    graph = proto.graph
    known = {value.name for value in (*graph.input, *graph.value_info, *graph.output, *graph.initializer)}
    return all(node.input[0] in known for node in nodes_of(graph) if node.op_type in ("Relu", "Clip"))


def _norm_rules() -> list[Any]:
    rules = needed(f"{_RULES}._fuse_batchnorm")
    kinds = rules.FuseBatchNormIntoConv, rules.FuseBatchNormIntoConvTranspose, rules.FuseBatchNormIntoGemm
    return [_inference_only(kind) for kind in kinds]


def _other_rules(opset: int, has_types: bool) -> list[Any]:
    sets = [needed(f"{_RULES}._fuse_pad_into_conv").rules]
    if has_types:
        sets.append(needed(f"{_RULES}._fuse_relus_clips").rules)
    if opset >= _HARD_SWISH:
        sets.append(needed(f"{_RULES}._fuse_hardswish").fuse_hardswish_rules())
    return [rule for rules in sets for rule in rules]


def _inference_only(kind: Any) -> Any:
    """The rule, refusing norms that are in training mode."""

    class InferenceOnly(kind):
        def check(self, context: Any, x: Any, inbound_out: Any, batchnorm_out: Any) -> Any:
            result = super().check(context, x, inbound_out, batchnorm_out)
            mode = batchnorm_out.producer().attributes.get("training_mode")
            return result.fail("it is in training mode") if mode is not None and mode.as_int() else result

    InferenceOnly.__name__ = kind.__name__
    return InferenceOnly().rule()


def norms_left(proto: Any) -> list[tuple[Any, str]]:
    """The BatchNormalization nodes of a graph, each with the reason why it is not folded."""
    makers = {name: node for node in nodes_of(proto.graph) for name in node.output}
    readers = Counter(name for node in nodes_of(proto.graph) for name in node.input)
    readers.update(output.name for output in proto.graph.output)
    return [
        (node, _why_left(node, makers.get(node.input[0]), readers))
        for node in nodes_of(proto.graph)
        if node.op_type == "BatchNormalization"
    ]


def _why_left(norm: Any, producer: Any, readers: Counter) -> str:
    if any(a.name == "training_mode" and a.i for a in norm.attribute):
        return "it is in training mode: export the model in eval mode"
    if producer is None or producer.op_type not in _PRODUCERS:
        return f"it follows {'an input' if producer is None else producer.op_type}, which has no weight to fold into"
    if readers[norm.input[0]] > 1:
        return f"the result of that {producer.op_type} is read by others too"
    return f"the weights of that {producer.op_type} are shared or computed"


def _count(proto: Any, kind: str) -> int:
    return sum(node.op_type == kind for node in nodes_of(proto.graph))


def _inputs(proto: Any) -> list[tuple[list[int | None], torch.dtype]]:
    """Shape (None for what may have any size) and dtype of every input that is no initializer."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    found = []
    for value in proto.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        if kind.elem_type not in _DTYPES:
            raise InvalidInputError(f"input `{value.name}` has element type {kind.elem_type}, which cannot be drawn")
        shape = [d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim]
        _check_shape(value.name, shape)
        found.append((shape, _DTYPES[kind.elem_type]))
    return found


def _check_shape(name: str, shape: list[int | None]) -> None:
    """InvalidInputError for an input that holds nothing, or more than the machine does."""
    shown = "×".join("?" if size is None else str(size) for size in shape)
    if 0 in shape:
        raise InvalidInputError(
            f"input `{name}` is {shown} and holds no values to compare: export it with another size"
        )
    needed_bytes, there = 8 * math.prod(size or _FREE for size in shape), memory_bytes()
    if needed_bytes > there:
        raise InvalidInputError(
            f"input `{name}` is {shown} and takes {needed_bytes / 2**30:.3g} GiB to be drawn, and this machine has "
            f"{there / 2**30:.3g}: export it with smaller sizes"
        )


def _check_runs(source: Path, plain: OnnxRuntime, arguments: Arguments) -> None:
    try:
        plain(arguments)
    except ConversionError as error:
        raise InvalidInputError(
            f"`{source}` itself does not run, and cannot be verified: {error}; a size that it leaves open is taken to "
            f"be {_FREE}, that of the batch 2: write fixed ones into the file (onnx.tools.update_model_dims)"
        ) from error


def _calls(proto: Any) -> list[tuple[int | None, Arguments]]:
    """Two calls with random inputs: of batch sizes 2 and 5 where the graph's batch may have any size."""
    inputs = _inputs(proto)
    fixed = next((shape[0] for shape, _ in inputs if shape and shape[0] is not None), None)
    return [(fixed or size, _drawn(inputs, fixed or size)) for size in (2, 5)]


def _drawn(inputs: list[tuple[list[int | None], torch.dtype]], batch: int) -> Arguments:
    def sizes(shape: list[int | None]) -> list[int]:
        return [(_FREE if axis else batch) if size is None else size for axis, size in enumerate(shape)]

    like = tuple(torch.zeros(sizes(shape), dtype=dtype) for shape, dtype in inputs)
    return Arguments(like, {}).random(None, seed=batch)
