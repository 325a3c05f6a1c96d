"""`nn.SyncBatchNorm` in training as one node of a captured graph, on every device.

    nn.SyncBatchNorm.forward  ──Dynamo breaks its graph, or raises on a CPU──►  sync_batch_norm(x, …, group)

Once the graph is ours the node becomes the statistics of all processes, and a norm with fixed statistics that every
rewrite knows (`passes.normal_form`); for whoever else compiles an optimized model it is what it calls.

In eval mode, without a process group and in a group of one process it is `F.batch_norm`, as in torch.

Dynamo's method is replaced for good, since nobody asks us before `torch.compile(backend="normpass")` captures. It does
what it always does unless the graph is for this library, or the layer is inside an optimized model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.copies.alone import SyncBatchNormAlone
from normpass.ops.sync_statistics import ALONE, size_of, synced_statistics

_FORWARDS = (nn.SyncBatchNorm.forward, SyncBatchNormAlone.forward)
_MODELS = "normpass.optimized"


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    group: str,
) -> Tensor:
    """Batch norm of what all processes of `group` have. The arguments are those of `synced_statistics`."""
    same, mean, var, weight, bias = synced_statistics(
        x, running_mean, running_var, weight, bias, counter, momentum, eps, group
    )
    return F.batch_norm(same, mean, var, weight, bias, False, 0.0, eps)


def forward(self: nn.SyncBatchNorm, input: Tensor, group: str | None) -> Tensor:
    """What `nn.SyncBatchNorm.forward` does in training. `group`: its name; None where nobody is asked."""
    if group is None:
        return nn.modules.batchnorm._BatchNorm.forward(self, input)
    self._check_input_dim(input)
    self._check_non_zero_input_channels(input)
    counter = self.num_batches_tracked if self.track_running_stats else None
    if counter is not None:
        counter.add_(1)
    mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
    return sync_batch_norm(input, mean, var, self.weight, self.bias, counter, self.momentum, self.eps, group)


def group_of(layer: nn.SyncBatchNorm) -> str | None:
    """The name of the group that a layer asks now; None where it asks nobody."""
    if not (layer.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = layer.process_group or torch.distributed.group.WORLD
    if torch.distributed.get_world_size(group) < 2:  # -1 where this process is not in it
        return None
    return ALONE if isinstance(layer, SyncBatchNormAlone) else str(group.group_name)


# --- TorchDynamo ------------------------------------------------------------------------------------


@functools.cache
def register() -> None:
    """Let TorchDynamo capture the layer where a graph is for this library. Imports torch._dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    torch.compiler.allow_in_graph(sync_batch_norm)
    translator: Any = InstructionTranslatorBase
    translator.inline_user_function_return = _with_sync(translator.inline_user_function_return)


def _with_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.functions import UserFunctionVariable

    @functools.wraps(original)
    def inline(self: Any, fn: Any, args: Any, *others: Any, **options: Any) -> Any:
        layer = getattr(args[0], "value", None) if getattr(fn, "fn", None) in _FORWARDS and len(args) == 2 else None
        if not isinstance(layer, nn.SyncBatchNorm) or not _is_ours(self):
            return original(self, fn, args, *others, **options)
        _guard_group(args[0])
        group = ConstantVariable.create(group_of(layer))
        function: Any = UserFunctionVariable(forward)  # type: ignore[arg-type]
        return original(self, function, [*args, group], *others, **options)

    return inline


def _is_ours(translator: Any) -> bool:
    """Whether this library gets the graph that is being captured, or has made the model that is."""
    output = translator.output
    if output.export:
        return False
    backend = getattr(output.compiler_fn, "_torchdynamo_orig_backend", output.compiler_fn)
    if (
        getattr(backend, "compiler_name", None) == "normpass"
        or getattr(backend, "__module__", "") == "normpass.backend"
    ):
        return True
    frame = translator
    while frame is not None and frame.f_globals.get("__name__") != _MODELS:
        frame = getattr(frame, "parent", None)
    return frame is not None


def _guard_group(layer: Any) -> None:
    """Capture again when the layer asks another group, or as many others no more."""
    from torch._dynamo.guards import install_guard

    install_guard(layer.source.make_guard(_same_group))


def _same_group(guards: Any, guard: Any) -> None:
    from normpass.capture.dynamo_found import keep

    keep(guards, guard, "process group", _asked)


def _asked(layer: nn.SyncBatchNorm) -> tuple[str | None, int]:
    group = group_of(layer)
    return group, size_of(group) if group else 1
