"""The `normpass` operator library: how an op of this package is declared.

An op is declared once, in its own file: a schema, a reference in plain ATen, a fake for tracing and an
autograd formula. The reference is registered for `CompositeExplicitAutograd`, below autograd and for every
device, so a kernel registered for the dispatch key of one device takes its place there without an edit here.
No op mutates an input or returns one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("normpass", "FRAGMENT")  # type: ignore[no-untyped-call]


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Declare `normpass::<schema>` and return its overload, to call from Python.

    `reference` and `fake` take the schema's arguments; `backward` and `setup_context` are what
    `torch.library.register_autograd` takes, and `backward=None` is an op without a gradient.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normpass::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"normpass::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.normpass, name).default
    return overload
