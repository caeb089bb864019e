"""Samplers at few evaluations: from the mixture's own noise, and from that of a network trained on its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from dfmath.experiments import orders, output
from dfmath.experiments.truth import RHO, Truth, training_plan
from dfmath.integrations.score_normalizer import network_normalizer
from scipy.spatial.distance import cdist, pdist

from dfmath import GaussianMixture
from dfmath.normalizers import Normalizer, normalizer_of_prior
from dfmath.samplers import Churn, sample
from dfmath.schedules import VP
from dfmath.solvers import Spacing, noise_levels

Tensor: TypeAlias = torch.Tensor
Model: TypeAlias = Any

QUESTION = (
    "How near do samplers come with 5 to 50 evaluations? From the exact noise of a mixture and from that of a network "
    "that was trained on its samples: the distance from where the model's own flow ends, the Frechet and the energy "
    "distance from the mixture, and the orders of convergence on Gaussians, whose flow has a closed form [MATH 2.5, "
    "6.1, 6.2]. The churn of EDM's sampler is one value, not tuned to these data."
)
SEEN_AT = 10  # evaluations at which samples are drawn
FAR = 1e6  # noise at which nothing of the data is seen
TIMES = VP.linear()  # whose time some polynomials are in, and some grids are even in
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "DDIM": {"solver": "ddim"},
    "DEIS 1": {"solver": "deis", "order": 1},
    "DEIS 2": {"solver": "deis", "order": 2},
    "DEIS 3": {"solver": "deis", "order": 3},
    "rho-AB 2": {"solver": "deis", "order": 2, "time": lambda rho: rho},
    "DEIS-SN 1": {"solver": "deis", "order": 1, "normalizer": True},
    "DEIS-SN 2": {"solver": "deis", "order": 2, "normalizer": True},
    "DEIS-SN 3": {"solver": "deis", "order": 3, "normalizer": True},
    "tAB 3, even times": {"solver": "deis", "order": 3, "time": TIMES, "spacing": "time"},
    "tAB-SN 3, even times": {"solver": "deis", "order": 3, "time": TIMES, "spacing": "time", "normalizer": True},
    "DPM-Solver++(2M)": {"solver": "dpm++2m"},
    "PNDM": {"solver": "pndm"},
    "Heun": {"solver": "heun"},
}
STOCHASTIC: dict[str, dict[str, Any]] = {
    "DDPM": {"solver": "ddpm"},
    "EDM, churn": {"solver": "heun", "churn": Churn(8.0)},
}
WAYS: dict[str, dict[str, Any]] = {**DETERMINISTIC, **STOCHASTIC}


def _style(colour: str, marker: str, line: str = "-") -> dict[str, Any]:
    return {"color": colour, "marker": marker, "markersize": 4, "linestyle": line}


# A colour for each family, a marker for each member; dashed with a normalizer, dotted where noise is drawn.
STYLES = {
    "DDIM": _style(output.BLACK, "o"),
    "DEIS 1": _style(output.BLUE, "o"),
    "DEIS 2": _style(output.BLUE, "s"),
    "DEIS 3": _style(output.BLUE, "^"),
    "rho-AB 2": _style(output.SKY, "D"),
    "DEIS-SN 1": _style(output.VERMILION, "o", "--"),
    "DEIS-SN 2": _style(output.VERMILION, "s", "--"),
    "DEIS-SN 3": _style(output.VERMILION, "^", "--"),
    "tAB 3, even times": _style(output.GREEN, "v"),
    "tAB-SN 3, even times": _style(output.ORANGE, "v", "--"),
    "DPM-Solver++(2M)": _style(output.PURPLE, "P"),
    "PNDM": _style(output.SKY, "X"),
    "Heun": _style(output.PURPLE, "*"),
    "DDPM": _style(output.BLACK, "D", ":"),
    "EDM, churn": _style(output.PURPLE, "h", ":"),
}


@dataclass(frozen=True)
class Plan:
    """How much there is of everything."""

    evaluations: tuple[int, ...] = (5, 10, 20, 50)  # with SEEN_AT among them
    repeats: int = 5  # sets of samples, for error bars
    samples: int = 1000  # in each
    shown: int = 8  # of them in pictures
    collected: int = 200  # levels of a network's normalizer
    averaged: int = 4000  # samples of the mixture's own
    fine: int = 400  # steps of the reference

    @property
    def parts(self) -> int:
        """Of the work: every sampler, and the reference, of each model."""
        return 2 * (len(WAYS) + 1)


FULL = Plan()
QUICK = Plan(evaluations=(5, 10, 20), repeats=2, samples=50, collected=30, averaged=100, fine=50)


def measure(plan: Plan, truth: Truth, advance: Callable[[str], None]) -> dict[str, Any]:
    """Distances of samples from the mixture, and from the ends of the exact flow, of both models."""
    repeats, count = plan.repeats, plan.samples
    start = truth.prior.diffuse(1.0, RHO[1]).sample(repeats * count, seed=5)
    fresh = [truth.prior.sample(count, seed=100 + k).numpy() for k in range(2 * repeats)]
    models = {"mixture": (truth.prior, _exact_normalizer(plan, truth), start), "network": _network(plan, truth, start)}
    found = {
        name: _model(plan, model, n, x, truth.prior, fresh[:repeats], advance) for name, (model, n, x) in models.items()
    }
    plain = {n: options for n, options in DETERMINISTIC.items() if not {"normalizer", "spacing"} & set(options)}
    floor = _distances(truth.prior, np.concatenate(fresh[repeats:]), fresh[:repeats])
    return {"rho": [RHO[1], RHO[0]], "floor": floor, "models": found, "orders": orders.measure(plain)}


def _exact_normalizer(plan: Plan, truth: Truth) -> Normalizer:
    levels = noise_levels(RHO[1], RHO[0], 40, "log")
    return normalizer_of_prior(truth.prior, levels, samples=plan.averaged, seed=6)


def _network(plan: Plan, truth: Truth, start: Tensor) -> tuple[Model, Normalizer, Tensor]:
    """The network, in its own precision, with its normalizer from the cache."""
    x, trained = start.to(torch.float32), training_plan(truth.quick).steps
    name = f"digits-normalizer-{trained}-{plan.collected}.safetensors"
    levels = noise_levels(RHO[1], RHO[0], plan.collected, "log")
    return truth.network, network_normalizer(truth.network, x, levels, cache=truth.cache / name), x


def _model(
    plan: Plan,
    model: Model,
    n: Normalizer,
    x: Tensor,
    prior: GaussianMixture,
    fresh: list[Any],
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Every sampler at every number of evaluations, from the same noise."""
    exact = sample(model, None, x, solver="heun", steps=plan.fine, start=RHO[1], end=RHO[0]).x.double().numpy()
    advance("reference")
    rows: dict[str, Any] = {"reference": _distances(prior, exact, fresh)}
    for name, options in WAYS.items():
        own = {key: value for key, value in options.items() if key != "spacing"}
        own |= {"normalizer": n} if "normalizer" in options else {}
        own |= {"seed": 7} if name in STOCHASTIC else {}
        rows[name] = {}
        for evaluations in plan.evaluations:
            levels = _levels(options.get("spacing", "edm"), _steps(options["solver"], evaluations))
            found = sample(model, None, x, steps=levels, **own)
            ends = found.x.double().numpy()
            flow = {} if name in STOCHASTIC else {"off the flow": _spread(_off(ends, exact, len(fresh)))}
            seen = {"pictures": [_picture(end) for end in ends[: plan.shown]]} if evaluations == SEEN_AT else {}
            rows[name][str(evaluations)] = {
                "evaluations": found.evaluations,
                **_distances(prior, ends, fresh),
                **flow,
                **seen,
            }
        advance(name)
    return rows


