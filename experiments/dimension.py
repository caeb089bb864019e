"""Intrinsic dimension from the trace of F, on sets whose dimension is known and on real data, beside neighbours'."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from dfmath.backends._compat import to_numpy
from dfmath.benchmarks.workloads import patches
from dfmath.experiments import output

from dfmath import PointMasses
from dfmath.datasets import digits

QUESTION = (
    "How many dimensions do data have, seen at a scale rho? d - rho^2 tr F = tr P/rho^2 [MATH 1.2], whose mean is the "
    "mmse over the noise's variance [MATH 1.9]. Its limit at low noise is the information dimension of the law that "
    "data come from (Wu and Verdú, MMSE dimension, IEEE Trans. Inf. Theory 57, 2011). Finitely many points have "
    "dimension 0 in that limit: below their distances the curve falls, so its largest value is read. Sets of as many "
    "points whose law is known, drawn several times, show how far that is from the truth, and the maximum-likelihood "
    "estimate from distances of neighbours (Levina and Bickel, NIPS 2004; averaged as MacKay and Ghahramani, 2005) is "
    "computed apart from it."
)


@dataclass(frozen=True)
class Plan:
    """Noise levels, draws at each, the dimensions of the synthetic sets, and neighbours."""

    levels: int = 25
    draws: int = 512
    known: tuple[int, ...] = (2, 5, 10)
    sets: int = 6  # of each known dimension
    ambient: int = 64
    points: int = 1797
    patches: int = 20_000
    side: int = 8
    neighbours: tuple[int, int] = (10, 20)
    rho_max: float = 10.0
    rho_min: float = 0.01
    seed: int = 0

    @property
    def parts(self) -> int:
        """Of the work."""
        return (len(self.known) * self.sets + 2) * (self.levels + 1)


FULL = Plan()
QUICK = Plan(levels=13, draws=128, sets=2, patches=2_000, side=4)


def measure(plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Curves and neighbours' estimates of all sets, and of the synthetic ones the exact curve of their law."""
    rhos = np.geomspace(plan.rho_max, plan.rho_min, plan.levels).tolist()
    found = {}
    for k in plan.known:
        name = f"{k} dimensions"
        drawn = [_one(name, flat(k, plan, seed), rhos, plan, seed, advance) for seed in _seeds(plan)]
        exact = {"dimension": k, "curve": [shrinkage(k, rho) for rho in rhos]}
        found[name] = _over_sets(drawn) | {"exact": exact}
    for name, points in (("digits", digits()), ("patches", patches(plan.patches, side=plan.side).astype(np.float64))):
        found[name] = _one(name, points, rhos, plan, plan.seed, advance)
    return {"sets": found}


def _seeds(plan: Plan) -> range:
    return range(plan.seed, plan.seed + plan.sets)


def _one(
    name: str, points: Any, rhos: list[float], plan: Plan, seed: int, advance: Callable[[str], None]
) -> dict[str, Any]:
    """Curve and neighbours' estimate of one set."""
    rows = [_level(points, rho, plan, seed, partial(advance, f"{name}, rho = {rho:.3g}")) for rho in rhos]
    neighbours = levina_bickel(points, *plan.neighbours)
    advance(f"{name}, neighbours")
    return {"shape": list(points.shape), "sets": 1, "levels": rows, "neighbours": neighbours}


