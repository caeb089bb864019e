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
        self.unreadable: list[str] = []
        for experiment in (*EXPERIMENTS.values(), PIPELINE):
            if (folder / f"{experiment.name}.json").exists():
                self._take(experiment)

    def _take(self, experiment: Experiment) -> None:
        """Take in what the folder holds, or note that it can't be shown: a file there must not stop the work here."""
        found = results.load(self.folder / f"{experiment.name}.json")
        try:
            if found is not None:
                return self.add(experiment, found)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError):
            pass  # someone else's file of that name, or one that was changed by hand
        self.unreadable.append(experiment.name)

    def add(self, experiment: Experiment, result: dict[str, Any]) -> None:
        """Take a finished result in, in the place of an older one."""
        name, machine = experiment.name, result["machine"]
        section = _section(self.folder, experiment, result)
        amount = "quick" if result["settings"]["quick"] else "full"
        sources = "these" if _is_current(result) else "others"
        when = page.element("time", result["made"])
        made = (amount, _seconds(result), when, machine["commit"] or "unknown", sources)
        self.sections[name], self.rows[name] = section, (page.link(name, f"#{name}"), *made)
        self.unreadable = [other for other in self.unreadable if other != name]

    def write(self) -> Path:
        """Write the page, whole or not at all."""
        order = [name for name in (*EXPERIMENTS, PIPELINE.name) if name in self.sections]
        missing = [name for name in EXPERIMENTS if name not in (*self.sections, *self.unreadable)]
        lead = "What dfmath reproduce has finished in this folder: what is asked, what was measured, and what one sees."
        columns = ("experiment", "amount", "seconds", "made", "commit", "sources")
        summary = page.table(columns, [self.rows[name] for name in order], "Finished experiments.")
        notes = [page.paragraph(f"Not in this folder yet: {', '.join(missing)}.")] if missing else []
        if self.unreadable:
            files = ", ".join(f"{name}.json" for name in self.unreadable)
            notes.append(page.paragraph(f"Left out, because they hold no result that can be shown: {files}."))
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
    """Of one experiment, drawn anew; or as its files have it, where this code can't draw it or did not make it."""
    missing = [name for name in experiment.packages if find_spec(name) is None]
    if not _is_current(result):
        return _as_written(
            folder, experiment.name, result, "It was made by other sources, and is shown as they wrote it."
        )
    if missing:
        said = f"It is shown as it was written: to draw it anew needs {' and '.join(missing)}."
        return _as_written(folder, experiment.name, result, said)
    module = experiment.module
    tables = [page.table(table.columns, table.rows, table.title) for table in module.tables(result)]
    blocks = [page.paragraph(module.QUESTION), *_trained(result), page.paragraph(module.seen(result))]
    figure = page.figure(module.figure(result), (module.figure.__doc__ or "").splitlines()[0])
    return page.section(experiment.name, *blocks, figure, *tables, _made(result), anchor=experiment.name)


def _is_current(result: dict[str, Any]) -> bool:
    """Whether these sources made it: others' results may have another form."""
    return bool(result["sources"] == results.sources())


def _as_written(folder: Path, name: str, result: dict[str, Any], why: str) -> page.Section:
    """The Markdown and the picture that lie beside a result, whichever of them there are."""
    text, picture = folder / f"{name}.md", folder / f"{name}.png"
    blocks = _markdown(text.read_text(encoding="utf-8")) if text.is_file() else []
    drawn = [page.image(picture, f"Figure of {name}.")] if picture.is_file() else []
    absent = [path.name for path in (text, picture) if not path.is_file()]
    said = f"{why} {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not there." if absent else why
    return page.section(name, page.paragraph(said), *drawn, *blocks, _made(result), anchor=name)


def _markdown(text: str) -> list[page.Markup]:
    """What `results.markdown` writes, as blocks: paragraphs, and tables below their titles in bold."""
    blocks, title = [], ""
    for part in text.strip().split("\n\n"):
        if part.startswith("|"):
            columns, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in part.splitlines())
            blocks.append(page.table(columns, rows, title))
        elif part.startswith("**"):
            title = part.strip("*")
        else:
            blocks.append(page.paragraph(part))
    return blocks


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
