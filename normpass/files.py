"""Files that appear whole or not at all, and JSON as all of ours is written and read."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from normpass.errors import InvalidInputError

MOST_BYTES = 64 * 2**20
"""of a file of JSON that is read"""


class NotWritableError(InvalidInputError, OSError):
    """A file cannot be written; `strerror` says why."""


# --- writing ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, with its suffix, that takes its name when the block ends well.

    It is created at once, so that a place where nothing can be written is found out before the work. Where the
    block raises, it is removed and what stood at `path` stays; where the process is killed, a file is left whose
    name has "unfinished" in it. A link is written through, a file that is there keeps its mode, and what is no file
    (a terminal, a pipe) is written to.

    Raises:
        NotWritableError: nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    temporary, mode = _create(path, target)
    try:
        yield temporary
        try:
            _move(temporary, target, mode)
        except OSError as error:
            raise _not_writable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def path_of(given: Any, option: str) -> Path:
    """The path that was given for `option`.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        return Path(given)
    except TypeError as error:
        raise InvalidInputError(f"`{option}` must be a path, it is {given!r:.80}") from error


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON that a person can read.

    Raises:
        NotWritableError: it cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    with appearing(path) as file:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _not_writable(path, error) from error


def _create(path: Path, target: Path) -> tuple[Path, int | None]:
    """A new empty file, and the mode it is to get; None for that of a new file, which it has."""
    try:
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            return _new(target), None
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "it is a folder")
        if not os.access(target, os.W_OK):
            raise PermissionError(0, "it may not be written to")
        if not stat.S_ISREG(mode):
            handle, name = tempfile.mkstemp(suffix=path.suffix)
            os.close(handle)
            return Path(name), None
        return _new(target), stat.S_IMODE(mode)
    except OSError as error:
        raise _not_writable(path, error) from error


def _new(target: Path) -> Path:
    """A new file beside `target`, with the mode of a new file."""
    path = target.with_name(f".{target.stem[:40]}-unfinished-{secrets.token_hex(4)}{target.suffix}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _move(temporary: Path, target: Path, mode: int | None) -> None:
    if os.path.exists(target) and not os.path.isfile(target):
        with temporary.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        return
    if mode is not None:
        os.chmod(temporary, mode)
    os.replace(temporary, target)


def _not_writable(path: Path, error: OSError) -> NotWritableError:
    found = NotWritableError(f"cannot write `{path}`: {error.strerror}; name a file in a folder that you may write to")
    found.strerror = error.strerror
    return found


# --- reading ----------------------------------------------------------------------------------------


def read_json(path: Path, what: str) -> Any:
    """The content of a file of JSON: every name once in its object, and numbers that are numbers.

    Args:
        what: what a message calls it, `plan` say.

    Raises:
        InvalidInputError: it cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a name may be none, for a zero byte in it
        raise _unreadable(what, path, str(error)) from error
    if len(content) > MOST_BYTES:
        raise _unreadable(what, path, f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        return json.loads(content.decode(), object_pairs_hook=_without_doubles, parse_constant=_no_number)
    except RecursionError as error:
        raise _unreadable(what, path, "it is nested too deeply") from error
    except ValueError as error:
        raise _unreadable(what, path, str(error)) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'"{name}" is twice in one object')
        found[name] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _unreadable(what: str, path: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(f"`{what}`: `{path}` cannot be read as JSON: {reason}")
