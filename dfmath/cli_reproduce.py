"""``dfmath reproduce``: the experiments, into a folder with one report; the work is done in `dfmath.experiments`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dfmath import _checks
from dfmath.console import Json, progress
from dfmath.experiments.registry import EXPERIMENTS, PIPELINE

NAMES = tuple(EXPERIMENTS)


def reproduce(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, all, or {PIPELINE.name}.")] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything, networks trained for seconds: to see that it runs.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where tables, figures and report.html go. Default: reproduced, or reproduced-quick."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where trained networks are kept. Default: the user's cache.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="A saved diffusers pipeline, for the experiment 'pipeline' and for it alone."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run anew what the folder holds already; trained networks are kept.")
    ] = False,
    json: Json = False,
) -> int:
    """Rebuild the experiments into a folder, with one report of all.

    What the folder holds is not run again if it was made with the same settings, sources and versions; anything else
    is, and replaced. So an interrupted run goes on where it was, with the finished parts of a pipeline and the last
    checkpoint of a training, too. ot-table, bounds, schedules, spectrum and dimension are exact quantities of known
    data. trace-error, nll, adjoint and samplers set a network beside the truth: a full-covariance mixture is fitted to
    the digits, and a network is trained on its samples, some minutes the first time. The experiment pipeline has no
    truth beside it: likelihoods of ten prompts' samples and guidance, on a checkpoint of your own, thousands of
    evaluations of it.
    """
    _checks.one_of("name", name, (*NAMES, PIPELINE.name, "all"))
    from rich.markdown import Markdown

    from dfmath import report
    from dfmath.experiments import run

    def say(text: str) -> None:
        """Tell people; where programs read standard output, beside it."""
        print(text, file=sys.stderr if json else sys.stdout, flush=True)

    found = run.reproduce(
        None if name == "all" else (name,),
        output,
        quick=quick,
        fresh=fresh,
        model=model,
        cache=cache,
        say=say,
        show=(lambda tables: None) if json else lambda tables: report.console().print(Markdown(tables)),
        progress=progress,
    )
    if json:
        report.print_json(found)
    return 0
