"""How a part of the GPU run says what it has measured: a line for each item, as soon as there is one.

    BEGIN item        the item is under way: what takes the process down is its fault
    ROW {json}        what was measured

`run_all.py` reads these lines. An item that raises is a row with an error, and the next one begins.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any


def run_items(part: str, names: Iterable[str], measure: Callable[[str], dict[str, Any]]) -> int:
    """Measure each item and print its row; 1 if one failed."""
    failed = 0
    for name in names:
        print(f"BEGIN {name}", flush=True)
        start = time.monotonic()
        try:
            found = measure(name)
        except Exception as error:  # a result as good as any, and the others go on
            traceback.print_exc(file=sys.stdout)
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        failed |= "error" in found
        row = {"part": part, "item": name, **found, "took_s": round(time.monotonic() - start, 1)}
        print(f"ROW {json.dumps(row)}", flush=True)
        if _context_is_lost():
            return 3  # nothing more can be measured in this process
    return failed


def _context_is_lost() -> bool:
    """Whether the GPU answers no more, as after an illegal access."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
