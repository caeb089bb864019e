"""The experiments on networks, with networks that are hardly trained: what they measure, and what they write."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from dfmath.experiments import adjoint, nll, output, samplers, trace_error
from dfmath.experiments import truth as truths
from dfmath.integrations.training import TrainingPlan

from dfmath import console
from dfmath.cli import main


@pytest.fixture(scope="module")
def small():
    """Everything smaller: the numbers are poor, what is known of them is as before."""
    with pytest.MonkeyPatch.context() as patch:
        plan = TrainingPlan(steps=40, rate=2e-3, warmup=5, averaging=0.9)
        patch.setattr(truths, "training_plan", lambda quick: plan)
        patch.setattr(trace_error, "head_plan", lambda quick: plan)
        patch.setattr(truths, "POOL", 2000)
        patch.setattr(trace_error, "FULL", trace_error.Plan(states=24, dense=8, levels=3, rounds=2))
        patch.setattr(nll, "FULL", nll.Plan(states=6, steps=8, draws=2))
        patch.setattr(adjoint, "FULL", adjoint.Plan(states=6, grid=(0.1,), levels=3))
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
    from sklearn.mixture import GaussianMixture

    from dfmath.datasets import digits

    fit = GaussianMixture(truths.COMPONENTS, covariance_type="full", reg_covar=truths.FLOOR, random_state=0)
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
    folders = ("--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"))
    for name, tables in (("nll", 1), ("adjoint", 3), ("samplers", 7)):
        assert run_command(monkeypatch, "reproduce", name, *folders) == 0
        text = (tmp_path / "out" / f"{name}.md").read_text()
        assert text.count("**") == 2 * tables and text.strip() in capsys.readouterr().out
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


def test_distances_between_gaussians_are_known():
    """Frechet's of commuting covariances; W2 of a shift is the shift, and of any sets what POT says."""
    a, b = np.diag([1.0, 4.0]), np.diag([9.0, 0.25])
    found = samplers.frechet_distance(np.array([1.0, 0.0]), a, np.zeros(2), b)
    assert found == pytest.approx(1.0 + (1.0 - 3.0) ** 2 + (2.0 - 0.5) ** 2, rel=1e-6)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((40, 3))
    assert samplers.wasserstein(x, x[::-1] + 2.0) == pytest.approx(12.0**0.5, rel=1e-12)
    ot = pytest.importorskip("ot")
    wanted = ot.emd2(np.full(40, 0.025), np.full(40, 0.025), ot.dist(x, y))
    assert samplers.wasserstein(x, y) == pytest.approx(wanted**0.5, rel=1e-9)


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
