# %% [markdown]
# # Write and verify your own theorem
#
# `dfmath verify` is a list of statements, each a function that measures both sides. A conjecture of yours can be the next: write it, let it run over noise
# levels on your data, and see where it breaks. Three candidates, for any $q_0$ and $x = \alpha x_0 + \sigma\epsilon$:
#
# | | claim | |
# |---|---|---|
# | 9.1 | $\partial \log q/\partial (\sigma^2) = \tfrac12 (\lvert s\rvert^2 - \mathrm{tr} F)$ | the heat equation, at each point |
# | 9.2 | $E[\langle x, s\rangle] = -d$ | Stein's identity, on average |
# | 9.3 | $F \succeq 0$ | "noise makes densities log-concave" |

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from dfmath.datasets import digits
from dfmath.report import console, theorem_table
from dfmath.theorems.compare import excess, relative, standard_errors
from dfmath.theorems.registry import Outcome, theorem
from dfmath.theorems.run import model, noise_levels, verify

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})

# %% [markdown]
# ## 1. A statement and its check
#
# A check gets a `Case`: a prior at one noise level, with queries where it is interesting (half drawn from $q$, half between neighbours), what the library
# computes there, and `case.model.truth`, the density by its definition in extended precision. It returns an `Outcome`: how far the two sides are apart,
# what is allowed, and why. Here the left side is a finite difference of the true $\log q$ in $\sigma^2$; the right one is the library's.


# %%
@theorem(
    "9.1", "Heat equation", r"\partial_{\sigma^2} \log q = \frac12 (|s|^2 - \mathrm{tr} F)", "de Bruijn; Stam 1959"
)
def heat_equation(case):
    """The truth's central difference in sigma^2, at fixed alpha, against the library's score and trace."""
    return against_heat(case, 0.5 * ((case.score**2).sum(axis=1) - case.fisher_trace))


def against_heat(case, claimed):
    """Richardson's extrapolation of central differences with steps h and h/2: wrong by h^4."""

    def slope(h):
        sigmas = (case.sigma * np.sqrt(np.longdouble(1.0) + sign * h) for sign in (1, -1))
        up, down = (case.model.truth.log_density(case.x64, case.alpha, sigma) for sigma in sigmas)
        return (up - down) / (2 * h * case.sigma**2)

    h = 1e-4 / (1.0 + case.covariance_trace.max() / case.rho**2)  # log q turns faster where the posterior is torn
    true = (4 * slope(h / 2) - slope(h)) / 3
    scale = 0.5 * ((case.score**2).sum(axis=1) + case.dim / case.sigma**2 + np.abs(case.fisher_trace))
    reason = "1e-10 promised; a difference of extended precision over such steps keeps ten digits"
    return Outcome(relative(claimed[:, None], true[:, None], scale), 1e-9, reason)


@theorem("9.2", "Stein's identity", r"E[\langle x, s \rangle] = -d", "Stein 1972")
def stein(case):
    """Over 512 samples of q; the threshold is in standard errors, so that chance fails it once in 5e8."""
    x = case.host(case.samples)
    return standard_errors((x * case.sample_scores).sum(axis=1), expected=-case.dim)


@theorem("9.3", "Log-concave after noise", r"F \succeq 0", "a conjecture, and false")
def log_concave_after_noise(case):
    """The smallest eigenvalue of sigma^2 F must not be negative."""
    least = case.sigma**2 * case.host(case.fisher.eigvalsh())[:, 0]
    return Outcome(excess(0.0, least, 1.0), case.precision, case.promise)


# %% [markdown]
# **Learnt:** the two sides must come from different places, or the check only tests that code equals itself. Run the cell again after a change: a function
# of the same name replaces its theorem, while a number that another one has is refused.
#
# ## 2. Run it
#
# On the digits, and on a mixture fitted to them. `verify` is the function behind `dfmath verify`; with these checks in a file `mine.py`, the command
# `dfmath verify --theorems mine.py --only 9 --data points.npy --report report.html` does the same for your points, and writes the page.

# %%
points = digits()[:300] if SHORT else digits()
levels = noise_levels(80.0, 0.02, 6 if SHORT else 8)
subjects = {"the digits": model(points), "three Gaussians fitted to them": model(points, mixture=3)}
results = {
    name: {r.theorem.number: r for r in verify(subject, levels, only=["9"])} for name, subject in subjects.items()
}
for name, found in results.items():
    console().print(theorem_table(found.values(), name))

# %%
for found in results.values():
    assert found["9.1"].verdict == "pass", "the heat equation holds for every q"
    assert found["9.2"].verdict == "pass", "Stein's identity holds for every q"
    assert found["9.3"].verdict == "fail", "data in several places: F has negative eigenvalues between them"

# %% [markdown]
# ## 3. Where it breaks
#
# The whole record is kept, level by level: a discrepancy over its threshold of more than 1 is a counterexample, with the noise level it was found at.

# %%
figure, axis = plt.subplots(figsize=(6.4, 3.8))
for (number, result), marker in zip(results["the digits"].items(), "os^", strict=True):
    ratio = [max(level.discrepancy / level.threshold, 1e-7) for level in result.levels]
    axis.loglog([level.rho for level in result.levels], ratio, marker=marker, label=f"{number} {result.theorem.title}")
axis.axhline(1.0, color="black", linestyle="--", linewidth=0.9)
axis.text(levels[0], 2.0, "refuted", ha="right")
axis.set(xlabel=r"$\rho$", ylabel="discrepancy / threshold", title="Three claims on the digits")
axis.legend(fontsize=8)
plt.show()

# %%
broken = [level.rho for level in results["the digits"]["9.3"].levels if level.discrepancy > level.threshold]
print("9.3 is refuted at rho =", [round(rho, 3) for rho in broken])
assert broken and max(broken) < levels[0], "enough noise does make it true: at rho = 80 the data are one point"

# %% [markdown]
# **Learnt:** a false claim is refuted with a place to look at. And the refutation says where the claim *is* true: in $\rho > D/2$ for data of diameter $D$ [MATH 1.7].
#
# ## 4. Would a wrong theorem be noticed?
#
# A check that nothing can fail is worth nothing. So break the statement, here by the sign of the trace, which published code has had wrong elsewhere.


# %%
@theorem(
    "9.4",
    "Heat equation, sign reversed",
    r"\partial_{\sigma^2} \log q = \frac12 (|s|^2 + \mathrm{tr} F)",
    "a planted fault",
)
def wrong_heat_equation(case):
    """As 9.1, with the other sign."""
    return against_heat(case, 0.5 * ((case.score**2).sum(axis=1) + case.fisher_trace))


planted = verify(subjects["the digits"], levels, only=["9.4"])[0]
print(
    planted.theorem.title,
    "->",
    planted.verdict,
    f"(off by {planted.worst.discrepancy:.1e}, allowed {planted.worst.threshold:.0e})",
)
assert planted.verdict == "fail", "the check tells the right sign from the wrong one"
assert all(level.discrepancy > level.threshold for level in planted.levels), "at every noise level"

# %% [markdown]
# **Learnt:** plant the fault you fear, and see it caught, before you trust a check.
#
# **Limits.** A pass is no proof: it says that no counterexample was found among eight queries at each of eight levels on this prior. Run it on your own points,
# `model(np.load("points.npy"))`, in float32 (`dtype="float32"`) and on another backend, as the built-in theorems are.
