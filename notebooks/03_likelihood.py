# %% [markdown]
# # Exact likelihood, and what Hutchinson costs
#
# A diffusion model's likelihood is an integral of $\mathrm{tr} F$ along the probability flow,
#
# $$\log q_{\rho_0}(z_0) = \log q_{\rho_T}(z_T) - \int_{\rho_0}^{\rho_T} \rho^2\, \mathrm{tr} F(z; \rho)\; d\log\rho .$$
#
# Networks pay for the trace with random probes, $v^T F v$. Here is a distribution whose trace is known in closed form, so that the
# price of the probes can be seen: a Gaussian mixture with full covariances, fitted to the digits.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from sklearn.mixture import GaussianMixture

import dfmath
from dfmath.approximations import hutchinson_trace, hutchpp_trace
from dfmath.bounds import hutchinson_variance
from dfmath.datasets import digits

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})

pixels = digits()  # (1797, 64) in [-1, 1], in steps of 1/8
kept, held_out = pixels[:1500], pixels[1500:1600]
fit = GaussianMixture(10, reg_covar=1e-3, random_state=0).fit(kept)
prior = dfmath.GaussianMixture(fit.means_, fit.covariances_, fit.weights_)
d = prior.dim

# %% [markdown]
# ## 1. The flow's likelihood is the density
#
# `log_likelihood` integrates the flow; `log_density` is the mixture's own formula. They share the trace of $F$ and nothing else.

# %%
low, high = 0.05, 80.0
x = prior.diffuse(1.0, low).sample(8 if SHORT else 32, seed=0)
exact = prior.diffuse(1.0, low).log_density(x)
flow = dfmath.log_likelihood(prior, x, start=low, end=high)
print(
    f"largest difference {np.abs(flow.log_density - exact).max():.1e} nats, {flow.evaluations.mean():.0f} evaluations"
)
assert np.abs(flow.log_density - exact).max() < 1e-5, "both are log q(x), and the flow was asked for 1e-8"

# %% [markdown]
# **Learnt:** the likelihood formula is exact; what networks add are two errors, that of the score and that of the trace. The second is
# next.
#
# ## 2. One trace
#
# A Rademacher probe is unbiased, with variance $2(|F|_F^2 - \sum_i F_{ii}^2)$. Hutch++ spends a third of its products on
# finding where $F$ differs from $I/\sigma^2$, and estimates only the rest.


# %%
def variance(matrices):
    """Of one Rademacher probe, for each of a stack of matrices."""
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    return hutchinson_variance((matrices**2).sum(axis=(1, 2)), (diagonal**2).sum(axis=1))


levels = np.geomspace(high, low, 7 if SHORT else 13)
products = 24
spread = {"one probe, by the formula": [], "one probe, measured": [], f"Hutch++, {products} products": []}
for level in levels:
    q = prior.diffuse(1.0, float(level))
    states = q.sample(16, seed=1)
    F, unit = q.fisher(states), level**2 / d  # errors in units of d/sigma^2
    n = 64
    probes = hutchinson_trace(F, states, n, seed=2)
    sketched = hutchpp_trace(F, states, products, seed=3, shift=1.0 / level**2)
    spread["one probe, by the formula"].append(unit * np.sqrt(variance(F.to_dense()).mean()))
    spread["one probe, measured"].append(unit * np.sqrt((n * probes.standard_error**2).mean()))
    spread[f"Hutch++, {products} products"].append(unit * np.sqrt(((sketched.value - F.trace()) ** 2).mean()))

figure, axis = plt.subplots(figsize=(6.4, 3.8))
for (name, values), style in zip(spread.items(), ("-", "o", "s--"), strict=True):
    axis.loglog(levels, values, style, markersize=5, label=name)
scaled = np.array(spread["one probe, by the formula"]) / np.sqrt(products)
axis.loglog(levels, scaled, ":", color="C0", label=f"{products} probes, by the formula")
axis.set(
    xlabel=r"$\rho$", ylabel=r"standard error of $\sigma^2 \mathrm{tr} F/d$", title="What a stochastic trace is off by"
)
axis.legend()
plt.show()

# %%
ratio = np.array(spread["one probe, measured"]) / np.array(spread["one probe, by the formula"])
print("measured over predicted:", ratio.round(2))
assert (abs(ratio - 1.0) < 0.15).all(), "16 states of 64 probes each know a standard deviation to about 3 percent"

# %% [markdown]
# **Learnt:** probes are worst where the data are resolved, around and below $\rho = 1$; at high noise $F$ is nearly a multiple of the
# identity, and one probe is enough. The sketch helps above $\rho = 1$, a little; below, where $I/\sigma^2 - F$ has as many directions as
# a full-covariance Gaussian has, it wastes a third of its products and is worse than as many plain probes. Measure before you choose.
#
# ## 3. A whole likelihood
#
# The same probe is kept along a trajectory, so that an ODE solver can follow it. What comes out is one Hutchinson estimate of an
# integrated matrix, $v^T M v$ with $M = \int \rho^2 F\, d\log\rho$: its variance is $2(|M|_F^2 - \sum_i M_{ii}^2)$. A fresh probe at
# every one of $n$ points of the grid would average over them.