def _steps(solver: str, evaluations: int) -> int:
    """Steps that take no more evaluations: Heun's take two, the last one apart, PNDM's first two."""
    if solver == "heun":
        return (evaluations + 1) // 2
    return evaluations - 1 if solver == "pndm" else evaluations


def _levels(spacing: Spacing, steps: int) -> tuple[float, ...]:
    """The grid of a run: the last step goes from the lowest level to 0."""
    schedule = TIMES if spacing == "time" else None
    return (*noise_levels(RHO[1], RHO[0], steps - 1, spacing, schedule), 0.0)


def _distances(prior: GaussianMixture, ends: Any, fresh: list[Any]) -> dict[str, list[float]]:
    """Frechet distance to the mixture's moments, and energy distance to fresh samples, of sets: mean and error."""
    sets = np.split(ends, len(fresh))
    wanted = moments(prior)
    frechet = [frechet_distance(part.mean(axis=0), np.cov(part.T), *wanted) for part in sets]
    return {
        "Frechet": _spread(frechet),
        "energy": _spread([energy_distance(part, other) for part, other in zip(sets, fresh, strict=True)]),
    }


def moments(prior: GaussianMixture) -> tuple[Any, Any]:
    """Mean and covariance of the data: where noise hides everything, the posterior is the prior."""
    x = torch.zeros((1, prior.dim), dtype=prior.dtype)
    q = prior.diffuse(1.0, FAR)
    return q.posterior_mean(x)[0].numpy(), q.fisher(x).posterior_covariance().to_dense()[0].numpy()


