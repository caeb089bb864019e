"""Finished parts of long work in a file, so that what was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfmath import _checks


class Journal:
    """Parts by name in one JSON file, which is replaced as a whole after each.

    Parameters
    ----------
    path
        The file; its folder exists.
    about
        What the work is of, as JSON can hold it: parts of other work are not taken for its own.
    resume
        Go on with the parts of the file, if there is one; begin anew otherwise.

    Raises
    ------
    ValueError
        If the file to go on with is none that a journal wrote, or of other work.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "parts.json"
    >>> Journal(path, {"rho": 1.0}).part("trace", lambda: 3.0)
    3.0
    >>> Journal(path, {"rho": 1.0}, resume=True).part("trace", lambda: 4.0)
    3.0
    """

    def __init__(self, path: Path, about: Mapping[str, Any], resume: bool = False) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        self.parts: dict[str, Any] = self._read() if resume and path.exists() else {}

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a part: what the file holds, or else what the work returns, which is then kept."""
        if name not in self.parts:
            self.parts[name] = json.loads(json.dumps(work()))
            self._write()
        return self.parts[name]

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            about, parts = found["about"], found["parts"]
        except (ValueError, KeyError, TypeError, OSError):
            raise ValueError(f"{str(self.path)!r} must hold finished parts to go on with, got something else") from None
        for name in {*about, *self.about}:
            if about.get(name) != self.about.get(name):
                raise ValueError(
                    f"{str(self.path)!r} must hold parts of the same work to go on with, got {name} "
                    f"{about.get(name)!r} and not {self.about.get(name)!r}"
                )
        _checks.instance("parts", parts, dict)
        return parts

    def _write(self) -> None:
        draft = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            draft.write_text(json.dumps({"about": self.about, "parts": self.parts}), encoding="utf-8")
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
