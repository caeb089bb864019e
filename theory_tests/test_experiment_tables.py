"""Made-up results whose numbers all differ: tables, sentences and figures have each of them in its place."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from dfmath.experiments import (
    adjoint,
    dimension,
    error_bounds,
    nll,
    orders,
    ot_table,
    output,
    samplers,
    schedules,
    spectrum,
    trace_error,
)


@pytest.fixture
def new():
    """Numbers of three digits, each another: 0.101, 0.102 and so on."""
    numbers = itertools.count(101)
    return lambda count=None: next(numbers) / 1000 if count is None else [next(numbers) / 1000 for _ in range(count)]


def text(value):
    return output._text(value)


def rows(table):
    """Texts of all cells by column, row by row."""
    return [dict(zip(table.columns, (text(value) for value in row), strict=True)) for row in table.rows]


def curves(axes):
    """Points of all curves by label; of error bars, too."""
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    for bars in axes.containers:
        if hasattr(bars, "has_yerr"):
            found[bars.get_label()] = bars.lines[0].get_xydata().tolist()
    return found


def points(x, y):
    return [list(pair) for pair in zip(x, y, strict=True)]


# --- spectrum ---


def profile(rho, new):
    values = {"quantiles": new(5), "quantile_errors": new(5), "trace": new(), "trace_error": new()}
    return {"rho": rho, **values, "effective_rank": new(), "effective_rank_error": new(), "ranked": round(1000 * new())}


@pytest.fixture
def spectra(new):
    data = {
        name: {"shape": [7, 3], "levels": [profile(rho, new) for rho in (4.0, 0.5)]} for name in ("digits", "patches")
    }
    return {"settings": {"draws": 12}, "data": data}


def test_spectra_in_their_tables(spectra):
    names = ("smallest", "25%", "50%", "75%", "largest")
    for table, found in zip(spectrum.tables(spectra), spectra["data"].values(), strict=True):
        for row, level in zip(rows(table), found["levels"], strict=True):
            assert row["rho^2 tr F/d"] == f"{level['trace']:.3f} ± {level['trace_error']:.1g}"
            assert row["effective rank of P"] == f"{level['effective_rank']:.3g} ± {level['effective_rank_error']:.1g}"
            assert row["of draws"] == str(level["ranked"])
            for k, name in enumerate(names):
                assert row[name] == f"{level['quantiles'][k]:.3f} ± {level['quantile_errors'][k]:.1g}"


def test_spectra_in_their_figure(spectra):
    """Each curve is of its own quantile, and in the legend under its name."""
    drawn = spectrum.figure(spectra)
    for (left, right), found in zip(np.reshape(drawn.axes, (2, 2)), spectra["data"].values(), strict=True):
        levels, got = found["levels"], curves(left)
        for k, name in enumerate(("smallest", "25%", "50%", "75%", "largest")):
            assert got[name] == points([4.0, 0.5], [level["quantiles"][k] for level in levels])
        (bars,) = right.containers
        assert bars.lines[0].get_xydata().tolist() == points([4.0, 0.5], [level["effective_rank"] for level in levels])


# --- dimension ---


@pytest.fixture
def dimensions(new):
    def levels():
        return [{"rho": rho, "mean": new(), "error": new()} for rho in (4.0, 0.5)]

    known = {"shape": [50, 64], "sets": 3, "levels": levels(), "neighbours": new(), "neighbours error": new()}
    known["exact"] = {"dimension": 4, "curve": new(2)}
    real = {"shape": [60, 64], "sets": 1, "levels": levels(), "neighbours": new()}
    settings = {"points": 50, "neighbours": [10, 20], "levels": 2, "draws": 9}
    return {"settings": settings, "sets": {"4 dimensions": known, "digits": real}}


def test_dimensions_in_their_tables_and_figure(dimensions):
    summary, curve = (rows(table) for table in dimension.tables(dimensions))
    known, real = dimensions["sets"].values()
    for row, found in zip(summary, (known, real), strict=True):
        top = found["levels"][1]  # numbers rise
        assert row["largest d - rho^2 tr F"] == f"{top['mean']:.2f} ± {top['error']:.2f}"
        assert row["at rho"] == "0.5" and row["sets"] == str(found["sets"])
    assert summary[0]["from neighbours"] == f"{known['neighbours']:.2f} ± {known['neighbours error']:.2f}"
    assert summary[1]["from neighbours"] == f"{real['neighbours']:.2f}"
    assert summary[0]["its law's there"] == text(known["exact"]["curve"][1])
    for k, row in enumerate(curve):
        wanted = (known["levels"][k]["mean"], known["exact"]["curve"][k], real["levels"][k]["mean"])
        assert [row["4 dimensions"], row["its law"], row["digits"]] == [text(value) for value in wanted]
    left, right = (curves(axes) for axes in dimension.figure(dimensions).axes)
    assert left["4 dimensions, 3 sets of 50 points"] == points([4.0, 0.5], [row["mean"] for row in known["levels"]])
    assert right["digits, 60 points"] == points([4.0, 0.5], [row["mean"] for row in real["levels"]])


# --- bounds ---


def test_bounds_in_their_tables_sentences_and_figure(new):
    keys = ("error", "bound", "ratio", "median ratio")
    few = {"point masses": error_bounds.TITLES, "mixture": ("4.2", "4.3", "4.5")}
    data = {
        name: [
            {"rho": rho, "bounds": {n: dict(zip(keys, new(4), strict=True)) | {"states": 8} for n in numbers}}
            for rho in (0.5, 4.0)
        ]
        for name, numbers in few.items()
    }
    data["point masses"][0]["bounds"]["4.8 mean"]["states"] = 5
    data["point masses"][0]["bounds"]["4.8 covariance"] = None
    result = {"settings": dataclasses.asdict(error_bounds.Plan(levels=2, states=8)), "data": data}
    tables = error_bounds.tables(result)
    for (ratios, medians), (name, numbers) in zip(np.reshape(tables, (-1, 2)), few.items(), strict=True):
        for level, row, row_of_medians in zip(data[name], rows(ratios), rows(medians), strict=True):
            for n in numbers:
                column, found = f"{n} {error_bounds.TITLES[n]}", level["bounds"][n]
                if found is None:
                    assert row[column] == row_of_medians[column] == "no state"
                    continue
                assert row[column] == text(found["ratio"]) + (" (5)" if found["states"] == 5 else "")
                assert row_of_medians[column] == f"{found['error']:.2g} ({found['bound']:.2g})"
    said = error_bounds.seen(result)
    assert "4.8 mean at 13 of the 16 states of point masses, 4.8 covariance at 8 of the 16" in said
    for n in error_bounds.TITLES:
        ratios = [found["ratio"] for levels in data.values() for level in levels if (found := level["bounds"].get(n))]
        assert f"{max(ratios):.3g} for {n} " in said
    drawn = error_bounds.figure(result).axes
    for axes, n in zip(drawn, error_bounds.TITLES, strict=False):
        for name, levels in data.items():
            of = [(level["rho"], level["bounds"][n]) for level in levels if level["bounds"].get(n)]
            for key in ("error", "bound") if of else ():
                assert curves(axes)[f"{key}, {name}"] == [[rho, found[key]] for rho, found in of]
    assert curves(drawn[7])["ratio of 4.5"] == [[r["rho"], r["bounds"]["4.5"]["ratio"]] for r in data["point masses"]]


# --- schedules ---


def test_schedules_in_their_tables_sentences_and_figure(new):
    measures = (*schedules.MEASURES, "estimate", "evaluations")
    labels, keys = ("canonical", *schedules.schedules()), ("0.001", "0.0001")
    made = {label: {key: dict(zip(measures, new(6), strict=True)) for key in keys} for label in labels}
    for row in made.values():
        row["0.0001"]["evaluations"] *= 1000
    result = {
        "settings": dataclasses.asdict(schedules.Plan(rtols=(1e-3, 1e-4))),
        "data": {"one": {"schedules": made, "reference error": 1e-6}},
    }
    tightest, tolerances = (rows(table) for table in schedules.tables(result))
    for row, over, (label, found) in zip(tightest, tolerances, made.items(), strict=True):
        assert row["schedule"] == over["schedule"] == label
        assert [row[m] for m in schedules.MEASURES] == [text(found["0.0001"][m]) for m in schedules.MEASURES]
        assert row["evaluations"] == str(round(found["0.0001"]["evaluations"]))
        for key in keys:
            assert over[key] == f"{found[key]['end point']:.1e} ({found[key]['estimate']:.0e})"
    said = schedules.seen(result)
    for m in schedules.MEASURES:
        assert f"{max(row['0.0001'][m] for row in made.values()):.0e} in the {m}" in said
    assert f"off by up to {max(row['0.001']['end point'] for row in made.values()):.0e} at" in said
    share = max(c["end point"] / (c["estimate"] + 1e-6) for row in made.values() for c in row.values())
    assert f"at most {share:.2f} of" in said
    two = {"settings": result["settings"], "data": {"one": result["data"]["one"], "two": result["data"]["one"]}}
    for axes, m in zip(schedules.figure(two).axes, schedules.MEASURES, strict=False):
        for label, row in made.items():
            assert curves(axes)[label] == points((1e-3, 1e-4), [cell[m] for cell in row.values()])


# --- the transport table ---


def test_transport_in_its_tables_sentences_and_figure(new):
    def indices():
        return {"off-diagonal": new(2), "invariant": new(2)}

    def row():
        return {
            **indices(),
            "min eigenvalue": new(),
            "is transport": False,
            "evaluations": 1000 * new(),
            "differs": new(),
        }

    names = {
        "three points": ("canonical", "VE"),
        "three on a line": ("canonical", "VE"),
        "four in space": ("canonical",),
    }
    converged = {
        data: {"schedules": {n: row() for n in own}, "signs": {s: indices() for s in ("right", "published")}}
        for data, own in names.items()
    }
    ways = (ot_table.MISTAKEN, "VE")
    steps = {
        data: {w: {s: {n: indices() for n in ("20", "40")} for s in ("right", "published")} for w in ways}
        for data in ("three points", "three on a line")
    }
    settings = dataclasses.asdict(ot_table.Plan(steps=(20, 40)))
    result = {"settings": settings, "converged": converged, "steps": steps}
    flows, signs, bent, _ = (rows(table) for table in ot_table.tables(result))

    def cell(value):
        return f"{value[0]:.4f} ± {value[1]:.3f}"

    for got in flows:
        found = converged[got["data"]]["schedules"][got["schedule"]]
        assert [got["off-diagonal"], got["rotation-invariant"]] == [
            cell(found[k]) for k in ("off-diagonal", "invariant")
        ]
        assert [got["least eigenvalue"], got["differs by"]] == [text(found[k]) for k in ("min eigenvalue", "differs")]
        assert got["what it is"].startswith(f"{found['evaluations']:.0f} evaluations")
        assert ("the same run" in got["what it is"]) == (got["schedule"] == "VE")
    for got in signs:
        assert got["off-diagonal"] == cell(converged[got["data"]]["signs"][got["sign"]]["off-diagonal"])
    for got in bent:
        found = steps["three points"][got["schedule"]][got["sign"]]
        assert [got["20 steps"], got["40 steps"]] == [cell(found[n]["off-diagonal"]) for n in ("20", "40")]
    said = ot_table.seen(result)
    assert f"by more than {max(r['differs'] for r in converged['three points']['schedules'].values()):.0e}" in said
    for way in ways:
        of = [c["off-diagonal"][0] for row in steps["three points"][way].values() for c in row.values()]
        assert f"{min(of):.2g} to {max(of):.2g}" in said
    drawn = ot_table.figure(result).axes
    for way in ways:
        of = [c["off-diagonal"][0] for c in steps["three points"][way]["right"].values()]
        assert curves(drawn[0])[way] == points((20, 40), of)
    bars = {
        bars.get_label(): [bar.get_height() for bar in bars]
        for bars in drawn[1].containers
        if len(bars) == 3 and hasattr(bars, "patches")
    }
    for sign in ("right", "published"):
        assert bars[f"{sign} sign"] == [found["signs"][sign]["off-diagonal"][0] for found in converged.values()]


# --- networks ---


def test_traces_in_their_tables_sentences_and_figure(new):
    ways = trace_error.WAYS
    levels = [
        {
            "rho": rho,
            "trace": new(),
            "median": dict(zip(ways, new(5), strict=True)),
            "bounds": dict(zip(names, new(3), strict=True)),
        }
        for rho in (0.5, 4.0)
        for names in [("4.2", "4.3", "4.5")]
    ]
    result = {"settings": {"states": 8}, "levels": levels, "cost": dict(zip(ways, new(5), strict=True))}
    errors, shares, costs = (rows(table) for table in trace_error.tables(result))
    for level, of_errors, of_shares in zip(levels, errors, shares, strict=True):
        assert of_errors["sigma^2 tr F/d"] == text(level["trace"])
        assert {way: of_errors[way] for way in ways} == {way: text(level["median"][way]) for way in ways}
        named = {"4.2": "4.2 paper", "4.3": "4.3 local loss", "4.5": "4.5 DF-EA"}
        assert all(of_shares[column] == text(level["bounds"][n]) for n, column in named.items())
    assert costs[0] == {way: text(cost) for way, cost in result["cost"].items()}
    said = trace_error.seen(result)
    assert all(f"{result['cost'][way]:.3g} {way}" in said for way in ways)
    assert f"bound is {levels[1]['bounds']['4.5']:.3g};" in said and f"{ways[0]} at 2 of 2 levels" in said
    (axes,) = trace_error.figure(result).axes
    for way in ways:
        assert curves(axes)[way] == points((0.5, 4.0), [level["median"][way] for level in levels])


def test_likelihoods_in_their_table_sentence_and_figure(new):
    keys = (
        "mean error",
        "median absolute error",
        "standard deviation",
        nll.CLAIMED,
        "evaluations",
        "time of an evaluation",
    )
    made = {way: dict(zip(keys, new(6), strict=True)) for way in nll.WAYS}
    made["hutchinson, 1 probe"][nll.CLAIMED] = float("nan")
    result = {
        "settings": dataclasses.asdict(nll.FULL),
        "rho": [0.25, 8.0],
        "exact nats per dimension": new(),
        "ways": made,
    }
    (table,) = nll.tables(result)
    assert "the mixture's own" in table.title and text(result["exact nats per dimension"]) in table.title
    assert [row["trace"] for row in rows(table)] == list(nll.WAYS)
    for row, found in zip(table.rows, made.values(), strict=True):
        wanted = ["unknown" if value != value else text(value) for value in found.values()]
        assert [text(value) for value in row[1:]] == wanted
    said = nll.seen(result)
    (axes,) = nll.figure(result).axes
    for way, row in made.items():
        cost = row["evaluations"] * row["time of an evaluation"]
        assert f"{row['median absolute error']:.3g} by {way} ({cost:.3g})" in said
        assert curves(axes)[way] == [[pytest.approx(cost), row["median absolute error"]]]


def run(strength, new):
    keys = ("log density", "seconds", "reward", "error", "less vjp's", "error of less")
    return {"strength": strength} | dict(
        zip(keys, (x * (-1 if k == 2 else 1) for k, x in enumerate(new(6))), strict=True)
    )


def test_guidance_in_its_tables_sentences_and_figure(new):
    ways, grid = adjoint.WAYS, (0.1, 0.2, 0.3)
    levels = [
        {"rho": rho, "products": dict(zip(ways, new(9), strict=True)), "gradients": {way: new(2) for way in ways}}
        for rho in (0.5, 4.0)
    ]
    made = {way: {"tuned": [run(s, new) for s in grid], "fresh": run(0.2, new)} for way in (*ways, "unrolled")}
    made["paper"]["fresh"]["strength"] = 0.1
    guidance = {"unguided": run(0.0, new), "ways": made}
    settings = dataclasses.asdict(adjoint.Plan(grid=grid))
    result = {"settings": settings, "levels": levels, "guidance": guidance}
    products, gradients, chosen, tuning = (rows(table) for table in adjoint.tables(result))
    for level, of_products, of_gradients in zip(levels, products, gradients, strict=True):
        for way in ways:
            off, cosine = level["gradients"][way]
            assert of_products[way] == text(level["products"][way])
            assert of_gradients[way] == f"{off:.2g}, {cosine:.3f}"
    unit = made["vjp"]["tuned"][1]["seconds"]  # the median: numbers rise
    for row, (name, way) in zip(chosen[1:], made.items(), strict=True):
        found = way["fresh"]
        assert row["product"] == name and row["log density"] == text(found["log density"])
        assert row["reward"] == f"{found['reward']:.4f} ± {found['error']:.4f}"
        less = found["less vjp's"]
        assert row["less vjp's"] == f"{less:.4f} ± {found['error of less']:.4f}"
        assert row["time"] == text(way["tuned"][1]["seconds"] / unit)
        assert row["strength"] == ("0.1, the least tried" if name == "paper" else "0.2")
    assert chosen[0]["reward"].startswith(f"{guidance['unguided']['reward']:.4f}")
    for row, way in zip(tuning, made.values(), strict=True):
        assert [row[f"{s:g}"] for s in grid] == [f"{r['reward']:.4f} ± {r['error']:.4f}" for r in way["tuned"]]
    said = adjoint.seen(result)
    assert all(
        f"{way['fresh']['reward']:.4f} ± {way['fresh']['error']:.4f} {name}" in said for name, way in made.items()
    )
    assert "may be better: paper." in said
    left, middle, right = (curves(axes) for axes in adjoint.figure(result).axes)
    for way in ways:
        assert left[way] == points((0.5, 4.0), [level["products"][way] for level in levels])
        assert middle[way] == points((0.5, 4.0), [level["gradients"][way][1] for level in levels])
        assert right[way] == points(grid, [-r["reward"] for r in made[way]["tuned"]])


def test_samples_in_their_tables_sentences_and_figure(new):
    def distances():
        return {"Frechet": new(2), "energy": new(2)}

    def rows_of_model():
        made = {"reference": distances()}
        for name in samplers.WAYS:
            flow = {} if name in samplers.STOCHASTIC else {"off the flow": new(2)}
            made[name] = {str(n): {"evaluations": n, **distances(), **flow} for n in (5, 10)}
            made[name]["10"]["pictures"] = ["00" * 64]
        return made

    models = {name: rows_of_model() for name in ("mixture", "network")}
    converging = {"DDIM": {"errors": new(5), "order": new()}}
    settings = dataclasses.asdict(samplers.Plan(evaluations=(5, 10)))
    result = {"settings": settings, "floor": distances(), "models": models, "orders": converging}
    *tables, of_orders = samplers.tables(result)
    keys = [(model, measure) for model in models for measure in ("off the flow", "Frechet", "energy")]
    for table, (model, measure) in zip(tables, keys, strict=True):
        for row in rows(table):
            for n in (5, 10):
                mean, error = models[model][row["sampler"]][str(n)][measure]
                assert row[f"{n} evaluations"] == f"{mean:.3g} ± {error:.1g}"
        if measure in result["floor"]:
            assert f"of exact samples of the mixture {result['floor'][measure][0]:.3g} ±" in table.title
            assert f"of the end of the flow {models[model]['reference'][measure][0]:.3g} ±" in table.title
    assert list(rows(of_orders)[0].values())[1:] == [
        text(x) for x in (*converging["DDIM"]["errors"], converging["DDIM"]["order"])
    ]
    said = samplers.seen(result)
    assert all(f"DDIM is {rows['DDIM']['10']['off the flow'][0]:.3g} ±" in said for rows in models.values())
    drawn = samplers.figure(result).axes
    for axes, (model, measure) in zip(drawn, [key for key in keys if key[1] != "energy"], strict=False):
        for name in samplers.DETERMINISTIC:
            assert curves(axes)[name] == points((5, 10), [models[model][name][n][measure][0] for n in ("5", "10")])
    (curve,) = drawn[4].lines
    assert curve.get_xydata().tolist() == points(orders.STEPS, converging["DDIM"]["errors"])


def test_styles_tell_samplers_apart_by_few_colours():
    assert set(samplers.STYLES) == set(samplers.WAYS)
    looks = [(style["color"], style["marker"], style["linestyle"]) for style in samplers.STYLES.values()]
    assert len(set(looks)) == len(looks) and {look[0] for look in looks} <= set(output.COLOURS)