def frechet_distance(mean: Any, covariance: Any, other_mean: Any, other: Any) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), what FID is in the features of a network (Heusel et al. 2017)."""
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other).real, 0.0, None))  # of a product of two such matrices
    return float(np.square(mean - other_mean).sum() + np.trace(covariance + other) - 2.0 * roots.sum())


def energy_distance(x: Any, y: Any) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 where the laws are one (Szekely and Rizzo 2013), from two sets of points.

    Pairs of a point with itself are left out, so that its mean is the distance however few points there are: exact
    samples are 0 away, to within the error. W2 between sets in 64 dimensions is mostly their finite number: samples
    that vary too little come out nearer than exact ones.
    """
    return float(2.0 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean())


def _off(ends: Any, exact: Any, sets: int) -> list[float]:
    """Root mean square distance, for each set, from where the model's own flow ends."""
    return [float(np.sqrt(np.square(part).sum(axis=1).mean())) for part in np.split(ends - exact, sets)]


def _picture(end: Any) -> str:
    """Pixels of one sample, in [-1, 1], as hexadecimal bytes."""
    return np.clip(127.5 * (end + 1.0), 0.0, 255.0).astype(np.uint8).tobytes().hex()


def _spread(values: Sequence[float]) -> list[float]:
    """Mean and standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]


LABELS = {
    "off the flow": "root mean square distance\nfrom the end of its own flow",
    "Frechet": "Frechet distance from the mixture",
}
CROWDED = 5.0  # Frechet distance beyond which a curve is not worth the room of the others


def tables(result: dict[str, Any]) -> list[output.Table]:
    """One for each model and measure, and the orders: a row for each sampler."""
    measures = ("off the flow", "Frechet", "energy")
    found = [_table(result, model, measure) for model in result["models"] for measure in measures]
    return [*found, orders.table(result["orders"])]


def _table(result: dict[str, Any], model: str, measure: str) -> output.Table:
    rows, asked = result["models"][model], result["settings"]
    counts = asked["evaluations"]
    what = {
        "off the flow": "Root mean square distance from the end of the model's own flow",
        "Frechet": "Frechet distance from the mixture",
        "energy": "Energy distance to as many fresh samples, unbiased",
    }[measure]
    beside = ""
    if measure in result["floor"]:
        floor, flow = _cell(result["floor"][measure]), _cell(rows["reference"][measure])
        beside = f"; of exact samples of the mixture {floor}, of the end of the flow {flow}"
    title = f"{what}, by {model}, {asked['repeats']} sets of {asked['samples']} samples{beside}"
    names = [name for name in WAYS if measure in rows[name][str(SEEN_AT)]]
    title += _counts(rows, names, counts) + (f"; {CHURN}" if "EDM, churn" in names else "")
    columns = ("sampler", *(f"{n} evaluations" for n in counts))
    return output.Table(title, columns, [(n, *(_cell(rows[n][str(e)][measure]) for e in counts)) for n in names])


CHURN = f"EDM with S_churn = {STOCHASTIC['EDM, churn']['churn'].amount:g}, not tuned"


def _cell(value: Sequence[float]) -> str:
    return f"{value[0]:.3g} ± {value[1]:.1g}"


def _counts(rows: dict[str, Any], names: Sequence[str], asked: Sequence[int]) -> str:
    """Who takes another number of evaluations than its column says."""
    found = []
    for name in names:
        counts = [rows[name][str(n)]["evaluations"] for n in asked]
        if counts != list(asked):
            found.append(f"{name} {', '.join(str(n) for n in counts)}")
    return f"; evaluations of {'; '.join(found)}" if found else ""


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    found = [_nearest(model, rows) for model, rows in result["models"].items()]
    orders_found = ", ".join(f"{row['order']:.2f} {name}" for name, row in result["orders"].items())
    return f"{' '.join(found)} Orders of convergence measured on Gaussians: {orders_found}."


def _nearest(model: str, rows: dict[str, Any]) -> str:
    off = {name: rows[name][str(SEEN_AT)]["off the flow"] for name in DETERMINISTIC}
    best = min(off, key=lambda name: off[name][0])
    return (
        f"With {SEEN_AT} evaluations of the {model}, {best} ends nearest to the end of its flow, {_cell(off[best])} "
        f"off, where DDIM is {_cell(off['DDIM'])} off."
    )


def figure(result: dict[str, Any]) -> Any:
    """Distances against evaluations, one panel for each model and measure, and samples of the network."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(17.0, 7.0), layout="constrained")
    parts: Any = drawn.subfigures(1, 3, width_ratios=(3.0, 1.5, 1.8))
    curves, rest, grid = parts
    measures = ("off the flow", "Frechet")
    panels = curves.subplots(2, len(measures), sharex=True)
    orders.draw(rest.subplots(), result["orders"], STYLES)
    for row, (model, found) in zip(panels, result["models"].items(), strict=True):
        for axes, measure in zip(row, measures, strict=True):
            _panel(axes, found, measure, result["settings"]["evaluations"])
            axes.set_title(f"noise of the {model}")
            axes.set_ylabel(LABELS[measure])
            if measure in result["floor"]:
                axes.axhline(result["floor"][measure][0], color="0.6", linewidth=0.8, label="samples of the mixture")
                axes.set_ylim(top=CROWDED)
    for axes in panels[-1]:
        axes.set_xlabel("evaluations")
    handles, labels = panels[0, 1].get_legend_handles_labels()
    curves.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="x-small")
    _samples(grid, result["models"]["network"])
    return drawn


