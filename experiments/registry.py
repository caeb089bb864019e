"""The experiments by name: what each is of, how much of it there is, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Experiment:
    """A module with QUESTION, FULL and QUICK plans, measure, tables, figure and seen.

    `heads` are the forms of the trace heads that it measures; None where it measures no network beside the truth.
    `packages` have to be installed for it to run, and `extra` installs them. One that `takes_model` measures a saved
    pipeline, which its module loads.
    """

    name: str
    source: str
    heads: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()
    extra: str = ""
    takes_model: bool = False

    @property
    def module(self) -> Any:
        """Imported when it is asked for."""
        return import_module(f"dfmath.experiments.{self.source}")

    def plan(self, quick: bool) -> Any:
        """How much there is of everything."""
        return self.module.QUICK if quick else self.module.FULL

    def headed(self, heads: Mapping[str, Any]) -> tuple[Any, ...]:
        """Trace heads as `measure` takes them: one by itself, several by their forms."""
        return tuple(heads.values()) if len(heads) < 2 else (heads,)

    def settings(self, quick: bool, model: str | Path | None = None) -> dict[str, Any]:
        """Everything that decides on the result, the code apart."""
        found = {"quick": quick, **asdict(self.plan(quick))}
        if self.takes_model and model is not None:
            found |= {"model": str(Path(model).resolve())}
        if self.heads is not None:
            from dfmath.experiments import trace_error, truth

            found |= {"network": asdict(truth.training_plan(quick)), "pool": truth.pool(quick)}
            found |= {"head": asdict(trace_error.head_plan(quick))} if self.heads else {}
        return found


_NETWORK: dict[str, Any] = {"packages": ("torch", "safetensors"), "extra": "torch"}
_PIPELINE: dict[str, Any] = {"packages": ("torch", "safetensors", "diffusers", "transformers"), "extra": "diffusers"}
BOTH = ("local-loss", "paper")
EXPERIMENTS = {
    found.name: found
    for found in (
        Experiment("ot-table", "ot_table"),
        Experiment("bounds", "error_bounds"),
        Experiment("schedules", "schedules"),
        Experiment("spectrum", "spectrum"),
        Experiment("dimension", "dimension"),
        Experiment("trace-error", "trace_error", BOTH, **_NETWORK),
        Experiment("nll", "nll", BOTH, **_NETWORK),
        Experiment("adjoint", "adjoint", ("local-loss",), **_NETWORK),
        Experiment("samplers", "samplers", (), **_NETWORK),
    )
}
PIPELINE = Experiment("pipeline", "pipelines", takes_model=True, **_PIPELINE)
