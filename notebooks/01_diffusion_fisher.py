# %% [markdown]
# # The diffusion Fisher in ten minutes
#
# A diffusion model noises data, $x = \alpha x_0 + \sigma \epsilon$, and learns the score of the noised density,
# $s = \nabla \log q$. The **diffusion Fisher** is one derivative further:
#
# $$F(x) = -\nabla^2 \log q(x) = \frac{I}{\sigma^2} - \frac{\alpha^2}{\sigma^4} P(x), \qquad P(x) = \mathrm{Cov}[x_0 \mid x].$$
#
# It decides how trajectories spread, what a likelihood costs and where guidance leads. For empirical data and Gaussian
# mixtures it has a closed form, so no network and no differentiation is needed to look at it.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm

import dfmath
from dfmath.datasets import digits
from dfmath.profile import fisher_profile

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})

# %% [markdown]
# ## 1. What F looks like
#
# Three data points in the plane. At each place $x$ the posterior weights are $w_i \propto \exp(-|x - \alpha y_i|^2/2\sigma^2)$,
# and $P = \sum_i w_i (y_i - m)(y_i - m)^T$ is drawn as an ellipse: what we still do not know about $x_0$ once we have seen $x$.

# %%
points = np.array([[0.0, 1.2], [-1.0, -0.6], [1.1, -0.5]])
prior = dfmath.PointMasses(points)
sigma = 0.5
q = prior.diffuse(alpha=1.0, sigma=sigma)

side = np.linspace(-2.0, 2.0, 41)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
density = np.exp(q.log_density(grid)).reshape(41, 41)
least = sigma**2 * q.fisher(grid).eigvalsh()[:, 0].reshape(41, 41)  # smallest eigenvalue of sigma^2 F

# %%
nodes = grid.reshape(41, 41, 2)[4:40:4, 4:40:4].reshape(-1, 2)
spread, axes_of = q.fisher(nodes).posterior_covariance().eigh()
circle = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 60)), np.sin(t)])
ellipses = 0.25 * axes_of @ (np.sqrt(np.maximum(spread, 0.0))[:, :, None] * circle)  # (n, 2, 60)

figure, axis = plt.subplots(figsize=(6.4, 5.0))
norm = TwoSlopeNorm(vcenter=0.0, vmin=-3.0, vmax=1.0)
place = {"origin": "lower", "extent": (-2.0, 2.0, -2.0, 2.0), "interpolation": "bilinear"}
shade = axis.imshow(least, cmap="RdBu", norm=norm, alpha=0.7, **place)
axis.contour(side, side, density, colors="0.35", linewidths=0.6)
for node, ellipse in zip(nodes, ellipses, strict=True):
    axis.plot(*(node[:, None] + ellipse), color="black", linewidth=0.9)
axis.plot(*points.T, "*", color="gold", markeredgecolor="black", markersize=14, label="data")
figure.colorbar(shade, label=r"smallest eigenvalue of $\sigma^2 F$", extend="min")
axis.set(
    xlabel="$x_1$",
    ylabel="$x_2$",
    aspect="equal",
    title=r"Posterior covariance $P$ (ellipses) and where $F$ is negative",
)
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# **Learnt:** $F = I/\sigma^2$ wherever one point explains $x$ (small ellipses, blue), and $F$ is smallest on the borders
# between points. There it is negative (red): $q$ is not log-concave, and trajectories that differ a little will part.

# %%
assert least.min() < 0.0 < least.max(), "between points that are more than 2 sigma apart F has a negative eigenvalue"
assert (sigma**2 * q.fisher(grid).eigvalsh() <= 1.0 + 1e-12).all(), "P is positive semidefinite, so F <= I/sigma^2"

# %% [markdown]
# ## 2. F is a derivative, taken without differentiating
#
# `q.fisher(x)` is an operator: a trace, products, eigenvalues, a certificate of its own rounding. It has to agree with
# finite differences of the score, $F v \approx -(s(x + h v) - s(x - h v))/2h$, as well as these know it.

# %%
x = q.sample(5, seed=0)
v = np.random.default_rng(1).standard_normal(x.shape)
F, h = q.fisher(x), 1e-5
difference = -(q.score(x + h * v) - q.score(x - h * v)) / (2 * h)
print("F v            ", F.matvec(v)[0])
print("by differences ", difference[0])
print("trace          ", F.trace())
print("certified error", F.error_bound().max())
assert np.allclose(F.matvec(v), difference, rtol=1e-7, atol=1e-7), "the closed form is minus the score's derivative"
assert np.allclose(F.trace(), F.eigvalsh().sum(axis=1)), "the trace is the sum of the eigenvalues"

# %% [markdown]
# **Learnt:** one sweep over the data gives any form of $F$; a $d \times d$ matrix is only made if you ask for it.
#
# ## 3. Why not write it yourself?
#
# The usual code expands $|x - \alpha y|^2 = |x|^2 - 2\alpha x \cdot y + \alpha^2 |y|^2$ and takes a softmax. At low noise that
# subtracts huge numbers. The truth here is the definition in NumPy's long double, from differences.


