"""The `normpass` operator library: how an op of this package is declared.

An op is declared once, in its own file: a schema, a reference in plain ATen, a fake for tracing, an autograd
formula and a way to call its kernel. The reference is registered for `CompositeExplicitAutograd`, below autograd
and for every device; the kernel for the dispatch keys of the devices that `normpass.kernels` knows, where it
takes the reference's place. What it is on a device is asked at the first call, so that an import loads nothing.
No op mutates an input or returns one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normpass.kernels import kernels_for

LIBRARY = torch.library.Library("normpass", "FRAGMENT")  # type: ignore[no-untyped-call]

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Declare `normpass::<schema>` and return its overload, to call from Python.

    `reference` and `fake` take the schema's arguments. `kernel` takes a device's `Kernels`, or None where it has
    none, and then the schema's arguments; it runs the reference for what the kernels do not do. `backward` and
    `setup_context` are what `torch.library.register_autograd` takes, and `backward=None` is an op without a
    gradient.
    """
    name = schema.partition("(")[0]
    # Every op takes any strides: without `flexible_layout` Inductor copies its channels_last tensors at each.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    for device, key in DISPATCH_KEYS.items():
        LIBRARY.impl(name, _on_device(device, kernel), key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normpass::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"normpass::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.normpass, name).default
    return overload


def _on_device(device: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return kernel(kernels_for(device), *args)

    return call
