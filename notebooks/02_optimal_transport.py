# %% [markdown]
# # Is my PF-ODE an optimal transport map?
#
# The probability-flow ODE carries noise to data without randomness. Is that map the cheapest one, in squared distance, that
# does so? By Brenier's theorem it is exactly when its Jacobian $A$ is **symmetric positive semidefinite** everywhere. In
# $z = x/\alpha$ and $\rho = \sigma/\alpha$ the Jacobian has an equation of its own, and $F$ is all that it needs:
#
# $$\frac{dz}{d\log\rho} = -\rho^2 s(z; \rho), \qquad \frac{dA}{d\log\rho} = \rho^2 F(z; \rho)\, A, \qquad A(\rho_{\max}) = I.$$

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import dfmath
from dfmath import plots
from dfmath.datasets import digits
from dfmath.transport import asymmetry, official_points, official_schedules

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
STARTS = 8 if SHORT else 24
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})

# %% [markdown]
# ## 1. Three points
#
# The published experiment: three points off a line, and three on one. `ot_check` integrates $z$ and $A$ together, each
# trajectory with an error control of its own, and measures $|A - A^T|_F / 2|A|_F$, which is 0 for symmetric matrices.

# %%
cases = {"off a line": official_points(), "on a line": official_points(collinear=True)}
reports = {name: dfmath.ot_check(prior, n=STARTS, start="gaussian") for name, prior in cases.items()}
for name, report in reports.items():
    print(
        f"{name:10}  asymmetry {report.asymmetry.mean:.1e} +- {report.asymmetry.standard_error:.0e}"
        f"   smallest eigenvalue {report.min_eigenvalue.values.min():+.0e}   a transport map: {report.is_transport}"
    )
assert not reports["off a line"].is_transport, "off a line the posterior covariances do not commute"
assert reports["on a line"].is_transport, "on a line they do, so A is symmetric"

# %%
plt.close(plt.figure())  # from here on, notebooks show figures that were made without pyplot, too
figure = plots.trajectories([(name, cases[name], r) for name, r in reports.items()], 80.0, 0.02, shown=16)
figure.set_size_inches(10.4, 4.6)
figure.set_dpi(80)
figure

# %%
# Is A what it claims to be, the derivative of the map? The flow itself, from starts that are moved a little, says so.
prior, report, h = cases["off a line"], reports["off a line"], 0.1
ends = [
    [dfmath.probability_flow(prior, report.starts[:4] + sign * h * e, 80.0, 0.02).x for sign in (1, -1)]
    for e in np.eye(2)
]
quotient = np.stack([(up - down) / (2 * h) for up, down in ends], axis=2)
error = np.abs(quotient - report.jacobians[:4]).max() / np.abs(report.jacobians[:4]).max()
print(f"A against difference quotients of the flow: off by {error:.0e} of its size")
assert error < 1e-3, "A is the Jacobian of the flow's map"

# %% [markdown]
# **Learnt:** three points are enough for the answer "no". The condition that saves the line is that all $P$ along a
# trajectory commute; it holds for Gaussian data, for products of one-dimensional distributions, and for little else.
#
# ## 2. It cannot depend on the schedule
#
# In $(z, \rho)$ all schedules are the same equation, so VP, VE and EDM have the same $A$. Euler's method in each schedule's own
# time, $x' = f x - \tfrac12 g^2 s$ and $A' = (f I + \tfrac12 g^2 F) A$, differs at few steps, and only there.


# %%
def euler(prior, schedule, z, steps, rho_max=80.0, rho_min=0.02):
    """A = dz/dz_T by Euler's method, with steps that are even in the schedule's time."""
    times = np.linspace(schedule.time(rho_max), schedule.time(rho_min), steps + 1)
    x, A = schedule(times[0])[0] * z, np.broadcast_to(np.eye(2), (len(z), 2, 2))
    for t, dt in zip(times[:-1], np.diff(times), strict=True):
        q, f, g2 = prior.diffuse(*schedule(t)), schedule.drift(t), schedule.diffusion_squared(t)
        slope, turn = f * x - 0.5 * g2 * q.score(x), f * A + 0.5 * g2 * (q.fisher(x) @ A)
        x, A = x + dt * slope, A + dt * turn
    return A * schedule(times[0])[0] / schedule(times[-1])[0]


