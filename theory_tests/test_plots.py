"""Figures: where they may go, what is left behind when they fail, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmath import PointMasses, files, plots
from dfmath.profile import LevelProfile, fisher_profile
from dfmath.transport import ot_check


class Failing:
    """A figure that fails after it wrote something."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def savefig(self, path: Path, dpi: int) -> None:
        path.write_text("half")
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError()])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        plots.save(Failing(error), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert str(tmp_path / "figure.png") in str(caught.value) and "No space left" in str(caught.value)


def test_a_folder_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "drawer.png").mkdir()
    with pytest.raises(ValueError, match=r"drawer\.png.*is a folder"):
        plots.destination(tmp_path / "drawer.png")


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_writable", lambda folder: False)
    with pytest.raises(ValueError, match="can be written"):
        plots.destination(tmp_path / "figure.png")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        plots.destination("")


def _inside(figure: Any, text: Any) -> bool:
    figure.canvas.draw()
    box = text.get_window_extent(figure.canvas.get_renderer())
    return bool(box.x0 >= 0 and box.x1 <= figure.bbox.width)


@pytest.mark.parametrize("spectrum", [False, True])
def test_the_title_fits(spectrum: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    prior = PointMasses(np.random.default_rng(0).standard_normal((20, 2)))
    levels = [fisher_profile(prior, rho, 4, 0, spectrum) for rho in (10.0, 1.0)]
    figure = plots.profile(
        levels, "Diffusion Fisher of a-rather-long-name-of-a-file.npy, 1797 x 64, 16 draws at each level"
    )
    FigureCanvasAgg(figure)
    assert _inside(figure, figure._suptitle)


def test_levels_without_a_rank_are_gaps() -> None:
    quantiles = (0.0, 0.0, 0.0, 0.5, 1.0)
    levels = [LevelProfile(1.0, 0.5, 0.1, quantiles, 1.5, 0.1), LevelProfile(0.1, 1.0, 0.0, quantiles, None, None)]
    drawn = plots.profile(levels, "title").axes[2].lines[0].get_ydata()
    assert drawn[0] == 1.5 and np.isnan(drawn[1])


def test_data_lie_below_the_trajectories_and_shrink(tmp_path: Path) -> None:
    sizes = []
    for n in (3, 300):
        prior = PointMasses(np.random.default_rng(0).standard_normal((n, 2)))
        report = ot_check(prior, 10.0, 1.0, 3, start="gaussian")
        figure = plots.trajectories([("title", prior, report)], 10.0, 1.0)
        figure.savefig(tmp_path / "figure.png")
        axis = figure.axes[0]
        assert len(np.unique(axis.collections[0].get_colors(), axis=0)) > 1  # the map's colours, not one for all
        data = next(line for line in axis.lines if line.get_label() == "data")
        assert data.get_zorder() < axis.collections[0].get_zorder()
        assert "rho" in axis.get_xlabel() and "asymmetry" in axis.collections[0].get_label()
        sizes.append(data.get_markersize())
    assert sizes[1] < sizes[0] / 2


def test_effective_ranks_leave_out_vanishing_covariances() -> None:
    prior = PointMasses(np.random.default_rng(0).standard_normal((50, 2)))
    found = [fisher_profile(prior, rho, 64) for rho in (0.1, 0.02, 0.005)]
    assert all(level.effective_rank is None or level.effective_rank >= 1.0 for level in found)
    last = fisher_profile(prior, 1e-5, 8)
    assert last.effective_rank is None and last.effective_rank_error is None and last.ranked == 0


def test_ranks_of_all_but_one_point_are_left_out() -> None:
    """Two points and draws of both kinds, by hand: P = w (1 - w) is of rank 1 wherever it counts."""
    rho, prior = 0.2, PointMasses(np.array([[0.0, 0.0], [1.0, 0.0]]))
    x = prior.diffuse(1.0, rho).sample(64, 0)
    w = 1.0 / (1.0 + np.exp(np.abs(x[:, 0] - 0.5) / rho**2))
    spread = w * (1.0 - w) / rho**2
    found = fisher_profile(prior, rho, 64)
    assert 0 < (spread > 1e-6).sum() < 64 and found.ranked == (spread > 1e-6).sum()
    assert found.effective_rank == pytest.approx(1.0, abs=1e-9)
    smallest = 1.0 - spread
    wanted = smallest.mean(), smallest.std(ddof=1) / 8.0
    assert found.quantiles is not None and found.quantile_errors is not None
    assert (found.quantiles[0], found.quantile_errors[0]) == pytest.approx(wanted, rel=1e-9)
