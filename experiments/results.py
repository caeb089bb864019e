"""Results of experiments in a folder: tables, figures and, last of all, the JSON file that says that all is there."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfmath.benchmarks import timing

from dfmath import plots
from dfmath.report import plain

CODE = (".py", ".cu")
PARTS = ("backends", "benchmarks", "integrations", "experiments")  # of the package that are folders beside it
FIGURES = (".png", ".svg")
# What has to be equal for a result to be taken as it is. Its commit is told, but no part of this: most commits change
# no source, and what they change of the sources is in the digest.
IDENTITY = ("settings", "sources", "versions")
WARNING = "**A quick run: the network was trained for seconds. The numbers show that it runs, and nothing else.**"


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides on a result: settings, the sources themselves and the versions of all libraries."""
    found = {"settings": settings, "sources": sources(), "versions": timing.machine()["versions"]}
    told: dict[str, Any] = json.loads(json.dumps(plain(found)))
    return told


@cache
def sources() -> str:
    """Return a digest of the package's code: a commit says little of a tree with changes, or of a wheel."""
    return digest(package_files())


def package_files() -> dict[str, Path]:
    """Return the package's modules and kernels by their path in it: the same in a checkout and in a wheel."""
    found: dict[str, Path] = {}
    for name in ("dfmath", *(f"dfmath.{part}" for part in PARTS)):
        spec = find_spec(name)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            files = (file for file in Path(folder).rglob("*") if file.suffix in CODE)
            # In a wheel the parts lie within dfmath and are seen twice, under one path.
            found |= {f"{name.replace('.', '/')}/{file.relative_to(folder).as_posix()}": file for file in files}
    return found


def digest(files: dict[str, Path]) -> str:
    """Return twelve digits of SHA-256 over path, size and bytes of each file, in the order of their paths."""
    found = hashlib.sha256()
    for name, file in sorted(files.items()):
        code = file.read_bytes()
        found.update(f"{name}\0{len(code)}\0".encode() + code)
    return found.hexdigest()[:12]


def kept(folder: Path, name: str, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the result that the folder holds if it is of the same identity, and why it is taken, or is not."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None, ""
    found = load(path)
    if found is None:
        return None, f"{path.name} holds no finished result"
    told = {**found, "versions": found["machine"].get("versions")}
    different = [key for key in IDENTITY if plain(told[key]) != wanted[key]]
    if different:
        return None, f"{path.name} was made with other {' and '.join(different)}"
    made = f"{path.name} was made on {found['made']} at commit {found['machine'].get('commit') or 'unknown'}"
    return found, f"{made} with the same {', '.join(IDENTITY[:-1])} and {IDENTITY[-1]}"


def load(path: Path) -> dict[str, Any] | None:
    """Return what a file of a finished result holds, null being NaN; None for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not {"settings", "sources", "made", "machine", "seconds"} <= set(found):
        return None
    if not isinstance(found["settings"], dict) or not isinstance(found["machine"], dict):
        return None
    whole: dict[str, Any] = {name: value if name == "machine" else with_nan(value) for name, value in found.items()}
    return whole


def with_nan(value: Any) -> Any:
    """Undo what JSON has no word for: NaN and infinities were written as null."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def keep(folder: Path, name: str, module: Any, result: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Write NAME.md, NAME.png, NAME.svg and then NAME.json; return what the last one holds.

    Tables and figures are made of what the file will hold, so that they are the same when they are made of it again.
    """
    about = {"made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": timing.machine()}
    about |= {"sources": sources(), **made}
    text = json.dumps(plain(about | result), indent=1, allow_nan=False) + "\n"
    found: dict[str, Any] = {key: with_nan(value) for key, value in json.loads(text).items() if key != "machine"}
    found["machine"] = about["machine"]
    draw(folder, name, module, found)
    timing.write(folder / f"{name}.json", text)
    return found


def draw(folder: Path, name: str, module: Any, result: dict[str, Any]) -> None:
    """Write the tables and the figure of a result."""
    timing.write(folder / f"{name}.md", markdown(module, result))
    drawn = module.figure(result)
    for suffix in FIGURES:
        plots.save(drawn, folder / f"{name}{suffix}")


def drawn(folder: Path, name: str) -> bool:
    """Whether tables and figure are there."""
    return all((folder / f"{name}{suffix}").exists() for suffix in (".md", *FIGURES))


def markdown(module: Any, result: dict[str, Any]) -> str:
    """What an experiment asks, its tables, and what one sees, in Markdown."""
    tables = "\n\n".join(table.markdown() for table in module.tables(result))
    asked = result.get("settings", {})
    warning = f"{WARNING}\n\n" if asked.get("quick") and "network" in asked else ""
    return f"{module.QUESTION}\n\n{warning}{tables}\n\n{module.seen(result)}\n"
