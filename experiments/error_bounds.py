"""Errors of the approximations beside their bounds, along the noise levels of point masses and of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dfmath.experiments import output

from dfmath import GaussianMixture, PointMasses, bounds
from dfmath.approximations import EndpointFisher, local_loss_trace, trace_matching
from dfmath.datasets import digits
from dfmath.samplers import sample
from dfmath.solvers import noise_levels

NOISE_ERROR, MOMENT_ERROR = 0.3, 0.05  # d2, the error of a noise; d1, that of a loss, or of a second moment by itself
END, STEPS = 0.02, 40  # noise at which samplers end, or half of that they start at; their steps
DROPPED, SEEN = 0.1, 1e-8  # most mass of components that are left out; least mass at which float64 sees them go
QUESTION = (
    "Do the bounds of [MATH 4] hold, and how much room do they leave? Networks are stood for by the exact posterior "
    "with errors of known size: in the worst direction for half of the states, in random ones for the other half. A "
    "bound that holds has a ratio of error to bound of at most 1 everywhere; one that is sharp comes near it. 4.8 is "
    f"tried where components of {DROPPED:g} of the mass, at most, hold enough of it to be seen leaving, {SEEN:g}; that "
    "of 4.9 is by the logits' own error, measured in float64, and not by one known before."
)
TITLES = {
    "4.2": "DF-TM, trace matching",
    "4.3": "trace from the local loss",
    "4.5": "DF-EA, endpoint",
    "4.8 mean": "of what is kept",
    "4.8 covariance": "of what is kept",
    "4.9": "weights, measured error of float32 logits",
    "4.9b": "F v in float32, certified",
}
UNITS = {
    "4.2": r"$\sigma^2\,|T-\mathrm{tr}F|\,/\,d$",
    "4.3": r"$\sigma^2\,|T-\mathrm{tr}F|\,/\,d$",
    "4.5": r"$\sigma^2\,|F_{EA}-F|_{HS}$",
    "4.8 mean": r"$|m-m_S|\,/\,D$",
    "4.8 covariance": r"$|P-P_S|\,/\,D^2$",
    "4.9": r"largest $|\log w'/w|$",
    "4.9b": r"$\sigma^2\,|\hat F v-Fv|\,/\,|v|$",
}
Pair = tuple[Any, Any]  # errors and bounds of all states, (n,) twice


@dataclass(frozen=True)
class Plan:
    """Noise levels, and states at each."""

    levels: int = 16
    states: int = 64
    components: int = 10
    single: bool = True  # also in float32, whose kernels are compiled at their first use
    rho_max: float = 80.0
    rho_min: float = 0.02
    seed: int = 0

    @property
    def parts(self) -> int:
        """Of the work."""
        return 2 * self.levels


FULL = Plan()
QUICK = Plan(levels=8, states=16, single=False)


@dataclass(frozen=True)
class State:
    """Noised states of a prior, and what is exactly known there (alpha = 1)."""

    prior: Any
    x: Any  # (n, d)
    rho: float
    random: Any  # unit vectors (n, d)

    @cached_property
    def fisher(self) -> Any:
        """F at the states."""
        return self.prior.diffuse(1.0, self.rho).fisher(self.x)

    @cached_property
    def mean(self) -> Any:
        """Posterior means."""
        return self.prior.diffuse(1.0, self.rho).posterior_mean(self.x)

    @cached_property
    def posterior_trace(self) -> Any:
        """tr P."""
        return self.fisher.posterior_covariance().trace()

    def network_mean(self) -> Any:
        """m_th of a network whose noise is off by NOISE_ERROR, along m, beyond it, for the first half of the states."""
        direction, half = self.random.copy(), len(self.x) // 2
        direction[:half] = (self.mean / _length(self.mean)[:, None])[:half]
        return self.mean + self.rho * NOISE_ERROR * direction


def measure(plan: Plan, advance: Callable[[str], None]) -> dict[str, Any]:
    """Errors and bounds at every level, of the digits and of a mixture that is fitted to them."""
    found: dict[str, Any] = {}
    for name, prior in _priors(plan).items():
        rows = []
        for k, rho in enumerate(np.geomspace(plan.rho_min, plan.rho_max, plan.levels).tolist()):
            tried = _tried(_state(prior, rho, plan.states, plan.seed + k), plan.single)
            rows.append({"rho": rho, "bounds": {number: _summary(*pair) for number, pair in tried}})
            advance(f"{name}, rho = {rho:.3g}")
        found[name] = rows
    return {"data": found}


def _priors(plan: Plan) -> dict[str, Any]:
    from sklearn.mixture import GaussianMixture as Fit

    fit = Fit(plan.components, covariance_type="full", reg_covar=1e-3, random_state=plan.seed).fit(digits())
    mixture = GaussianMixture(fit.means_, fit.covariances_, fit.weights_)
    return {"point masses": PointMasses(digits()), "mixture": mixture}


def _state(prior: Any, rho: float, count: int, seed: int) -> State:
    x = prior.diffuse(1.0, rho).sample(count, seed)
    random = np.random.default_rng(seed).standard_normal(x.shape)
    return State(prior, x, rho, random / _length(random)[:, None])


def _tried(state: State, single: bool) -> Iterator[tuple[str, Pair]]:
    """All bounds that have something to say of the prior."""
    yield "4.2", _trace_matching(state)
    yield "4.3", _local_loss(state)
    yield "4.5", _endpoint(state)
    if isinstance(state.prior, PointMasses):
        mean, covariance = _dropped(state)
        yield "4.8 mean", mean
        yield "4.8 covariance", covariance
        yield "4.9", _rounded_logits(state)
        if single:
            yield "4.9b", _certified(state)


def _signs(state: State) -> Any:
    """+1 for the first half of the states, a random sign for the others."""
    signs = np.sign(state.random[:, 0])
    signs[: len(signs) // 2] = 1.0
    return signs


def _trace_matching(state: State) -> Pair:
    """The second moment too small where the mean is too long: both errors push the same way [MATH 4.2]."""
    dim = state.x.shape[1]
    second = (state.posterior_trace + _length(state.mean) ** 2) / dim
    d1 = MOMENT_ERROR * second
    got = trace_matching(second - _signs(state) * d1, state.network_mean(), 1.0, state.rho)
    bound = bounds.trace_matching_error(d1, NOISE_ERROR, _length(state.mean), 1.0, state.rho, dim)
    unit = state.rho**2 / dim
    return unit * np.abs(got - state.fisher.trace()), unit * bound


def _local_loss(state: State) -> Pair:
    """The loss of a network that is off, itself predicted too large [MATH 4.3]."""
    dim, mean = state.x.shape[1], state.network_mean()
    loss = (state.posterior_trace + _length(state.mean - mean) ** 2) / state.rho**2
    got = local_loss_trace(loss + _signs(state) * dim * MOMENT_ERROR, state.rho, dim)
    bound = bounds.local_loss_error(MOMENT_ERROR, NOISE_ERROR, state.rho, dim)
    unit = state.rho**2 / dim
    return unit * np.abs(got - state.fisher.trace()), np.full(len(got), unit * bound)


def _endpoint(state: State) -> Pair:
    """From the end of a sampler; the proof needs no more of the support than this radius [MATH 4.5]."""
    levels = noise_levels(state.rho, min(END, state.rho / 2.0), STEPS, "log")
    end = sample(state.prior, None, state.x, solver="dpm++2m", steps=levels).x
    second = state.posterior_trace + _length(state.mean) ** 2
    radius = np.sqrt(np.maximum(_length(end) ** 2, second))
    claimed = EndpointFisher(end, state.network_mean(), 1.0, state.rho, "paper").to_dense()
    error = np.linalg.norm(claimed - state.fisher.to_dense(), axis=(1, 2))
    unit = state.rho**2
    return unit * error, unit * bounds.endpoint_error(radius, NOISE_ERROR, 1.0, state.rho)


def _dropped(state: State) -> tuple[Pair, Pair]:
    """Leave out the lightest components, a tenth of the mass at most; states where none can be seen are left out."""
    points = state.prior.points
    diameter = _diameter(points)
    rows = [row for w in _weights(state.x, points, state.rho) if (row := _dropped_row(w, points, diameter)) is not None]
    mean, mean_bound, covariance, covariance_bound = np.array(rows).reshape(-1, 4).T
    return (mean, mean_bound), (covariance, covariance_bound)


def _dropped_row(w: Any, points: Any, diameter: float) -> tuple[float, ...] | None:
    order = np.argsort(w)
    left = order[: int(np.searchsorted(np.cumsum(w[order]), DROPPED))]
    delta = float(w[left].sum())
    if delta < SEEN:
        return None
    kept = w.copy()
    kept[left] = 0.0
    (m, p), (m_s, p_s) = (_moments(v / v.sum(), points) for v in (w, kept))
    mean_bound, covariance_bound = bounds.dropped_components(delta, diameter)
    error = float(np.linalg.norm(m - m_s)), float(np.linalg.norm(p - p_s, 2))
    return error[0] / diameter, mean_bound / diameter, error[1] / diameter**2, covariance_bound / diameter**2


def _moments(w: Any, points: Any) -> tuple[Any, Any]:
    mean = w @ points
    centred = points - mean
    return mean, (centred * w[:, None]).T @ centred


def _diameter(points: Any) -> float:
    from scipy.spatial.distance import pdist

    return float(pdist(points).max())


def _weights(x: Any, points: Any, rho: float) -> Any:
    """Posterior weights of points of equal weight, (n, N), from differences."""
    return _softmax(_logits(x, points, rho))


def _logits(x: Any, points: Any, rho: float) -> Any:
    from scipy.spatial.distance import cdist

    return -cdist(x, points, "sqeuclidean") / (2.0 * rho**2)


def _softmax(logits: Any) -> Any:
    raw = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raw / raw.sum(axis=1, keepdims=True)


def _rounded_logits(state: State) -> Pair:
    """Weights from |x|^2 - 2 x.y + |y|^2 in float32, as most code has them, beside those from differences [MATH 4.9].

    A common shift of the logits changes no weight, so their error counts from the middle of its range.
    """
    points = state.prior.points
    exact, (x, y) = _logits(state.x, points, state.rho), (part.astype(np.float32) for part in (state.x, points))
    expanded = (x**2).sum(axis=1)[:, None] - 2.0 * x @ y.T + (y**2).sum(axis=1)
    rounded = (-expanded / np.float32(2.0 * state.rho**2)).astype(np.float64)
    off = rounded - exact
    bound = 0.5 * (off.max(axis=1) - off.min(axis=1))
    moved = np.abs(_log_softmax(rounded) - _log_softmax(exact)).max(axis=1)
    return moved, np.log(bounds.weight_factor(np.minimum(bound, 300.0))) * np.maximum(bound / 300.0, 1.0)


def _log_softmax(logits: Any) -> Any:
    from scipy.special import log_softmax

    return log_softmax(logits, axis=1)


def _certified(state: State) -> Pair:
    """F v of a float32 prior beside that of the same numbers in float64, and what it says of itself [MATH 4.9b]."""
    points = state.prior.points.astype(np.float32)
    x, v = state.x.astype(np.float32), state.random.astype(np.float32)
    single = PointMasses(points).diffuse(1.0, state.rho).fisher(x)
    exact = PointMasses(points.astype(np.float64)).diffuse(1.0, state.rho).fisher(x.astype(np.float64))
    wanted, size = exact.matvec(v.astype(np.float64)), _length(v)
    unit, rounding = state.rho**2, float(np.finfo(np.float32).eps) * _length(wanted)  # of the result to its dtype
    error = _length(single.matvec(v).astype(np.float64) - wanted)
    return unit * error / size, unit * (single.error_bound().astype(np.float64) + rounding / size)


def _length(vectors: Any) -> Any:
    return np.linalg.norm(vectors, axis=1)


def _summary(error: Any, bound: Any) -> dict[str, float] | None:
    """Medians, ratios and number of the states; None where there are none."""
    if len(error) == 0:
        return None
    ratio = error / bound
    found = {
        "error": np.median(error),
        "bound": np.median(bound),
        "ratio": ratio.max(),
        "median ratio": np.median(ratio),
        "states": len(error),
    }
    return {name: float(value) for name, value in found.items()}


def _rows(result: dict[str, Any], data: str, number: str) -> list[dict[str, float]]:
    """Levels at which a bound was tried, with their rho."""
    pairs = [(level["rho"], level["bounds"].get(number)) for level in result["data"][data]]
    return [{"rho": rho, **row} for rho, row in pairs if isinstance(row, dict)]


def tables(result: dict[str, Any]) -> list[output.Table]:
    """Largest ratios by level, and medians of errors and bounds."""
    return [table(result, data) for data in result["data"] for table in (_ratios, _medians)]


def _numbers(result: dict[str, Any], data: str) -> list[str]:
    return [number for number in TITLES if _rows(result, data, number)]


def _ratios(result: dict[str, Any], data: str) -> output.Table:
    states = result["settings"]["states"]
    title = f"Largest error over its bound, {data}, {states} states at each level; in brackets where fewer were tried"
    return _table(result, data, title, lambda row: _counted(row, states))


def _counted(row: dict[str, float], states: int) -> str:
    few = "" if row["states"] == states else f" ({row['states']:.0f})"
    return f"{row['ratio']:.3g}{few}"


def _medians(result: dict[str, Any], data: str) -> output.Table:
    title = f"Median error (median bound), {data}, in the units of the figure"
    return _table(result, data, title, lambda row: f"{row['error']:.2g} ({row['bound']:.2g})")


def _table(result: dict[str, Any], data: str, title: str, cell: Callable[[Any], Any]) -> output.Table:
    numbers = _numbers(result, data)
    by_rho = {n: {row["rho"]: cell(row) for row in _rows(result, data, n)} for n in numbers}
    rows = [
        (level["rho"], *(by_rho[n].get(level["rho"], "no state") for n in numbers)) for level in result["data"][data]
    ]
    return output.Table(title, ("rho", *(f"{n} {TITLES[n]}" for n in numbers)), rows)


def seen(result: dict[str, Any]) -> str:
    """Say what the numbers say."""
    ratios = {
        number: max(row["ratio"] for data in result["data"] for row in _rows(result, data, number))
        for number in TITLES
        if any(_rows(result, data, number) for data in result["data"])
    }
    broken = [number for number, ratio in ratios.items() if ratio > 1.0 + 1e-6]
    verdict = f"{', '.join(broken)} failed" if broken else f"All {len(ratios)} bounds hold wherever they were tried"
    said = "; ".join(f"{ratio:.3g} for {number} ({TITLES[number]})" for number, ratio in ratios.items())
    return f"{verdict}. {_tried_at(result)}The largest ratio of error to bound is {said}."


def _tried_at(result: dict[str, Any]) -> str:
    """Which bounds were not tried at every state, and at how many they were."""
    asked = result["settings"]["levels"] * result["settings"]["states"]
    found = []
    for data in result["data"]:
        for number in _numbers(result, data):
            count = sum(row["states"] for row in _rows(result, data, number))
            if count < asked:
                found.append(f"{number} at {count:.0f} of the {asked} states of {data}")
    return f"Not tried everywhere: {', '.join(found)}. " if found else ""


def figure(result: dict[str, Any]) -> Any:
    """Errors and bounds, a panel for each bound, and the ratios of all."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14.0, 6.6), layout="constrained")
    panels = drawn.subplots(2, 4).ravel()
    for axes, number in zip(panels, TITLES, strict=False):
        if any(_rows(result, data, number) for data in result["data"]):
            _panel(axes, result, number)
        else:
            axes.set_axis_off()
    _draw_ratios(panels[-1], result)
    for axes in panels[4:]:
        axes.set_xlabel(r"noise-to-signal ratio $\rho$")
    lines = [*panels[0].get_legend_handles_labels()[0], *panels[-1].get_legend_handles_labels()[0]]
    drawn.legend(handles=lines, loc="outside lower center", ncols=6, fontsize="small")
    return drawn


