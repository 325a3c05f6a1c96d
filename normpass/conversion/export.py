"""model in eval mode ⇒ exported program with its norms folded ⇒ ONNX

    torch.export → fold_batch_norms → torch.export → torch.onnx

`torch.export` runs an optimized model's plain layers (`normpass.runtime.functional`), so that its graph has ATen's
operators alone, whatever was rewritten.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normpass.conversion.fold import Folded, fold_batch_norms
from normpass.errors import InvalidInputError, InvalidModelError
from normpass.extras import needed

BATCH = "batch"
"""What the first dimension of inputs and outputs is called where it is dynamic."""
LOWEST_OPSET = 13
_LARGEST = 2**31 - 2**24  # a protocol buffer has at most 2 GiB


@dataclass(frozen=True)
class Exported:
    """A model's forward in eval mode as ATen operators with its weights."""

    program: torch.export.ExportedProgram
    folded: Folded


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """The size of the first dimension that the tensors have in common.

        Raises:
            InvalidInputError: they have none.
        """
        sizes = {t.shape[0] for t in self.tensors if t.dim()}
        if len(sizes) != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in self.tensors)
            raise InvalidInputError(
                f"the inputs, of shapes {shapes or 'none'}, have no batch size in common: leave the batch fixed"
            )
        return sizes.pop()

    def random(self, batch: int | None, seed: int) -> Arguments:
        """Arguments like these with standard normal values (other dtypes keep theirs) and another batch size."""
        generator = torch.Generator().manual_seed(seed)
        drawn = pytree.tree_map(lambda leaf: _redrawn(leaf, batch, generator), (self.args, self.kwargs))
        return Arguments(*drawn)


def _redrawn(leaf: Any, batch: int | None, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if batch is not None and leaf.dim():
        leaf = leaf[torch.arange(batch, device=leaf.device) % leaf.shape[0]]
    if not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)


def export_folded(model: nn.Module, arguments: Arguments, dynamic_batch: bool) -> Exported:
    """Export `model`, which is in eval mode, for these arguments, and fold its norms.

    Raises:
        InvalidModelError: torch.export cannot express its forward.
        InvalidInputError: not with a dynamic batch.
    """
    if dynamic_batch:  # sizes of 1 would be taken for constants
        arguments = arguments.random(max(arguments.batch, 2), seed=0)
    with quiet(), torch.no_grad():
        program = _exported(model, arguments, dynamic_batch)
        graph_module: Any = program.module()
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module" and node.target == "_guards_fn":
                graph_module.graph.erase_node(node)
        folded = fold_batch_norms(graph_module)
        return Exported(_exported(graph_module, arguments, dynamic_batch), folded)


def _exported(model: nn.Module, arguments: Arguments, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = _dynamic_shapes(model, arguments) if dynamic_batch else None
    try:
        return torch.export.export(model, arguments.args, arguments.kwargs, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        if not dynamic_batch:
            raise _cannot(model, error) from error
        raise InvalidInputError(
            f"{type(model).__name__} cannot be exported with a dynamic batch ({_first_line(error)}): "
            "convert it for the one batch size"
        ) from error
    except Exception as error:  # whatever the model's own code raises while it is traced
        raise _cannot(model, error) from error


def _dynamic_shapes(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """By parameter of forward, as torch.export wants it: `*args` is a tuple, `**kwargs` a dict."""
    dimension = torch.export.Dim(BATCH)

    def dynamic(leaf: Any) -> Any:
        return {0: dimension} if isinstance(leaf, Tensor) and leaf.dim() else None

    bound = inspect.signature(model.forward).bind(*arguments.args, **arguments.kwargs)
    shapes: dict[str, Any] = pytree.tree_map(dynamic, dict(bound.arguments))
    return shapes


def _cannot(model: nn.Module, error: Exception) -> InvalidModelError:
    return InvalidModelError(
        f"torch.export cannot express the forward of this {type(model).__name__} "
        f"({type(error).__name__}: {_first_line(error)}): take what depends on values out of it, or convert a part"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def to_onnx(exported: Exported, opset: int | None, dynamic_batch: bool) -> Any:
    """The program as an `onnx.ModelProto` of standard operators.

    Args:
        opset: of the operators; None for torch's default.

    Raises:
        InvalidInputError: an opset that is unknown or in which the graph cannot be expressed; over 2 GiB.
        InvalidModelError: an operator that has no ONNX counterpart.
        NotAvailableError: onnx or onnxscript are not installed.
    """
    newest = needed("onnx").defs.onnx_opset_version()
    needed("onnxscript")
    if opset is not None and not LOWEST_OPSET <= opset <= newest:
        raise InvalidInputError(f"opset {opset} is not one that can be written: choose from {LOWEST_OPSET} to {newest}")
    _check_size(exported.program)
    inputs = exported.program.example_inputs
    shapes: Any = None
    if dynamic_batch:
        shapes = pytree.tree_map(lambda t: {0: BATCH} if isinstance(t, Tensor) and t.dim() else None, inputs)
        shapes = shapes[1] or shapes[0]
    try:
        with quiet():
            program = torch.onnx.export(
                exported.program, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        raise InvalidModelError(
            f"torch.onnx cannot translate this model ({innermost(error)}): use other operators, or convert to .pt2"
        ) from error
    assert program is not None
    proto = program.model_proto
    _check_operators(proto, opset)
    return proto


def _check_size(program: torch.export.ExportedProgram) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > _LARGEST:
        raise InvalidInputError(
            f"the weights take {size / 2**30:.1f} GiB and an ONNX file has at most 2: convert to .pt2"
        )


def _check_operators(proto: Any, opset: int | None) -> None:
    strange = operators_beyond_onnx(proto)
    if strange:
        raise InvalidModelError(
            f"the graph has operators that are not standard ONNX: {', '.join(strange)}; use other layers there"
        )
    written = opset_of(proto)
    if opset is not None and written != opset:
        raise InvalidInputError(f"this model cannot be written in opset {opset}: use --opset {written} or newer")


def operators_beyond_onnx(proto: Any) -> list[str]:
    """The operators that are not of the standard, with their domain."""
    return sorted({f"{n.domain}::{n.op_type}" for n in nodes_of(proto.graph) if n.domain not in ("", "ai.onnx")})


def opset_of(proto: Any) -> int:
    """The version of the standard operators that a model uses."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of an `onnx.GraphProto`, those of the branches and loops in it too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def innermost(error: BaseException) -> str:
    """The first line of the error that started it: the exporter's own ends with a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings, log and prints: what went wrong is looked at afterwards."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