prior, exact = cases["off a line"], reports["off a line"]
counts = [50, 100, 200] if SHORT else [50, 100, 200, 400, 800]
found = {
    name: [asymmetry(euler(prior, schedule, exact.starts, n)).mean() for n in counts]
    for name, schedule in official_schedules().items()
    if name != "EDM"  # even steps in its time, which is rho, would all be spent on pure noise
}
figure, axis = plt.subplots(figsize=(6.4, 3.6))
for (name, values), marker in zip(found.items(), "os^", strict=True):
    axis.semilogx(counts, values, marker=marker, label=f"Euler in {name} time")
axis.axhline(exact.asymmetry.mean, color="black", linestyle="--", label="ot_check")
axis.set(xlabel="steps", ylabel="mean asymmetry of $A$", title="Three points: what depends on the schedule is error")
axis.set_xticks(counts, counts, minor=False)
axis.minorticks_off()
axis.legend()
plt.show()

# %%
for name, values in found.items():
    first, last = (abs(value - exact.asymmetry.mean) for value in (values[0], values[-1]))
    print(f"{name:7} off by {first:.1e} at {counts[0]} steps, by {last:.1e} at {counts[-1]}")
    assert last < 0.5 * first, "the difference is discretisation error: it falls with the number of steps"

# %% [markdown]
# **Learnt:** if a numerical test says that VP is "closer to optimal" than VE, it has measured its own steps.
#
# ## 3. Your own data
#
# The digits' first two principal components, and a Gaussian of the same mean and covariance. The gap compares the flow's
# pairs $(z_T, z_0)$ with the cheapest matching of the same points: $(\text{mean } |z_T - z_0|^2 - W_2^2)/W_2^2$.

# %%
pixels = digits()
centred = pixels - pixels.mean(axis=0)
plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
data = {
    "digits, two components": dfmath.PointMasses(plane[::4] if SHORT else plane),
    "Gaussian of their covariance": dfmath.GaussianMixture(plane.mean(axis=0)[None], np.cov(plane.T)[None]),
}
own = {name: dfmath.ot_check(prior, rho_max=80.0, rho_min=0.1, n=STARTS) for name, prior in data.items()}
for name, report in own.items():
    print(f"{name:30} asymmetry {report.asymmetry.mean:.1e}   gap {report.transport_gap:.1e}   {report.is_transport}")

figure, axis = plt.subplots(figsize=(6.4, 3.2))
for name, report in own.items():
    axis.semilogy(np.sort(np.maximum(report.asymmetry.values, 1e-16)), "o", markersize=4, label=name)
axis.axhline(report.tolerance, color="0.5", linestyle="--", label="tolerance of the verdict")
axis.set(
    xlabel="trajectory, sorted", ylabel=r"$|A - A^T|_F\,/\,2|A|_F$", title="Symmetric or not, trajectory by trajectory"
)
axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.1))
plt.show()

# %% [markdown]
# **Learnt:** two questions that are easily mixed up. *Is the map optimal?* No, for the digits. *How much dearer is it?* The gap says:
# not at all for these pairs: no other matching of the same points is shorter.
#
# **Limits.** A finite number of trajectories can refute optimality, and never prove it. The gap is exact for these pairs, and is no
# estimate for the densities: swaps that would save a little need starts that lie close together. The data are point masses: at $\rho_{\min} \to 0$ every trajectory ends in a datum and $A$ in 0.

# %%
assert own["Gaussian of their covariance"].is_transport, "Gaussian data: the flow is linear and symmetric"
assert not own["digits, two components"].is_transport, "real data: it is not"
assert all(report.transport_gap >= -1e-9 for report in own.values()), "no matching is cheaper than the cheapest"
