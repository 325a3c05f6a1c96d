"""The entries of something that was read from a file: each is checked, and an error names the one that is wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from normpass.errors import InvalidInputError

_SHOWN = 60


def mapping(value: Any, name: str, allowed: Collection[str] | None = None, needed: Collection[str] = ()) -> dict:
    """A dict with names for keys: none but `allowed`, all of `needed`."""
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object with names")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(f"a name in `{name}`", key, "text")
    unknown = [] if allowed is None else [key for key in value if key not in allowed]
    if unknown:
        raise InvalidInputError(f"`{name}`: `{_short(unknown[0])}` is not known; known are {', '.join(allowed or ())}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise InvalidInputError(f"`{name}`: `{missing[0]}` is missing; write it with `StepPlan.save`")
    return dict(value)


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def names(value: Any, name: str) -> frozenset[str]:
    """A list of different names."""
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a list of names")
    found = [text(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if len(set(found)) < len(found):
        double = next(item for item, count in Counter(found).items() if count > 1)
        raise InvalidInputError(f"`{name}`: `{_short(double)}` is there twice; take one out")
    return frozenset(found)


def whole(value: Any, name: str, least: int | None = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise _wrong(name, value, "a whole number" + ("" if least is None else f" of at least {least}"))
    return value


def number(value: Any, name: str, least: float | None = 0.0) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if not is_number or not math.isfinite(value) or (least is not None and value < least):
        raise _wrong(name, value, "a number" + ("" if least is None else f" of at least {least:g}"))
    return float(value)


def items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a list")
    return list(value)


def _wrong(name: str, value: Any, expected: str) -> InvalidInputError:
    quoted = name if "`" in name else f"`{name}`"
    return InvalidInputError(f"{quoted} must be {expected}, it is {_short(repr(value))}")


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