# %%
points, draws = 60, 200 if SHORT else 1000
grid = np.geomspace(low, high, points)
step = np.log(grid[1] / grid[0])
weight = np.full(points, step)
weight[[0, -1]] = step / 2  # trapezoids in log rho

z, fishers = x[:4], []
for here, there in zip(grid, [*grid[1:], None], strict=True):
    fishers.append(here**2 * prior.diffuse(1.0, float(here)).fisher(z).to_dense())
    if there is not None:
        z = dfmath.probability_flow(prior, z, float(here), float(there), rtol=1e-6).x
fishers = np.stack(fishers)  # rho^2 F along each trajectory, (points, 4, d, d)
M = np.einsum("t,tbij->bij", weight, fishers)

rng = np.random.default_rng(4)
signs = 2.0 * rng.integers(0, 2, (draws, d)) - 1.0
same = np.einsum("ni,bij,nj->nb", signs, M, signs) - np.trace(M, axis1=1, axis2=2)
fresh = np.zeros((draws, 4))
for w, part in zip(weight, fishers, strict=True):
    v = 2.0 * rng.integers(0, 2, (draws, d)) - 1.0
    fresh += w * (np.einsum("ni,bij,nj->nb", v, part, v, optimize=True) - np.trace(part, axis1=1, axis2=2))

bits = 1.0 / (d * np.log(2.0))  # from nats to bits per dimension
predicted = bits * np.sqrt(variance(M))
figure, axis = plt.subplots(figsize=(6.4, 3.6))
bins = np.linspace(-3.5 * predicted[0], 3.5 * predicted[0], 41)
axis.hist(bits * same[:, 0], bins, density=True, alpha=0.6, label="one probe for the whole trajectory")
axis.hist(bits * fresh[:, 0], bins, density=True, alpha=0.6, label=f"a fresh probe at each of {points} points")
t = np.linspace(bins[0], bins[-1], 200)
bell = np.exp(-((t / predicted[0]) ** 2) / 2) / (predicted[0] * np.sqrt(2 * np.pi))
axis.plot(t, bell, color="black", label="Gaussian of the formula's variance")
axis.set(xlabel="error of the likelihood, bits per dimension", ylabel="density", title="One image, many probes")
axis.legend(fontsize=8)
plt.show()

# %%
measured = bits * same.std(axis=0, ddof=1)
print("one probe, bits per dimension: measured", measured.round(3), " predicted", predicted.round(3))
print(
    "probes for 0.01 bits per dimension:",
    np.ceil((predicted / 0.01) ** 2).astype(int),
    " the exact trace:",
    d,
    "products",
)
assert (abs(measured / predicted - 1.0) < (0.35 if SHORT else 0.2)).all(), "the error is that of v^T M v"
assert (fresh.std(axis=0) < same.std(axis=0)).all(), "independent probes average out"

# %% [markdown]
# **Learnt:** with one probe kept along the trajectory, the error of a single image's likelihood does not fall with the number of solver steps.
# In few dimensions the exact trace is cheaper than good statistics. In many, average over images, or predict the trace (notebook 5).
#
# ## 4. What an exact likelihood is worth
#
# Bits per dimension need a bin, here the pixels' step of 1/8: $-\log_2(q\, \Delta^d)/d$. The point masses of the training digits are
# the ideal model of a network that has learnt its data by heart.

# %%
model = {"mixture": prior, "point masses": dfmath.PointMasses(kept)}
levels = np.geomspace(1.0, 0.05, 8)
figure, axis = plt.subplots(figsize=(6.4, 3.8))
curves = {}
for (name, p), colour in zip(model.items(), ("C0", "C1"), strict=True):
    for data, style, which in ((kept[:100], "-", "seen"), (held_out, "--", "held out")):
        noise = np.random.default_rng(5).standard_normal(data.shape)
        curve = [
            -np.mean(p.diffuse(1.0, float(r)).log_density(data + r * noise) / d + np.log(1 / 8)) / np.log(2)
            for r in levels
        ]
        curves[name, which] = curve
        axis.semilogx(levels, curve, style, color=colour, marker="o", markersize=3, label=f"{name}, {which}")
axis.set(
    xlabel=r"noise level $\rho$ of the density",
    ylabel="bits per dimension",
    ylim=(0, 10),
    title="Fewer bits are better",
)
axis.legend()
plt.show()

# %% [markdown]
# **Learnt:** a likelihood belongs to the data *with noise* $\rho_0$; say which. As $\rho_0 \to 0$ the learnt-by-heart model gives the digits it has
# seen any number of bits below zero, and pays for it without bound on others. Compare on held-out data.
#
# **Limits.** Everything here was a closed form. A network's own trace is not that of a density, since its Jacobian is not quite symmetric, and a
# small error of the score says nothing of its slope. Notebook 5 measures that.

# %%
gap = {name: curves[name, "held out"][-1] - curves[name, "seen"][-1] for name in model}
print(
    "held out less seen at the lowest noise, bits per dimension:", {name: round(float(g), 2) for name, g in gap.items()}
)
assert gap["point masses"] > 10 * abs(gap["mixture"]), "what was learnt by heart does not carry over"