def _panel(axes: Any, result: dict[str, Any], number: str) -> None:
    for data, colour in zip(result["data"], output.COLOURS, strict=False):
        rows = _rows(result, data, number)
        rho = [row["rho"] for row in rows]
        axes.loglog(rho, [row["error"] for row in rows], "o-", color=colour, markersize=3, label=f"error, {data}")
        axes.loglog(rho, [row["bound"] for row in rows], "--", color=colour, label=f"bound, {data}")
    axes.set(title=f"{number} {TITLES[number]}", ylabel=UNITS[number], xlim=_span(result))
    low, high = axes.get_ylim()
    if high < 10.0 * low:  # what hardly changes is drawn as such
        axes.set_ylim(low / 10.0, high * 10.0)
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.25)


def _span(result: dict[str, Any]) -> tuple[float, float]:
    asked = result["settings"]
    return asked["rho_min"] / 1.3, asked["rho_max"] * 1.3


def _draw_ratios(axes: Any, result: dict[str, Any]) -> None:
    widths = np.linspace(4.5, 1.5, len(TITLES))  # those that coincide at 1 show inside each other
    for number, colour, width in zip(TITLES, output.COLOURS, widths, strict=False):
        for data, style in zip(result["data"], ("-", ":"), strict=True):
            rows = _rows(result, data, number)
            label = f"ratio of {number}" if rows and style == "-" else None
            rho, ratio = ([row[key] for row in rows] for key in ("rho", "ratio"))
            axes.loglog(rho, ratio, style, color=colour, linewidth=width, label=label)
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set(title="largest error/bound (dotted: mixture)", ylabel="error / bound", xlim=_span(result))
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.25)
