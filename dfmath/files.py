"""Where files may be written, and how: refused before the work, whole or not at all after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def destination(name: str, path: str | Path, suffixes: tuple[str, ...]) -> Path:
    """Return the path of a file to be written, or say why it can't be: before the work, not after it.

    Parameters
    ----------
    name
        What the caller's argument is called.
    path
        The file; it need not exist, and its folder must.
    suffixes
        Endings that are allowed, such as ``.html``.

    Raises
    ------
    ValueError
        If the path is empty, has another ending, is a folder, or is in a folder that is not there or takes no files.
    """
    if not str(path):
        raise ValueError(f"{name} must name a file, got an empty name")
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        allowed = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        raise ValueError(f"{name} must end in {allowed}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{name} must name a file, got {str(path)!r}, which is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {str(path)!r}")
    if not _writable(folder):
        raise ValueError(f"{name} must be in a folder that can be written to, got {str(path)!r}")
    return path


def _writable(folder: Path) -> bool:
    """Whether files can be made here: permissions alone don't tell, on file systems that take none."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@contextmanager
def replacing(name: str, path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and rename it at the end: an interruption leaves no half a file.

    Raises
    ------
    OSError
        If the system refuses to write or rename; the message names the argument and the path.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or "the system refused it"
        raise OSError(f"{name} can't be written to {str(path)!r}: {why}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
