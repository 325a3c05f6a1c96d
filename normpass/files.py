"""Files that appear whole or not at all, and JSON as all of ours is written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from normpass.errors import InvalidInputError


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, with its suffix, that takes its name when the block ends well.

    It is created at once, so that a place where nothing can be written is found out before the work. Where the
    block raises, it is removed and what stood at `path` stays.

    Raises:
        InvalidInputError: nothing can be written there.
    """
    temporary = _create(path)
    try:
        yield temporary
        try:
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except OSError as error:
            raise _not_writable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON that a person can read.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(json.dumps(content, indent=1) + "\n")


def _create(path: Path) -> Path:
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:50]}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise _not_writable(path, error) from error
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _not_writable(path: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(f"cannot write `{path}`: {error.strerror}; name a file in a folder that you may write to")
