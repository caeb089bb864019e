"""The experiments on networks, with networks that are hardly trained: what they measure, and what they write."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from dfmath.experiments import adjoint, nll, output, samplers, trace_error
from dfmath.experiments import truth as truths
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.training import TrainingPlan
from scipy.stats import energy_distance

from dfmath import GaussianMixture, console
from dfmath.cli import main
from dfmath.schedules import EDM


@pytest.fixture(scope="module")
def small():
    """Everything smaller: the numbers are poor, what is known of them is as before."""
    with pytest.MonkeyPatch.context() as patch:
        plan = TrainingPlan(steps=40, rate=2e-3, warmup=5, averaging=0.9)
        patch.setattr(truths, "training_plan", lambda quick: plan)
        patch.setattr(trace_error, "head_plan", lambda quick: plan)
        patch.setattr(truths, "POOL", 2000)
        patch.setattr(trace_error, "FULL", trace_error.Plan(states=24, dense=8, levels=3, rounds=2))
        patch.setattr(nll, "FULL", nll.Plan(states=6, steps=8, draws=2, rounds=1))
        patch.setattr(adjoint, "FULL", adjoint.Plan(states=6, grid=(0.05, 0.1), levels=3))
        small_samples = {"repeats": 2, "samples": 70, "shown": 2, "averaged": 500, "fine": 30, "collected": 12}
        patch.setattr(samplers, "FULL", samplers.Plan(evaluations=(5, 10, 25), **small_samples))
        yield


@pytest.fixture(scope="module")
def truth(small, tmp_path_factory):
    return truths.truth(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sampled(truth):
    """What all samplers do."""
    return samplers.measure(samplers.FULL, truth, lambda text: None)


def test_the_truth_is_the_mixtures(truth):
    """Posterior moments beside sums over its components, written out in NumPy."""
    rho, prior = 0.4, truth.prior
    _, x = truths.noised(truth, rho, 5, seed=0)
    known = trace_error.exact(truth, x, rho)
    means, covariances, weights = (np.asarray(part) for part in _fit())
    for row, z in enumerate(x.numpy()):
        logs, moments = [], []
        for mean, covariance, weight in zip(means, covariances, weights, strict=True):
            spread = covariance + rho**2 * np.eye(len(mean))
            gain, off = covariance @ np.linalg.inv(spread), z - mean
            logs.append(np.log(weight) - 0.5 * (off @ np.linalg.solve(spread, off) + np.linalg.slogdet(spread)[1]))
            moments.append((mean + gain @ off, covariance - gain @ covariance))
        share = np.exp(np.array(logs) - max(logs))
        share /= share.sum()
        mean = sum(w * m for w, (m, _) in zip(share, moments, strict=True))
        second = sum(w * (np.trace(c) + m @ m) for w, (m, c) in zip(share, moments, strict=True))
        trace = (len(z) - (second - mean @ mean) / rho**2) / rho**2
        np.testing.assert_allclose(known.mean[row].numpy(), mean, atol=1e-9)
        np.testing.assert_allclose(
            [known.second_moment[row].item(), known.trace[row].item()], [second, trace], rtol=1e-9
        )
    assert prior.dim == 64


def _fit():
    from sklearn.mixture import GaussianMixture as Fit

    from dfmath.datasets import digits

    fit = Fit(truths.COMPONENTS, covariance_type="full", reg_covar=truths.FLOOR, random_state=0)
    fit.fit(digits())
    return fit.means_, fit.covariances_, fit.weights_


def test_networks_come_back_from_the_cache(truth):
    again = truths.truth(truth.cache)
    pairs = zip(again.network.call.owner.parameters(), truth.network.call.owner.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bounds_hold_for_a_network_that_is_hardly_trained(truth):
    """They need nothing of the network but d1 and d2, which are measured [MATH 4.2, 4.3, 4.5]."""
    found = trace_error.measure(trace_error.FULL, truth, trace_error.heads(truth), lambda text: None)
    for level in found["levels"]:
        assert all(0.0 < share <= 1.0 + 1e-6 for share in level["bounds"].values()), level
        assert set(level["median"]) == set(trace_error.WAYS)
    assert found["cost"]["exact autodiff"] > 3.0 * found["cost"]["local-loss"] > 1.5  # products with 64 vectors; none
    text = "\n".join(table.markdown() for table in trace_error.tables({"settings": asdict(trace_error.FULL), **found}))
    assert "| 0.03 |" in text and "Hutchinson, 1 probe" in text


def run_command(monkeypatch, *words):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["dfmath", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_commands_write_tables_and_figures(small, sampled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samplers, "measure", lambda plan, truth, advance: sampled)
    monkeypatch.setattr(adjoint, "WAYS", ("none", "secant", "vjp"))  # each is tested in test_adjoint
    monkeypatch.setenv("COLUMNS", "300")  # so that no word is broken
    folders = ("--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"))
    for name, tables in (("nll", 1), ("adjoint", 4), ("samplers", 7)):
        assert run_command(monkeypatch, "reproduce", name, *folders) == 0
        text = (tmp_path / "out" / f"{name}.md").read_text()
        words = text.replace("**", " ").replace("| --- ", " ").replace("|", " ").split()
        assert text.count("**") == 2 * tables and set(words) <= set(capsys.readouterr().out.split())
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        written = json.loads((tmp_path / "out" / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert written["machine"]["cores"] > 0


def test_the_vjp_is_the_unrolled_gradient(truth):
    """In the table of gradients it is what the others are compared with; beside the mixture it is not exact."""
    head = trace_error.heads(truth, forms=("local-loss",))["local-loss"]
    found = adjoint._errors(adjoint.FULL, truth, head, adjoint._reward())
    for level in found:
        assert level["gradients"]["vjp"][0] == 0.0 and abs(level["gradients"]["vjp"][1] - 1.0) < 1e-12
        assert level["products"]["vjp"] > 1e-3


def ideal(tmp_path, share=1.0):
    """A mixture in four dimensions, and a network that says a share of its own noise."""
    rng = np.random.default_rng(0)
    roots = 0.3 * rng.standard_normal((3, 4, 4))
    means = torch.from_numpy(rng.standard_normal((3, 4)))
    prior = GaussianMixture(means, torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(4)))
    schedule = EDM(0.01, 100.0)
    network = ScoreNetwork(lambda x, t: share * prior.diffuse(*schedule(t)).score(x), schedule, "score")
    return truths.Truth(prior, network, prior.sample(500, seed=1), tmp_path, True)


def test_an_exact_network_has_the_exact_likelihood(tmp_path):
    """Errors are those of 30 steps, and not small once the noise is off by a hundredth."""
    plan, told = nll.Plan(states=12, steps=30, draws=4, rounds=1), []
    exact, biased = (nll.measure(plan, ideal(tmp_path, share), {}, told.append)["ways"] for share in (1.0, 1.01))
    assert abs(exact["exact"]["mean error"]) < 1e-4 and exact["exact"]["median absolute error"] < 1e-4
    # dlog q/dlog rho is d less rho^2 tr F of the noise: a hundredth more of it, over log(30/0.03), where F fills it
    assert 0.01 < biased["exact"]["median absolute error"] < 0.2
    assert exact["exact"][nll.CLAIMED] == 0.0 and math.isnan(exact["hutchinson, 1 probe"][nll.CLAIMED])
    for way in ("hutchinson, 8 probes", "i-mmse"):
        assert 0.0 < exact[way]["median absolute error"] < 4.0 * exact[way][nll.CLAIMED]


def test_guidance_goes_towards_the_reward(truth):
    """Above that of no guidance from the same starts; below it with the reward turned round."""
    plan, reward = adjoint.Plan(states=6, steps=12, window=(4, 8)), adjoint._reward()
    before, up = (adjoint._guided(plan, truth, reward, "vjp", s, 9) for s in (0.0, 0.1))
    down = adjoint._guided(plan, truth, lambda x: -reward(x), "vjp", 0.1, 9)
    assert (up.rewards > before.rewards).all() and (-down.rewards < before.rewards).all()


def test_strengths_are_chosen_on_other_starts(truth, monkeypatch):
    """The best of the first starts is run once more, from fresh ones; errors are of differences, start by start."""
    asked = []

    def guided(plan, truth, reward, product, strength, seed):
        asked.append((product, strength, seed))
        spread = torch.tensor([0.0, 1.0, 2.0]) if seed == adjoint.TUNED else torch.tensor([5.0, 7.0, 12.0])
        if product == "paper":
            return adjoint.Run(strength, torch.full((3,), math.nan), math.nan, math.nan)
        return adjoint.Run(strength, spread - (strength - 0.2) ** 2 + (product == "none") * spread**2, 0.5, 1.0)

    monkeypatch.setattr(adjoint, "_guided", guided)
    plan, told = adjoint.Plan(states=3, grid=(0.1, 0.2, 0.5)), []
    found = adjoint._guidance(plan, truth, None, {"none": "none", "paper": "paper", "vjp": "vjp"}, told.append)
    assert len(told) == 3 * 4
    fresh = [(product, strength) for product, strength, seed in asked if seed == adjoint.FRESH]
    assert fresh == [("none", 0.2), ("vjp", 0.2), ("none", 0.0)]
    assert math.isnan(found["ways"]["paper"]["fresh"]["reward"])
    got, more = found["ways"]["none"]["fresh"], np.array([25.0, 49.0, 144.0])
    assert got["less vjp's"] == pytest.approx(more.mean()) and got["reward"] == pytest.approx(8.0 + more.mean())
    assert got["error of less"] == pytest.approx(more.std(ddof=1) / 3**0.5)


def test_distances_between_gaussians_are_known():
    """Frechet's of commuting covariances; the energy distance on a line is SciPy's, less pairs of one point."""
    a, b = np.diag([1.0, 4.0]), np.diag([9.0, 0.25])
    found = samplers.frechet_distance(np.array([1.0, 0.0]), a, np.zeros(2), b)
    assert found == pytest.approx(1.0 + (1.0 - 3.0) ** 2 + (2.0 - 0.5) ** 2, rel=1e-6)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 1)), rng.standard_normal((40, 1)) + 0.5
    biased = energy_distance(x[:, 0], y[:, 0]) ** 2
    with_itself = sum(np.abs(z - z.T).sum() * (1 / 40 / 39 - 1 / 40**2) for z in (x, y))
    assert samplers.energy_distance(x, y) == pytest.approx(biased - with_itself, rel=1e-12)


def test_exact_samples_are_no_distance_away():
    """The mean over many small sets in 64 dimensions is 0 to within its error, and not for samples that vary less."""
    rng = np.random.default_rng(1)
    pairs = rng.standard_normal((400, 2, 20, 64))
    same, less = (np.array([samplers.energy_distance(share * x, y) for x, y in pairs]) for share in (1.0, 0.9))
    error = same.std() / 20.0
    assert abs(same.mean()) < 4.0 * error < less.mean()


@pytest.mark.parametrize("name", list(samplers.WAYS))
def test_samplers_take_what_they_are_given(sampled, name):
    """One evaluation less than asked where a step takes two, and no more than that is left over."""
    for model in sampled["models"].values():
        for asked in samplers.FULL.evaluations:
            heun = samplers.WAYS[name]["solver"] == "heun"
            assert model[name][str(asked)]["evaluations"] == (asked - 1 + asked % 2 if heun else asked)


def test_moments_are_the_mixtures(truth):
    mean, covariance = samplers.moments(truth.prior)
    drawn = truth.prior.sample(40_000, seed=0).numpy()
    assert np.abs(drawn.mean(axis=0) - mean).max() < 0.02
    assert np.abs(np.cov(drawn.T) - covariance).max() < 0.02


def test_pictures_come_back():
    pixels = samplers._pixels(samplers._picture(np.linspace(-1.0, 1.0, 64)))
    assert pixels.shape == (10, 10) and pixels[1, 1] == 0 and pixels[8, 8] == 255


def test_samplers_get_better_with_evaluations(sampled):
    """Those of the exact noise approach the end of the flow, and no more evaluations are taken than are said."""
    rows = sampled["models"]["mixture"]
    for name in samplers.DETERMINISTIC:
        off = [rows[name][str(e)]["off the flow"][0] for e in samplers.FULL.evaluations]
        assert off[-1] < 0.6 * off[0], (name, off)
        assert all(rows[name][str(e)]["evaluations"] <= e for e in samplers.FULL.evaluations)
    assert rows["DEIS 3"]["25"]["off the flow"][0] < rows["DDIM"]["25"]["off the flow"][0]
    assert rows["DEIS-SN 2"]["10"] != rows["DEIS 2"]["10"]
    known = {
        "DDIM": 1,
        "DEIS 1": 2,
        "DEIS 2": 3,
        "DEIS 3": 4,
        "rho-AB 2": 3,
        "DPM-Solver++(2M)": 2,
        "PNDM": 2,
        "Heun": 2,
    }
    assert set(known) == set(sampled["orders"])
    for name, order in known.items():
        assert sampled["orders"][name]["order"] == pytest.approx(order, abs=0.35), name


def test_unknown_experiments_are_refused(capsys, monkeypatch):
    assert run_command(monkeypatch, "reproduce", "trace-eror") == 2
    assert "did you mean 'trace-error'" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    assert run_command(monkeypatch, "reproduce", "nll") == 2
    said = capsys.readouterr().err
    assert "reproduce nll needs torch and safetensors: in the folder of dfmath" in said and "-e '.[torch]'" in said
    assert run_command(monkeypatch, "bench", "network") == 2
    assert ".[diffusers]" in capsys.readouterr().err


def test_tables_are_markdown():
    table = output.Table("what", ("a", "b"), [(0.123456, "x")])
    assert table.markdown() == "**what**\n\n| a | b |\n| --- | --- |\n| 0.123 | x |"
