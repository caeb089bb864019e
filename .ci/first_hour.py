#!/usr/bin/env python3
"""A newcomer's first hour: what the README says, literally, in a fresh clone and a fresh environment.

Blocks are taken as they stand on the page: commands are run, apart from the test suite, which has a run of its own;
Python blocks are typed into one interpreter, and where an output stands below a block it must be what was printed, word
by word, numbers to nine digits. Then notebooks 1 and 2. Anything that differs is named, and ends it with exit code 1.

    .ci/first_hour.py                 clone what is committed and install it, then follow README.md
    .ci/first_hour.py --here          in this folder, with the dfmath that is installed; no commands are run
    .ci/first_hour.py --here PAGE     another page
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("notebooks/01_diffusion_fisher.py", "notebooks/02_optimal_transport.py")
SHORT = {"DFMATH_SHORT": "1", "MPLBACKEND": "Agg"}
DIGITS = 1e-9  # relative; the library promises 1e-10
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Reads one block from each line of its input, runs it, and answers with what it printed and the error, if any.
INTERPRETER = """
import contextlib, importlib, io, json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    importlib.invalidate_caches()
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(json.loads(line), names)
        except BaseException:
            error = traceback.format_exc(limit=-3)
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


class Differs(Exception):
    """Something was not as the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and the output below a Python block."""

    kind: str
    text: str
    where: str
    said: str | None = None


def blocks(path: Path) -> list[Block]:
    """The page's blocks in order; a block without a language right below a Python block is its output."""
    text = path.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCED.finditer(text):
        kind, body = match.groups()
        where = f"{path.name}, line {text[: match.start()].count(chr(10)) + 1}"
        if kind == "" and found and found[-1].kind == "python" and not text[end : match.start()].strip():
            found[-1] = Block("python", found[-1].text, found[-1].where, body)
        else:
            found.append(Block(kind, body, where))
        end = match.end()
    return found


def number(word: str) -> float | None:
    """The number that a printed word is, if it is one."""
    try:
        return float(word.strip("[](),"))
    except ValueError:
        return None


def alike(printed: str, said: str) -> bool:
    """Two words are the same, or numbers that agree to nine digits."""
    a, b = number(printed), number(said)
    return printed == said if a is None or b is None else math.isclose(a, b, rel_tol=DIGITS, abs_tol=0.0)


def compare(block: Block, printed: str) -> None:
    """Raise where the output is not what stands below the block, naming the first word that differs."""
    got, wanted = printed.split(), (block.said or "").split()
    for i in range(max(len(got), len(wanted))):
        a, b = (words[i] if i < len(words) else "nothing" for words in (got, wanted))
        if not alike(a, b):
            raise Differs(f"{block.where}: printed {a!r} where the page says {b!r}\n--- printed\n{printed}")


class Reader:
    """Somebody who follows a page in one folder: a shell, and an interpreter that stays open."""

    def __init__(self, folder: Path, environment: dict[str, str], installs: bool) -> None:
        self.folder, self.environment, self.installs = folder, environment, installs
        self.python: subprocess.Popen[str] | None = None

    def follow(self, page: Path) -> int:
        """Work through a page; return how many outputs were compared."""
        compared = 0
        for block in blocks(page):
            if block.kind == "bash":
                self.command(block)
            elif block.kind == "python":
                compared += self.type(block)
        return compared

    def command(self, block: Block) -> None:
        """Run a block of commands, without the test suite."""
        if not self.installs or "pytest" in block.text:
            return
        begin = time.monotonic()
        self.call(["bash", "-ec", block.text], block.where)
        note(f"{block.where}: commands", begin)

    def call(self, command: list[str], what: str, settings: dict[str, str] | None = None) -> None:
        """Run one command; show what it said if it fails."""
        environment = {**self.environment, **(settings or {})}
        found = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if found.returncode != 0:
            said = (found.stdout + found.stderr)[-3000:]
            raise Differs(f"{what}: exit code {found.returncode} of {command[-1]!r}\n{said}")

    def type(self, block: Block) -> int:
        """Type a block into the interpreter and compare."""
        if self.python is None:
            command = [shutil.which("python", path=self.environment["PATH"]) or "python", "-c", INTERPRETER]
            pipe = subprocess.PIPE
            self.python = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=pipe, stdout=pipe, text=True
            )
        assert self.python.stdin is not None and self.python.stdout is not None
        begin = time.monotonic()
        self.python.stdin.write(json.dumps(block.text) + "\n")
        self.python.stdin.flush()
        answer = self.python.stdout.readline()
        if not answer:
            raise Differs(f"{block.where}: the interpreter ended")
        printed, error = json.loads(answer)
        if error is not None:
            raise Differs(f"{block.where}: the block raised\n{error}")
        if block.said is not None or printed:
            compare(block, printed)
        note(f"{block.where}: as it says", begin)
        return int(block.said is not None)

    def close(self) -> None:
        """Leave the interpreter."""
        if self.python is not None:
            self.python.communicate()


def note(text: str, begin: float) -> None:
    """Say what is done, and in how many seconds."""
    print(f"{text} ({time.monotonic() - begin:.0f} s)", flush=True)


def clone(folder: Path) -> dict[str, str]:
    """Clone what is committed, make an environment, and return the variables of a shell in which it is active."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "dfmath")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # A cache of compiled kernels elsewhere would make the first hour shorter than it is.
    own.pop("NUMBA_CACHE_DIR", None)
    return {**own, "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{own['PATH']}"}


def hour(options: argparse.Namespace, folder: Path, environment: dict[str, str]) -> None:
    """Pages first, then notebooks."""
    reader = Reader(folder, environment, installs=not options.here)
    compared = 0
    try:
        for page in options.pages:
            compared += reader.follow(folder / page)
        if compared == 0:
            raise Differs(f"{', '.join(options.pages)}: no output to compare")
        for notebook in () if options.no_notebooks else NOTEBOOKS:
            begin = time.monotonic()
            reader.call(["python", notebook], notebook, SHORT)
            note(f"{notebook}: ran", begin)
    finally:
        reader.close()
    print(f"{compared} outputs are as the pages say")


def main() -> int:
    """Follow the pages; exit code 1 and what differs, if something does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=["README.md"], help="pages to follow, from the repository's root")
    parser.add_argument("--here", action="store_true", help="use the environment and the folder as they are")
    parser.add_argument("--no-notebooks", action="store_true", help="pages alone")
    options, begin = parser.parse_args(), time.monotonic()
    try:
        if options.here:
            hour(options, ROOT, dict(os.environ))
        else:
            with tempfile.TemporaryDirectory() as temporary:
                environment = clone(Path(temporary))
                hour(options, Path(temporary) / "dfmath", environment)
    except Differs as difference:
        print(f"first hour: {difference}", file=sys.stderr)
        return 1
    note("first hour: as the README says", begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
