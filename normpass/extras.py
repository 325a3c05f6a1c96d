"""Packages that only some commands need: imported when they are, with a word on how to install them."""

from __future__ import annotations

import importlib
from typing import Any

from normpass.errors import NotAvailableError

_EXTRA = {"onnx": "convert", "onnxscript": "convert", "onnx_ir": "convert", "onnxruntime": "convert"}
_EXTRA |= {"safetensors": "convert", "matplotlib": "demo"}


def needed(module: str) -> Any:
    """The module of that dotted name.

    Raises:
        NotAvailableError: its package is not installed.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
        raise NotAvailableError(f'{top} is not installed: pip install "normpass[{_EXTRA[top]}]"') from error
