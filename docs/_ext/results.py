"""Tables of committed results, written from their JSON by the code that wrote the tables beside it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfmath.experiments.registry import EXPERIMENTS
from dfmath.experiments.results import markdown, with_nan
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BENCHMARKS = {
    "cluster": "cluster",
    "network": "networks",
    "sampling": "sampling",
    "scaling": "scaling",
    "streaming": "streaming",
}


def written(name: str, result: dict[str, Any]) -> str:
    """Return the tables of one result as Markdown."""
    if name in EXPERIMENTS:
        return markdown(EXPERIMENTS[name].module, with_nan(result))
    own: dict[str, Callable[[dict[str, Any]], str]] = {"accuracy": _accuracy, "plane": _plane}
    if name.startswith("flow_"):
        return _flow(result)
    if name in own:
        return own[name](result)
    module = importlib.import_module("dfmath.benchmarks." + BENCHMARKS.get(name, "moments"))
    return str(module.markdown(result))


def _flow(result: dict[str, Any]) -> str:
    """Seconds, what share of the peer's time dfmath takes, and how far the two are apart."""
    (difference,) = (key for key in result if key.startswith("largest difference"))
    lines = [
        f"{result['starts']} starts, rtol {result['rtol']:g}, rho from {result['rho'][0]:g} to {result['rho'][1]:g}, "
        f"{result['evaluations']:.0f} evaluations each.",
        "",
        f"| | seconds | dfmath takes of it | {difference} |",
        "|---|---|---|---|",
    ]
    for way, seconds in result["seconds"].items():
        ratio, off = result["ratios"].get(way), result[difference].get(way)
        beside = f"{ratio:.3g} | {off:.1e}" if ratio is not None else " | "
        lines.append(f"| {way} | {seconds:.3g} | {beside} |")
    return "\n".join(lines)


def _accuracy(result: dict[str, Any]) -> str:
    """The worst quantity of each case."""
    cases = result["cases"]
    ways = list(next(iter(cases.values())))
    lines = ["| case | " + " | ".join(ways) + " |", "|" + "---|" * (len(ways) + 1)]
    for case, found in cases.items():
        lines.append(f"| {case} | " + " | ".join(f"{max(found[way].values()):.0e}" for way in ways) + " |")
    return "\n".join(lines)


def _plane(result: dict[str, Any]) -> str:
    """How far F is from positive definite at each level of the README's first figure."""
    lines = [
        f"{len(result['points'])} points, {len(result['side'])} x {len(result['side'])} nodes.",
        "",
        "| rho | smallest eigenvalue of rho^2 F in the window | share of nodes where it is negative |",
        "|---|---|---|",
    ]
    for level in result["levels"]:
        least = [value for row in level["least"] for value in row]
        lines.append(f"| {level['rho']:g} | {min(least):.3g} | {sum(x < 0 for x in least) / len(least):.1%} |")
    return "\n".join(lines)


def origin(name: str, result: dict[str, Any]) -> str:
    """Say which file, commit and machine the numbers are from."""
    file = f"`benchmarks/results/{name}.json`"
    machine = result["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    return f"From {file}: commit `{machine['commit']}`, {where}; {versions}."


class Result(SphinxDirective):
    """``{result} streaming``: origin, figure and tables of one file of results."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return them, parsed as Markdown without its headings, which would stand out of the page's order."""
        name = self.arguments[0]
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            raise ExtensionError(f"there is no {path.name} in benchmarks/results")
        self.env.note_dependency(str(path))
        result = json.loads(path.read_text())
        lines = [origin(name, result), ""]
        if (RESULTS / f"{name}.png").is_file():
            lines += [f"![Figure of benchmarks/results/{name}.json](/../benchmarks/results/{name}.png)", ""]
        lines += [_unheaded(line) for line in written(name, result).splitlines()]
        box = nodes.container(classes=["result"])
        box += self.parse_text_to_nodes("\n".join(lines))
        return [box]


class Slower(SphinxDirective):
    """``{slower}``: where a peer was faster in the benchmarks of moments, and by how much."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        lines = [
            "| data, N x d | task | peer | dfmath's time in the peer's: mean, most | levels where the peer was faster |"
        ]
        lines.append("|---|---|---|---|---|")
        for path in sorted(RESULTS.glob("moments_*.json")):
            self.env.note_dependency(str(path))
            lines += _slower(json.loads(path.read_text()))
        return self.parse_text_to_nodes("\n".join(lines))


def _slower(result: dict[str, Any]) -> list[str]:
    moments, lines = importlib.import_module("dfmath.benchmarks.moments"), []
    data = f"{result['data']}, {result['shape'][0]} x {result['shape'][1]}"
    for task, part in result["tasks"].items():
        for peer, shares in moments.ratios(part["levels"]).items():
            if max(shares) > 1.0:
                mean, faster = moments.geometric_mean(shares), sum(share > 1.0 for share in shares)
                cells = f"{mean:.2f}, {max(shares):.2f} | {faster} of {len(shares)}"
                lines.append(f"| {data} | {task} | {peer} | {cells} |")
    return lines


def _unheaded(line: str) -> str:
    """A heading as a line in bold."""
    return f"**{line.lstrip('# ')}**" if line.startswith("#") else line


def setup(app: Any) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("result", Result)
    app.add_directive("slower", Slower)
    return {"parallel_read_safe": True}
