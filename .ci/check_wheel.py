"""Look inside a built wheel: every module and marker is there, and nothing else."""

import sys
import zipfile
from pathlib import Path


def main() -> None:
    """Compare the wheel's files with the source folders."""
    wheel = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
    homes = {"dfmath": "dfmath"} | {
        name: f"dfmath/{name}" for name in ("backends", "benchmarks", "integrations", "experiments")
    }
    expected = {
        f"{target}/{path.relative_to(source).as_posix()}"
        for source, target in homes.items()
        for path in Path(source).rglob("*")
        if path.suffix in (".py", ".cu") or path.name == "py.typed"
    }
    if wheel != expected:
        sys.exit(f"missing from the wheel: {sorted(expected - wheel)}; not expected: {sorted(wheel - expected)}")
    print(f"{len(wheel)} files, as in the sources")


if __name__ == "__main__":
    main()