# %%
def usual_trace(y, x, sigma):
    """tr P as it is usually written, in the arrays' own precision."""
    square = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)
    logits = -square / (2 * sigma**2)
    w = np.exp(logits - logits.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    return w @ (y**2).sum(1) - ((w @ y) ** 2).sum(1)


def true_trace(y, x, sigma):
    """tr P by its definition, from differences, in extended precision."""
    y, x = y.astype(np.longdouble), x.astype(np.longdouble)
    logits = -((x[:, None] - y) ** 2).sum(2) / (2 * np.longdouble(sigma) ** 2)
    w = np.exp(logits - logits.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    m = w @ y
    return (w * ((y - m[:, None]) ** 2).sum(2)).sum(1)


rng = np.random.default_rng(0)
cloud = (rng.standard_normal((400, 2)) + np.array([3.0, -2.0])).astype(np.float32)
nearest = ((cloud[:40, None] - cloud) ** 2).sum(2) + 1e9 * np.eye(40, 400)
midway = (cloud[:40] + cloud[nearest.argmin(1)]) / 2  # where the posterior hesitates between neighbours

levels, errors = np.geomspace(3.0, 0.001, 15), {"usual code, float32": [], "dfmath, float32": [], "dfmath, float64": []}
for level in levels:
    truth = true_trace(cloud, midway, level)
    found = {
        "usual code, float32": usual_trace(cloud, midway, np.float32(level)),
        "dfmath, float32": dfmath.PointMasses(cloud)
        .diffuse(1.0, float(level))
        .fisher(midway)
        .posterior_covariance()
        .trace(),
        "dfmath, float64": dfmath.PointMasses(cloud.astype(float))
        .diffuse(1.0, float(level))
        .fisher(midway.astype(float))
        .posterior_covariance()
        .trace(),
    }
    seen = truth > 1e-25  # below, nothing is left of the posterior but one point
    for name, values in found.items():
        errors[name].append(float((np.abs(values - truth)[seen] / truth[seen]).max()))

figure, axis = plt.subplots(figsize=(6.4, 3.8))
for (name, values), marker in zip(errors.items(), "os^", strict=True):
    axis.loglog(levels, np.maximum(values, 1e-17), marker=marker, markersize=4, label=name)
axis.axhline(1.0, color="0.5", linewidth=0.8)
axis.set(xlabel=r"$\sigma$", ylabel="worst relative error of tr $P$", title="400 points around (3, -2), 40 queries")
axis.legend()
plt.show()

# %%
print({name: f"{max(values):.0e}" for name, values in errors.items()})
assert max(errors["dfmath, float64"]) < 1e-10, "float64 is promised to 1e-10"
assert max(errors["dfmath, float32"]) < 1e-5, "float32 is promised to 1e-5"
assert max(errors["usual code, float32"]) > 0.1, "the usual code loses all digits somewhere"

# %% [markdown]
# **Learnt:** low noise is where second-order code breaks; the usual code is wrong there without a warning.
#
# ## 4. Real data: how much noise until the data disappear
#
# On 1797 handwritten digits, $\rho = \sigma/\alpha$ is all that counts. $\mathrm{tr}(\rho^2 F)/d = 1 - \mathrm{tr} P/(\rho^2 d)$ is near 1 where
# noise is larger than the data ($P$ is theirs, and $\rho^2$ larger still) or where the posterior is a single digit ($P = 0$). Its dip
# is where the data's variance is as large as the noise and not yet resolved.

# %%
data = dfmath.PointMasses(digits())
levels = np.geomspace(30.0, 0.05, 8 if SHORT else 16)
profiles = [fisher_profile(data, float(level), n=8 if SHORT else 32) for level in levels]
trace = np.array([p.trace for p in profiles])
error = np.array([p.trace_error for p in profiles])
rank = np.array([np.nan if p.effective_rank is None else p.effective_rank for p in profiles])

figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6))
left.semilogx(levels, trace, "o-", markersize=4)
left.fill_between(levels, trace - 2 * error, trace + 2 * error, alpha=0.3)
left.set(xlabel=r"$\rho$", ylabel=r"$\mathrm{tr}(\rho^2 F)/d$", title="Trace, with two standard errors")
right.semilogx(levels, rank, "o-", color="C1", markersize=4)
right.set(xlabel=r"$\rho$", ylabel=r"$(\mathrm{tr} P)^2/|P|_F^2$", title="Directions the posterior spreads in")
plt.show()

# %% [markdown]
# **Learnt:** between the two ends lies a band of noise levels where everything about the data is decided, and there $I/\sigma^2 - F$
# has few directions: the outer-product span of the paper (Wang et al., ICML 2025).
#
# **Limits.** These are the data's own $F$, not a network's: a diffusion model trained on the digits has another density, which generalises.
# The cost is O(N d) for each query. For networks see notebook 5.

# %%
low, middle, high = trace[-1], trace.min(), trace[0]
print(f"tr(rho^2 F)/d: {high:.3f} at rho = 30, {middle:.3f} at least, {low:.3f} at rho = 0.05")
assert high > 0.99 and low > 0.99, "at both ends F is I/sigma^2"
assert middle < 0.95, "and between them it is not"