def _panel(axes: Any, found: dict[str, Any], measure: str, asked: Sequence[int]) -> None:
    for name in WAYS:
        if measure not in found[name][str(SEEN_AT)]:
            continue
        counts = [found[name][str(e)]["evaluations"] for e in asked]
        values, errors = zip(*(found[name][str(e)][measure] for e in asked), strict=True)
        axes.errorbar(counts, values, errors, label=name, **STYLES[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(asked, [str(e) for e in asked])
    axes.minorticks_off()


def _samples(drawn: Any, found: dict[str, Any]) -> None:
    """One row of pictures for each sampler, all from the same noise."""
    axes = drawn.subplots()
    rows = [[_pixels(text) for text in found[name][str(SEEN_AT)]["pictures"]] for name in WAYS]
    axes.imshow(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0), cmap="gray_r", vmin=0, vmax=255)
    side = rows[0][0].shape[0]
    axes.set_yticks(side * (np.arange(len(WAYS)) + 0.5) - 0.5, list(WAYS))
    axes.set_xticks([])
    axes.set_title(f"the network, {SEEN_AT} evaluations\none noise for each column", fontsize="medium")


def _pixels(text: str) -> Any:
    flat = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    side = int(np.sqrt(flat.size))
    return np.pad(flat.reshape(side, side), 1, constant_values=64)
