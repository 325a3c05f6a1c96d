"""Who looks on while a function runs: a compiler, an exporter, a tracer, a `torch.func` transform, a mode.

Each is to see something else than plain eager PyTorch does: standard operators, ops of the dispatcher, plain layers.
They are recognized here, and nowhere else, by what they leave behind.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

is_compiling = torch.compiler.is_compiling
"""whether torch.compile or torch.export is at work"""
is_traced = torch._C._is_tracing
"""whether `torch.jit.trace` is at work"""
dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_is_active = torch._C._are_functorch_transforms_active


def is_exporting() -> bool:
    """Whether `torch.export` is at work, as for ONNX: then a function is to consist of standard operators alone.

    Under torch.compile `torch.compiler.is_exporting` may be True as well (torch 2.11).
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def under_other_derivatives() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active: only plain layers support these."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def is_plain_eager() -> bool:
    """Whether a call is seen by nothing but autograd and autocast. Costs about half a microsecond."""
    if is_compiling() or dispatch_modes() or under_other_derivatives() or is_traced():
        return False
    return not has_function_modes()


def has_function_modes() -> bool:
    """Whether a `TorchFunctionMode` is active; that of `torch.set_default_device` changes factories alone."""
    modes = _function_modes()
    return modes > 1 or (modes == 1 and not isinstance(torch._C._get_function_stack_at(0), DeviceContext))
