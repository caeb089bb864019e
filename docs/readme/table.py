"""Write the README's table of benchmarks from the committed results: ``python docs/readme/table.py``.

Every row names the file that it is made of; a test compares the table in the README with what this makes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
BEGIN = "<!-- benchmarks: made by docs/readme/table.py -->"
END = "<!-- benchmarks: end -->"


@dataclass(frozen=True)
class Row:
    """One comparison: what is done, beside whom, time of dfmath over the other's, errors of both, and the file."""

    task: str
    other: str
    time: str
    errors: str
    file: str

    def markdown(self) -> str:
        """A line of the table."""
        link = f"[{self.file}]({RESULTS}/{self.file})"
        return f"| {self.task} | {self.other} | {self.time} | {self.errors} | {link} |"


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((ROOT / RESULTS / name).read_text(encoding="utf-8"))


def geometric_mean(values: Iterable[float]) -> float:
    """Exp of the mean of the logarithms."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def times(ratios: list[float]) -> str:
    """Geometric mean and largest of time ratios; below 1 dfmath is faster."""
    return f"**{geometric_mean(ratios):.2f}**, at most {max(ratios):.2f}"


def largest(levels: list[Any], name: str) -> str:
    """Worst relative error of one contender over the levels."""
    errors = [error for level in levels for error in level["contenders"][name]["errors"].values()]
    return "not a number" if None in errors else f"{max(errors):.0e}"


def moments(file: str, task: str, others: dict[str, str], what: str) -> list[Row]:
    """Rows of a benchmark over noise levels, one for each of the others."""
    found = result(file)
    levels, (count, dim) = found["tasks"][task]["levels"], found["shape"]
    rows = []
    for name, label in others.items():
        ratios = [part["contenders"]["dfmath"]["seconds"] / part["contenders"][name]["seconds"] for part in levels]
        errors = f"{largest(levels, 'dfmath')}, {largest(levels, name)}"
        rows.append(Row(f"{what}, {count:,} × {dim}, {len(levels)} levels", label, times(ratios), errors, file))
    return rows


def flows() -> list[Row]:
    """Rows of flows: one time each, and how far the results are apart."""
    digits, patches = result("flow_digits.json"), result("flow_patches.json")
    apart = digits["largest difference of a Jacobian, relative"]
    labels = {"scipy": "SciPy's DOP853", "torch dense": "torch, dense, same integrator"}
    what = f"flow with Jacobian, digits, {digits['starts']} starts"
    rows = [
        Row(what, label, f"**{digits['ratios'][name]:.2f}**", f"differ by {apart[name]:.0e}", "flow_digits.json")
        for name, label in labels.items()
    ]
    low = f"flow at ρ from {patches['rho'][0]:g} to {patches['rho'][1]:g}, {patches['shape'][0]:,} patches"
    apart = patches["largest difference of a state"]["torch dense"]
    ratio = f"**{patches['ratios']['torch dense']:.2f}**"
    return [*rows, Row(low, labels["torch dense"], ratio, f"differ by {apart:.0e}", "flow_patches.json")]


def networks() -> list[Row]:
    """Rows of networks: a head's trace beside Hutchinson's, and what a sampler adds."""
    seconds = result("network.json")["seconds"]
    by_hand = "noise and trace, Hutchinson by hand (vjp)"
    head = seconds["noise and trace, riding head"] / seconds[by_hand]
    unet = result("sampling.json")["seconds"]["UNet, 4 images of 32 x 32"]
    levels, cost = result("trace-error.json")["levels"], result("trace-error.json")["cost"]
    one = "Hutchinson, 1 probe"
    better = geometric_mean(level["median"]["local-loss"] / level["median"][one] for level in levels)
    return [
        Row(
            f"trace of a trained network, {len(levels)} levels",
            "its own Hutchinson, 1 probe",
            f"**{cost['local-loss'] / cost[one]:.2f}**",
            f"median error {better:.2f} of the other's",
            "trace-error.json",
        ),
        Row("noise and trace of a UNet", "Hutchinson by hand", f"**{head:.2f}**", "", "network.json"),
        Row(
            "DDIM on a UNet",
            "diffusers' DDIM",
            f"**{unet['dfmath, DDIM'] / unet['diffusers, DDIM']:.2f}**",
            "",
            "sampling.json",
        ),
    ]


def accuracy() -> list[Row]:
    """Worst errors over all cases of the accuracy table, beside plain code in the same precision."""
    cases = result("accuracy.json")["cases"].values()
    rows = []
    for dtype in ("float64", "float32"):
        ours, plain = (max(max(case[f"{who} {dtype}"].values()) for case in cases) for who in ("dfmath", "plain torch"))
        what = f"moments and F v, {len(cases)} cases, {dtype}"
        rows.append(Row(what, "torch, as usually written", "", f"{ours:.0e}, {plain:.0e}", "accuracy.json"))
    return rows


def rows() -> list[Row]:
    """All of them."""
    dense, jvp = {"torch dense": "torch, dense float32"}, {"torch jvp": "`torch.func.jvp`"}
    return [
        *moments("moments_patches.json", "mean and trace", dense, "mean and trace, patches"),
        *moments("moments_patches_product.json", "one product", dense | jvp, "F v, patches"),
        *moments("moments_plane.json", "one product", dense, "F v, plane"),
        *moments("moments_digits.json", "mean and trace", dense, "mean and trace, digits"),
        *moments("moments_digits.json", "one product", dense, "F v, digits"),
        *flows(),
        *networks(),
        *accuracy(),
    ]


def table() -> str:
    """The table, between its markers."""
    head = "| task | beside | time of dfmath / its time | worst relative error: dfmath, the other | from |"
    return "\n".join([BEGIN, head, "|---" * 5 + "|", *(row.markdown() for row in rows()), END])


def replaced(text: str) -> str:
    """The README with a new table."""
    before, rest = text.split(BEGIN)
    return before + table() + rest.split(END)[1]


def main() -> None:
    """Write the README anew, whole or not at all."""
    path = ROOT / "README.md"
    temporary = path.with_name(f".README.{os.getpid()}")
    temporary.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
