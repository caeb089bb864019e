"""One page of HTML of all results in a folder: what each asks, its tables, its figure, and what one sees."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfmath.experiments import results
from dfmath.experiments.registry import EXPERIMENTS, PIPELINE, Experiment

from dfmath import page

FILE = "report.html"


class Report:
    """The report of a folder; sections are made once, and the page is written anew after each experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sections: dict[str, page.Section] = {}
        self.rows: dict[str, tuple[Any, ...]] = {}
        for experiment in (*EXPERIMENTS.values(), PIPELINE):
            found = results.load(folder / f"{experiment.name}.json")
            if found is not None:
                self.add(experiment, found)

    def add(self, experiment: Experiment, result: dict[str, Any]) -> None:
        """Take a finished result in, in the place of an older one."""
        self.sections[experiment.name] = _section(self.folder, experiment, result)
        machine = result["machine"]
        amount = "quick" if result["settings"]["quick"] else "full"
        made = (amount, _seconds(result), result["made"], machine["commit"] or "unknown")
        self.rows[experiment.name] = (page.link(experiment.name, f"#{experiment.name}"), *made)

    def write(self) -> Path:
        """Write the page, whole or not at all."""
        order = [name for name in (*EXPERIMENTS, PIPELINE.name) if name in self.sections]
        missing = [name for name in EXPERIMENTS if name not in self.sections]
        lead = "What dfmath reproduce has finished in this folder: what is asked, what was measured, and what one sees."
        columns = ("experiment", "amount", "seconds", "made", "commit")
        summary = page.table(columns, [self.rows[name] for name in order], "Finished experiments.")
        notes = [page.paragraph(f"Not in this folder yet: {', '.join(missing)}.")] if missing else []
        if any(self.rows[name][1] == "quick" for name in order):
            notes.append(page.paragraph(QUICK))
        sections = [self.sections[name] for name in order]
        whole = page.page("dfmath reproduce", lead, [summary, *notes, *sections, page.about_block()])
        return page.save(whole, self.folder / FILE)


QUICK = (
    "Quick results are there to see that everything runs: little of everything, and networks that were trained for "
    "seconds. Errors of such networks say nothing of trained ones; those of the exact quantities are as they should "
    "be, with fewer noise levels and wider error bars."
)


def _seconds(result: dict[str, Any]) -> str:
    trained = result.get("training seconds", 0.0)
    return f"{result['seconds']:.1f}" + (f" and {trained:.1f} of training" if trained >= 0.1 else "")


def _section(folder: Path, experiment: Experiment, result: dict[str, Any]) -> page.Section:
    """Of one experiment; where what draws it is not installed, with the picture that is there."""
    missing = [name for name in experiment.packages if find_spec(name) is None]
    if missing:
        said = f"Its tables are in {experiment.name}.md: to show them here needs {' and '.join(missing)}."
        picture = page.image(folder / f"{experiment.name}.png", f"Figure of {experiment.name}.")
        return page.section(experiment.name, page.paragraph(said), picture)
    module = experiment.module
    tables = [page.table(table.columns, table.rows, table.title) for table in module.tables(result)]
    blocks = [page.paragraph(module.QUESTION), *_trained(result), page.paragraph(module.seen(result))]
    figure = page.figure(module.figure(result), (module.figure.__doc__ or "").splitlines()[0])
    return page.section(experiment.name, *blocks, figure, *tables, _made(result), anchor=experiment.name)


def _trained(result: dict[str, Any]) -> list[page.Markup]:
    """How long the networks were trained."""
    asked = result["settings"]
    if "network" not in asked:
        return []
    steps = [f"the network for {asked['network']['steps']} steps"]
    steps += [f"each trace head for {asked['head']['steps']}"] if "head" in asked else []
    quick = ", which takes seconds: a quick run" if asked["quick"] else ""
    return [page.paragraph(f"Trained {' and '.join(steps)}{quick}.")]


def _made(result: dict[str, Any]) -> page.Markup:
    """Settings, versions and machine, folded."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [(name, _setting(value)) for name, value in result["settings"].items()]
    rows += [("seconds", _seconds(result)), ("made", result["made"]), ("commit", str(machine["commit"]))]
    rows += [("sources", result["sources"]), ("versions", versions)]
    rows += [("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")]
    return page.details("How this was made", page.table(("what", "value"), rows, "Settings, versions and machine."))


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
