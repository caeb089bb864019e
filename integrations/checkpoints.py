"""Tensors and how they came about in one safetensors file, which is written as a whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dfmath import _checks

Tensor: TypeAlias = torch.Tensor
JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT = 1  # of what stands beside the tensors; files of a larger one are refused
_KEY = "dfmath"


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes
    ----------
    tensors
        By name.
    config
        What JSON can hold.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, JSON]) -> None:
    """Write tensors and a config to a file; until all of it is on the disk, the file stays what it was.

    Parameters
    ----------
    path
        In a folder that exists. A file of this name is replaced.
    tensors
        By name; views, shared ones and those on other devices are copied.
    config
        Names and what JSON can hold: numbers but NaN and infinity, strings, truth values, None, lists, dictionaries.

    Raises
    ------
    TypeError, ValueError
        If the path is no file's or the config is not JSON, or one of the tensors is none that a file could hold.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.safetensors", {"weight": torch.ones(2)}, {"width": 2})
    ...     load(f"{folder}/net.safetensors")
    Checkpoint(tensors={'weight': tensor([1., 1.])}, config={'width': 2})
    """
    target, metadata = destination(path), {_KEY: encoded(config)}
    copies = {name: _storable(name, tensor) for name, tensor in tensors.items()}
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.touch()
        mode = (target if target.exists() else draft).stat().st_mode
        save_file(copies, draft, metadata)  # readable for its owner alone
        draft.chmod(stat.S_IMODE(mode))
        _flush(draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere folders cannot be opened
        _flush(target.parent)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Read what `save` wrote. Nothing in a file is ever run: pickles are refused.

    Parameters
    ----------
    path
        Of the file.
    device
        Where the tensors are to be.

    Returns
    -------
    Checkpoint

    Raises
    ------
    TypeError, ValueError
        If there is no such file, it is a pickle, damaged, of a newer format, or not one that `save` wrote.
    """
    source = _path(path)
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "is no regular file" if source.exists() else "does not exist"
        raise ValueError(f"path must name a safetensors file, got {str(path)!r}, which {what}")
    try:
        with safe_open(source, framework="pt", device=str(torch.device(device))) as file:
            config = _decoded((file.metadata() or {}).get(_KEY), source)
            # Copies, since what the file hands out is the file itself, mapped into memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 no dictionary
    except SafetensorError:
        raise _unreadable(source) from None
    return Checkpoint(tensors, config)


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put tensors, by the names of its state_dict, into a module of the same architecture.

    Parameters
    ----------
    module
        Unchanged if they do not fit.
    tensors
        All that the module has, and no others.
    what
        How an error is to call them, such as ``file 'net.safetensors'``.

    Raises
    ------
    ValueError
        If a tensor is missing, is not the module's, or has another shape or dtype there.
    """
    check_fit(module.state_dict(), tensors, what)
    module.load_state_dict(dict(tensors))


def check_fit(wanted: Mapping[str, Tensor], came: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that names the first of the tensors that differ in name, shape or dtype."""
    names = list(dict.fromkeys([*wanted, *came]))  # in the module's order
    wrong = {name: _misfit(wanted.get(name), came.get(name)) for name in names}
    found = [f"{name!r} {reason}" for name, reason in wrong.items() if reason]
    if found:
        count = f"{len(found)} of {len(names)} tensors differ, the first" if len(found) > 1 else "one tensor differs"
        raise ValueError(f"{what} must fit the architecture of the module, got another: {count}: {found[0]}")


def _misfit(wanted: Any, came: Any) -> str:
    if came is None:
        return "is missing"
    if wanted is None:
        return "is not the module's"
    if wanted.shape != came.shape:
        return f"has shape {tuple(came.shape)} where the module has {tuple(wanted.shape)}"
    return f"has dtype {came.dtype} where the module has {wanted.dtype}" if wanted.dtype != came.dtype else ""


def destination(path: str | os.PathLike[str]) -> Path:
    """Return where a file is to be written, or say why it cannot be; behind a link it is what the link points to."""
    target = _path(path).resolve()
    if target.is_dir():
        raise ValueError(f"path must name a file, got {str(path)!r}, which is a folder")
    if not target.parent.is_dir():
        raise ValueError(f"path must name a file in a folder that exists, got {str(path)!r}; make its folder first")
    return target


def encoded(config: Mapping[str, JSON]) -> str:
    """Return a config as JSON text, or say what of it JSON would change or cannot hold."""
    try:
        text = json.dumps({"format": FORMAT, "config": config}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"config must be a dictionary of what JSON can hold: {error}") from None
    if not isinstance(config, Mapping) or json.loads(text)["config"] != config:
        raise TypeError("config must be a dictionary that JSON does not change: strings as names, lists for tuples")
    return text


def _decoded(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        wanted = "a file that dfmath.integrations.checkpoints.save wrote"
        raise ValueError(f"path must name {wanted}, got {str(path)!r}, a safetensors file without its config")
    try:
        found = json.loads(text)
        number, config = int(found["format"]), found.get("config")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unreadable(path) from None
    if number > FORMAT:
        raise ValueError(
            f"path must name a file of format {FORMAT} or older, got {str(path)!r} of format {number}; "
            "a newer dfmath reads it"
        )
    if not isinstance(config, dict):
        raise _unreadable(path)
    return config


def _unreadable(path: Path) -> ValueError:
    """Say what a file is instead, by what it begins with."""
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors begin with the length of a JSON header in 8 bytes: its lowest may happen to be a pickle's first.
    ours = len(start) < 9 or start[4:] == b"\0\0\0\0{"
    if start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and not ours):
        return ValueError(
            f"path must name a safetensors file, got {str(path)!r}, a pickle; pickles are refused, as loading "
            "one can run any program; where you trust it, write what it holds with dfmath.integrations.checkpoints.save"
        )
    return ValueError(
        f"path must name a safetensors file, got {str(path)!r}, which is damaged, cut short or of another kind"
    )


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise TypeError(f"path must be the name of a file, got {_checks.describe(path)}")
    return Path(path)


def _storable(name: str, tensor: Any) -> Tensor:
    """Return a dense copy of a tensor that shares no memory with others."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TypeError(f"tensors must hold dense tensors with values, got {_checks.describe(tensor)} for {name!r}")
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before going on."""
    number = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
