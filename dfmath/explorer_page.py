"""The page of a `Scene`: every frame is drawn beforehand, and a slider chooses which one is seen.

The drawing's units are hundredths of the window's half-width, its second axis points upwards.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dfmath import page
from dfmath.page import Markup, element, joined, paragraph, section
from dfmath.scene import Frame, Scene, Window

_UNIT = 100.0
_DECADES = 4.0  # of the density below its largest value that are told apart
_SHARE = 0.25  # of the curvature's own length that is drawn: at high noise it is the noise's, which fills the window
_LONGEST = 30.0  # axis of a curvature
_DISC = 4.0  # radius of the circle around each start that the flow's Jacobian deforms
_FULL = 3.0  # rho |s|, the size of the predicted noise, of the longest arrow
LAYERS = {
    "density": "density",
    "score": "score",
    "data": "data",
    "trails": "trajectories",
    "curvature": "curvature F",
    "posterior": "posterior",
    "flow": "flow's Jacobian",
}
_HIDDEN_AT_FIRST = ("posterior",)

_STYLE = """
.look { display: grid; grid-template-columns: minmax(0, 40rem) minmax(14rem, 1fr); gap: 0 1.5rem; align-items: start; }
.look svg { width: 100%; height: auto; }
.controls { display: grid; gap: 0.9rem; padding-top: 1rem; }
.controls input[type=range] { width: 100%; min-height: 2rem; }
.controls fieldset { border: 1px solid var(--line); border-radius: 4px; padding: 0.4rem 0.8rem; }
.controls fieldset label { display: block; padding: 0.2rem 0; }
.controls button { font: inherit; padding: 0.4rem 1rem; justify-self: start; }
.key { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.4em; vertical-align: -0.1em; }
.words { min-height: 7.5em; margin: 0; }
.axes text { font-size: 6px; fill: var(--ink); }
.axes path, .axes rect { stroke: var(--ink); stroke-width: 0.4; fill: none; }
.density-key { background: #3a87c8; } .score-key { background: var(--quiet); } .data-key { background: var(--ink); }
.trails-key { background: #e69f00; } .curvature-key { background: #d55e00; } .posterior-key { background: #009e73; }
.flow-key { background: #cc79a7; }
.score { fill: none; stroke: var(--quiet); stroke-width: 0.6; stroke-linejoin: round; }
.data { stroke: var(--ink); stroke-width: 4px; stroke-linecap: round; opacity: 0.7; }
#spots { vector-effect: non-scaling-stroke; }
.trails { fill: none; stroke: #e69f00; stroke-width: 0.7; }
.dots { fill: #e69f00; stroke: var(--paper); stroke-width: 0.3; }
.curvature, .posterior, .flow { fill: none; stroke-width: 1; }
.curvature { stroke: #d55e00; } .posterior { stroke: #009e73; } .flow { stroke: #cc79a7; stroke-width: 1.3; }
.rising { stroke-dasharray: 1.6 1.2; }
@media (max-width: 50rem) { .look { grid-template-columns: minmax(0, 1fr); } }
"""

_SCRIPT = """
(() => {
  const look = document.querySelector('.look');
  const frames = [...look.querySelectorAll('.frame')];
  const level = look.querySelector('input[type=range]');
  const play = look.querySelector('button');
  const words = look.querySelector('.words');
  let timer = null;
  const show = () => {
    frames.forEach((frame, i) => frame.setAttribute('display', i == level.value ? 'inline' : 'none'));
    words.textContent = frames[level.value].dataset.words;
    level.setAttribute('aria-valuetext', 'rho = ' + frames[level.value].dataset.rho);
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = 'play'; };
  const step = () => {
    level.value = Number(level.value) + 1;
    show();
    if (level.value == level.max) stop();
  };
  level.addEventListener('input', () => { stop(); show(); });
  play.addEventListener('click', () => {
    if (timer !== null) return stop();
    if (level.value == level.max) level.value = 0;
    play.textContent = 'stop';
    timer = setInterval(step, 250);
  });
  look.querySelectorAll('input[type=checkbox]').forEach((box) => {
    const apply = () => look.querySelectorAll('.layer-' + box.value).forEach((part) => {
      part.style.visibility = box.checked ? 'visible' : 'hidden';
    });
    box.addEventListener('change', apply);
    apply();
  });
  show();
})();
"""


def look_page(scene: Scene) -> Markup:
    """Return the page."""
    lead = (
        "Move the slider from noise to data. The window grows with the noise level ρ = σ/α, so that data and noise "
        "stay in sight; its axes are canonical states z = x/α."
    )
    drawing = element("div", _drawing(scene), _controls(scene), class_="look")
    parts = [drawing, _legend(scene), page.about_block(**_facts(scene))]
    return page.page(scene.title, lead, parts, style=_STYLE, script=_SCRIPT)


def _facts(scene: Scene) -> dict[str, Any]:
    high, low = scene.frames[0].rho, scene.frames[-1].rho
    levels = f"{high:.3g} to {low:.3g}, {len(scene.frames)} levels"
    return {"rho": levels, "trajectories": scene.trails.shape[1], "seed": scene.seed}


def _first(scene: Scene) -> int:
    """The frame that is seen at first: where structure appears, rather than noise or single points."""
    return 2 * (len(scene.frames) - 1) // 3


def _controls(scene: Scene) -> Markup:
    last, first = len(scene.frames) - 1, _first(scene)
    slider = element("input", type="range", id="level", min=0, max=last, step=1, value=first, autocomplete="off")
    boxes = (_box(name, words) for name, words in LAYERS.items())
    return element(
        "div",
        element("div", element("label", "noise level, from high to low", for_="level"), slider),
        element("button", "play", type="button"),
        element("p", _words(scene.frames[first]), class_="words", role="status", aria_live="polite"),
        element("fieldset", element("legend", "shown"), *boxes),
        element("noscript", paragraph("Without JavaScript one noise level is shown.")),
        class_="controls",
    )


def _box(name: str, words: str) -> Markup:
    checked = None if name in _HIDDEN_AT_FIRST else "checked"
    box = element("input", type="checkbox", value=name, checked=checked, autocomplete="off")
    return element("label", box, element("span", class_=f"key {name}-key", aria_hidden="true"), words)


def _words(frame: Frame) -> str:
    """What a frame shows, in a few sentences: read aloud as the slider moves."""
    values, asymmetry = frame.rho**2 * np.linalg.eigvalsh(frame.fisher), frame.asymmetry
    bent = int((values[:, 0] < 0).sum())
    where = f"at {bent} of {len(values)} dots" if bent else "at no dot"
    return (
        f"ρ = {frame.rho:.3g}. F has a negative eigenvalue {where}; the eigenvalues of ρ²F lie between "
        f"{values.min():.3g} and {values.max():.3g}. Asymmetry of the flow's Jacobian since the first frame: "
        f"{asymmetry.mean():.2g} on average, {asymmetry.max():.2g} at most."
    )


def _legend(scene: Scene) -> page.Section:
    of = _inline
    return section(
        "What is drawn",
        _entry("Density", of(r"\log q"), f", from its largest value in the window to {_DECADES:.0f} decades below."),
        _entry("Score", of(r"s = \nabla \log q"), "; arrows are longest from ", of(_FULL_LENGTH), " on."),
        _entry("Data", f"the points, or centres of the mixture's components, {len(scene.centres)} of {scene.count}."),
        _entry(
            "Trajectories",
            "of the probability flow, from draws at the highest noise level, in units of each level's own window; "
            "dots are where they have come to.",
        ),
        _curvature_entry(),
        _entry(
            "Posterior",
            "of the data given a dot: its mean, joined to the dot, and the ellipse of one standard deviation of its "
            "covariance ",
            of(r"P = \rho^2 (I - \rho^2 F)"),
            ", which has no negative eigenvalue even where F has.",
        ),
        _entry(
            "Flow's Jacobian",
            "A takes small changes of a start to changes of its dot: the image, to first order, of a circle of radius "
            f"{_DISC / _UNIT:g} half-widths of the first window.",
        ),
    )


def _curvature_entry() -> Markup:
    of = _inline
    return _entry(
        "Curvature F",
        "at each dot. Along an eigenvector with eigenvalue λ the axis reaches ",
        of(r"|\lambda|^{-1/2}/4"),
        " to either side; there the log density is 1/32 from its tangent, to second order. Where both eigenvalues are "
        "positive the ellipse through the ends is drawn, a level set of ",
        of("v^T F v"),
        ". Where one is negative the level sets are hyperbolas and no ellipse would be honest: the two axes are drawn, "
        "dashed where the log density curves upwards. Axes that would be longer than "
        f"{_LONGEST / _UNIT:g} half-widths of the window are cut there, and have no ellipse either.",
    )


_FULL_LENGTH = rf"\rho |s| = {_FULL:.0f}"


def _inline(latex: str) -> Markup:
    return page.formula(latex, display=False)


def _entry(name: str, *words: Any) -> Markup:
    return paragraph(element("strong", name), ": ", *words)


def _drawing(scene: Scene) -> Markup:
    window = element("clipPath", element("rect", x=-100, y=-100, width=200, height=200), id="window")
    spots = _UNIT * (scene.centres - scene.window.centre) / scene.window.reach
    spots = "".join(f"M{x:.5g} {y:.5g}h0" for x, y in spots)
    trails = element("path", d="".join(_line(_UNIT * trail) for trail in scene.trails.swapaxes(0, 1)), id="trails")
    shared = element("defs", window, element("path", d=spots, id="spots"), trails)
    frames = (_frame(scene.window, frame, i == _first(scene)) for i, frame in enumerate(scene.frames))
    name = f"{scene.title}: density, score, F and flow at one noise level; the words beside it tell its numbers"
    return element("svg", shared, *frames, viewBox="-122 -104 230 222", role="img", aria_label=name)


def _line(points: Any) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _frame(window: Window, frame: Frame, seen: bool) -> Markup:
    at = _UNIT / window.half(frame.rho)  # drawn units for one of z
    points, means = at * (frame.points - window.centre), at * (frame.mean - window.centre)
    side = {"x": -100, "y": -100, "width": 200, "height": 200}
    parts = (
        element("image", href=_density(frame.log_density), preserveAspectRatio="none", class_="layer-density", **side),
        element("path", d=_arrows(frame), class_="score layer-score"),
        element("use", href="#spots", class_="data layer-data", transform=f"scale({at * window.reach / _UNIT:.5g})"),
        element("use", href="#trails", class_="trails layer-trails"),
        _group("posterior", map(_posterior, points, means, at**2 * frame.covariance)),
        _group("flow", map(_image_of_disc, points, _drawn(window, frame))),
        _group("curvature", map(_curvature, points, frame.fisher / at**2)),
        element("g", *map(_dot, points), class_="dots layer-trails"),
    )
    inside = element("g", *parts, transform="scale(1,-1)", clip_path="url(#window)")
    words = {"data_rho": f"{frame.rho:.3g}", "data_words": _words(frame)}
    state = "inline" if seen else "none"
    return element("g", inside, _axes(window, frame.rho), class_="frame", display=state, **words)


def _dot(point: Any) -> Markup:
    return element("circle", cx=f"{point[0]:.1f}", cy=f"{point[1]:.1f}", r=1.4)


def _group(name: str, parts: Iterable[Markup]) -> Markup:
    return element("g", *parts, class_=f"{name} layer-{name}")


def _density(log_density: Any) -> str:
    """One colour, the more opaque the denser: it lies on light paper as on dark."""
    from PIL import Image

    below = (log_density.max() - log_density) / math.log(10.0)
    levels = np.round(255.0 * np.clip(1.0 - below / _DECADES, 0.0, 1.0)).astype(np.uint8)
    picture, buffer = Image.fromarray(levels, "P"), io.BytesIO()
    picture.putpalette(_BLUE * 256)
    picture.save(buffer, "PNG", transparency=bytes(range(256)), optimize=True)
    return page.data_address(buffer.getvalue())


_BLUE = [0x3A, 0x87, 0xC8]


def _arrows(frame: Frame) -> str:
    """Arrows along the score, whose length tells the noise that it predicts."""
    n = len(frame.score)
    ticks = _UNIT * ((np.arange(n) + 0.5) * 2.0 / n - 1.0)
    size = np.linalg.norm(frame.score, axis=2, keepdims=True)
    along = frame.score / np.where(size > 0, size, 1.0)
    reach = 0.85 * (2.0 * _UNIT / n) * np.minimum(frame.rho * size / _FULL, 1.0) * along
    foot = np.stack(np.meshgrid(ticks, ticks), axis=2) - reach / 2.0
    across = 0.14 * np.stack([-reach[..., 1], reach[..., 0]], axis=2)
    shafts = np.stack([foot, foot + reach], axis=2).reshape(-1, 2, 2)
    wings = np.stack([foot + 0.7 * reach + across, foot + reach, foot + 0.7 * reach - across], axis=2).reshape(-1, 3, 2)
    return "".join(map(_line, shafts)) + "".join(map(_line, wings))


def _eigen(matrix: Any) -> tuple[Any, Any, float]:
    """Return eigenvalues (2,) of a symmetric matrix, from small to large, eigenvectors in columns, and their angle.

    The angle is that of the first eigenvector with the first axis, in degrees.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0)
    return values, vectors, math.degrees(math.atan2(vectors[1, 0], vectors[0, 0]))


def _curvature(point: Any, fisher: Any) -> Markup:
    """The axes of F, and the ellipse through their ends where both eigenvalues are positive."""
    values, vectors, angle = _eigen(fisher)
    with np.errstate(divide="ignore"):
        sizes = _SHARE / np.sqrt(np.abs(values))
    if values[0] > 0 and sizes.max() <= _LONGEST:
        return _ellipse(point, sizes, angle)
    arms = np.minimum(sizes, _LONGEST) * vectors
    return joined(_axis(point, arm, value < 0) for arm, value in zip(arms.T, values, strict=True))


def _axis(point: Any, arm: Any, rising: bool) -> Markup:
    return element("path", d=_line([point - arm, point + arm]), class_="rising" if rising else None)


def _ellipse(centre: Any, sizes: Sequence[float], angle: float) -> Markup:
    x, y = (f"{c:.1f}" for c in centre)
    rx, ry = (f"{size:.3g}" for size in sizes)
    return element("ellipse", cx=x, cy=y, rx=rx, ry=ry, transform=f"rotate({angle:.1f} {x} {y})")


def _image_of_unit_circle(centre: Any, square: Any) -> Markup:
    """The ellipse {M u: |u| = 1} of a matrix with M M^T given."""
    values, _, angle = _eigen(square)
    return _ellipse(centre, np.sqrt(np.maximum(values, 0.0)), angle)


def _posterior(point: Any, mean: Any, covariance: Any) -> Markup:
    return joined([element("path", d=_line([point, mean])), _image_of_unit_circle(mean, covariance)])


def _drawn(window: Window, frame: Frame) -> Any:
    """The Jacobian from the first frame's drawing to this one's."""
    return frame.jacobian * (window.half(frame.first) / window.half(frame.rho))


def _image_of_disc(point: Any, jacobian: Any) -> Markup:
    return _image_of_unit_circle(point, _DISC**2 * jacobian @ jacobian.T)


def _axes(window: Window, rho: float) -> Markup:
    """A box with ticks in units of z."""
    half, parts = window.half(rho), [element("rect", x=-100, y=-100, width=200, height=200)]
    for which, middle in enumerate(window.centre):
        for value in _ticks(middle - half, middle + half):
            at = _UNIT * (value - middle) / half
            parts += _tick_below(at, value) if which == 0 else _tick_beside(-at, value)
    names = (("0", "116", "middle", "z₁"), ("-116", "2", "middle", "z₂"))
    parts += [element("text", words, x=x, y=y, text_anchor=anchor) for x, y, anchor, words in names]
    return element("g", *parts, class_="axes")


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [value for value in MaxNLocator(5).tick_values(low, high) if low < value < high]


def _tick_below(x: float, value: float) -> list[Markup]:
    mark = element("path", d=f"M{x:.1f} 100v2")
    return [mark, element("text", f"{value:.6g}", x=f"{x:.1f}", y=108, text_anchor="middle")]


def _tick_beside(y: float, value: float) -> list[Markup]:
    mark = element("path", d=f"M-100 {y:.1f}h-2")
    return [mark, element("text", f"{value:.6g}", x=-103, y=f"{y + 2:.1f}", text_anchor="end")]