def _over_sets(drawn: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sets with standard errors, in which draws and sets both vary."""
    levels = []
    for rows in zip(*(one["levels"] for one in drawn), strict=True):
        mean, error = _mean(np.array([row["mean"] for row in rows]))
        levels.append({"rho": rows[0]["rho"], "mean": mean, "error": error})
    neighbours, error = _mean(np.array([one["neighbours"] for one in drawn]))
    about = {"shape": drawn[0]["shape"], "sets": len(drawn), "levels": levels}
    return about | {"neighbours": neighbours, "neighbours error": error}


def _mean(values: Any) -> tuple[float, float]:
    """Mean and standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def flat(k: int, plan: Plan, seed: int) -> Any:
    """Draw points of the standard normal law in a random subspace of k dimensions, (n, d)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((plan.ambient, k)))[0]
    found: Any = rng.standard_normal((plan.points, k)) @ basis.T
    return found


def shrinkage(k: int, rho: float) -> float:
    """tr P/rho^2 of N(0, I) in k dimensions [MATH 2.5, 4.6b], which tends to k."""
    return k / (1.0 + rho**2)


def _level(points: Any, rho: float, plan: Plan, seed: int, advance: Callable[[], None]) -> dict[str, float]:
    """Mean of d - rho^2 tr F over draws from q, and its error: as tr P/rho^2, which loses no digits at low noise."""
    q = PointMasses(points).diffuse(1.0, rho)
    x = q.sample(plan.draws, seed)
    mean, error = _mean(to_numpy(q.fisher(x).posterior_covariance().trace()) / rho**2)
    advance()
    return {"rho": rho, "mean": mean, "error": error}


def levina_bickel(points: Any, fewest: int, most: int) -> float:
    r"""Return the maximum-likelihood dimension from distances T_j to the j-th neighbours.

    .. math:: \hat m_k^{-1} = \frac{1}{n (k - 1)} \sum_x \sum_{j < k} \log \frac{T_k(x)}{T_j(x)}

    (Levina and Bickel 2004, averaged over x in the inverse), in the mean over k from `fewest` to `most`. Copies of a
    point are left out: they have no distance.
    """
    from sklearn.neighbors import NearestNeighbors

    distinct = np.unique(points, axis=0)
    logs = np.log(NearestNeighbors(n_neighbors=most + 1).fit(distinct).kneighbors(distinct)[0][:, 1:])
    inverse = [(logs[:, k - 1 : k] - logs[:, : k - 1]).mean() for k in range(fewest, most + 1)]
    return float((1.0 / np.array(inverse)).mean())


def _largest(found: dict[str, Any]) -> dict[str, float]:
    best: dict[str, float] = max(found["levels"], key=lambda row: row["mean"])
    return best


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Estimates of all sets, and the curves."""
    low, high = result["settings"]["neighbours"]
    summary = output.Table(
        f"Dimension: the largest d - rho^2 tr F, and Levina and Bickel's from {low} to {high} neighbours; ± standard "
        "error, over the sets where there are several, of the draws alone where there is one",
        (
            "set",
            "points",
            "d",
            "sets",
            "dimension",
            "largest d - rho^2 tr F",
            "at rho",
            "its law's there",
            "from neighbours",
        ),
        [_summary(name, found) for name, found in result["sets"].items()],
    )
    names = list(result["sets"])
    rows = [_curve_row(result, i) for i in range(result["settings"]["levels"])]
    draws = result["settings"]["draws"]
    title = (
        f"d - rho^2 tr F, means over {draws} draws from each set at each level; for the synthetic sets also that of "
        "their law, exact"
    )
    return [summary, output.Table(title, ("rho", *(c for name in names for c in _columns(name, result))), rows)]


def _summary(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
    best, exact = _largest(found), found.get("exact")
    known = ("unknown", "") if exact is None else (exact["dimension"], exact["curve"][found["levels"].index(best)])
    value = f"{best['mean']:.2f} ± {best['error']:.2f}"
    neighbours = f"{found['neighbours']:.2f}"
    if "neighbours error" in found:
        neighbours += f" ± {found['neighbours error']:.2f}"
    return (name, *found["shape"], found["sets"], known[0], value, best["rho"], known[1], neighbours)


def _columns(name: str, result: dict[str, Any]) -> list[str]:
    return [name, "its law"] if "exact" in result["sets"][name] else [name]


def _curve_row(result: dict[str, Any], i: int) -> list[float]:
    row = [next(iter(result["sets"].values()))["levels"][i]["rho"]]
    for found in result["sets"].values():
        row += [found["levels"][i]["mean"], *([found["exact"]["curve"][i]] if "exact" in found else [])]
    return row


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    known = {name: found for name, found in result["sets"].items() if "exact" in found}
    parts = [
        f"{_largest(found)['mean']:.1f} for {found['exact']['dimension']} (neighbours {found['neighbours']:.1f})"
        for found in known.values()
    ]
    unknown = [
        f"{name} {_largest(found)['mean']:.1f} at rho = {_largest(found)['rho']:.2g} (neighbours "
        f"{found['neighbours']:.1f})"
        for name, found in result["sets"].items()
        if "exact" not in found
    ]
    short = [1.0 - found["exact"]["curve"][-1] / found["exact"]["dimension"] for found in known.values()]
    return (
        f"Of sets of {result['settings']['points']} points of known dimension the largest d - rho^2 tr F is "
        f"{', '.join(parts)}, while the exact curves of their laws come within {max(short):.2%} of the dimension at "
        "the lowest noise: what is missing, the number of points is too small for, the more so in more dimensions. Of "
        f"real data: {'; '.join(unknown)}; by what the known sets show, these are lower bounds rather than dimensions."
    )


def _label(name: str, found: dict[str, Any]) -> str:
    several = f"{found['sets']} sets of " if found["sets"] > 1 else ""
    return f"{name}, {several}{found['shape'][0]} points"


COLOURS = {"digits": output.PURPLE, "patches": output.BLACK}
KNOWN = (output.BLUE, output.GREEN, output.VERMILION, output.ORANGE, output.SKY)


def _colours(names: Iterable[str]) -> list[str]:
    """Real data have colours of their own, the synthetic sets take turns."""
    turns = cycle(KNOWN)
    return [COLOURS[name] if name in COLOURS else next(turns) for name in names]


def figure(result: dict[str, Any]) -> Any:
    """Curves against the noise level: synthetic sets with their laws, and real data, with neighbours' estimates."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11.5, 5.0), layout="constrained")
    known, real = drawn.subplots(1, 2)
    for colour, (name, found) in zip(_colours(result["sets"]), result["sets"].items(), strict=True):
        axes = known if "exact" in found else real
        rho = [row["rho"] for row in found["levels"]]
        mean, error = (np.array([row[key] for row in found["levels"]]) for key in ("mean", "error"))
        axes.errorbar(rho, mean, 2.0 * error, color=colour, marker="o", markersize=3, label=_label(name, found))
        axes.axhline(found["neighbours"], color=colour, linestyle=":", linewidth=1.2)
        if "exact" in found:
            axes.plot(rho, found["exact"]["curve"], "--", color=colour)
    known.plot([], [], "--", color="0.4", label="exact, of their law")
    real.plot([], [], ":", color="0.4", label="from neighbours' distances")
    for axes, title in ((known, "Known dimension"), (real, "Real data")):
        axes.set(xscale="log", title=title, xlabel=r"noise-to-signal ratio $\rho$", ylabel=r"$d-\rho^2\,\mathrm{tr}F$")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25)
    drawn.legend(fontsize="small", loc="outside lower center", ncols=4)
    return drawn
