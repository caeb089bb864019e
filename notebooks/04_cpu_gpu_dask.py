# %% [markdown]
# # From CPU to GPU to Dask
#
# The mathematics is written once against the Python array API. Which library computes follows from the arrays that you bring: compiled
# kernels for NumPy, torch and CuPy on their device, parts of a file or a cluster for what fits nowhere. The results are the same to
# rounding, because **posterior moments merge**: with a log-mass $l$, a mean $m$ and a covariance $P$ from each of two disjoint sets of points,
#
# $$w = \frac{e^{l_1}}{e^{l_1} + e^{l_2}}, \qquad m = w m_1 + (1 - w) m_2, \qquad
#   P = w P_1 + (1 - w) P_2 + w (1 - w) (m_1 - m_2)(m_1 - m_2)^T .$$

# %%
import os
import tempfile
from importlib.util import find_spec

import matplotlib.pyplot as plt
import numpy as np

import dfmath
from dfmath.datasets import digits

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})

points = digits()
sigma = 0.6
x = dfmath.PointMasses(points).diffuse(1.0, sigma).sample(8 if SHORT else 64, seed=0)

# %% [markdown]
# ## 1. Moments merge
#
# The equation above, by hand, on two halves of the digits; weights and masses are those of the whole, so each half counts for one half.

# %%
half = len(points) // 2
parts = [points[:half], points[half:]]
share = [len(part) / len(points) for part in parts]
answers = [dfmath.PointMasses(part).diffuse(1.0, sigma) for part in parts]
mass = [np.exp(q.log_density(x)) * s for q, s in zip(answers, share, strict=True)]
means = [q.posterior_mean(x) for q in answers]
traces = [q.fisher(x).posterior_covariance().trace() for q in answers]
w, u = (part / (mass[0] + mass[1]) for part in mass)  # u is 1 - w, without its cancellation
m = w[:, None] * means[0] + u[:, None] * means[1]
trace = w * traces[0] + u * traces[1] + w * u * ((means[0] - means[1]) ** 2).sum(axis=1)

whole = dfmath.PointMasses(points).diffuse(1.0, sigma)
error = np.abs(trace / whole.fisher(x).posterior_covariance().trace() - 1.0).max()
print(f"tr P of the whole from two halves: off by {error:.0e}")
assert np.allclose(m, whole.posterior_mean(x), rtol=1e-10, atol=1e-12), "means merge"
assert error < 1e-10, "covariances merge, with the distance of the means between them"

# %% [markdown]
# **Learnt:** nothing grows with the number of points but time. Files, devices and clusters are this merge, done often (and in logarithms:
# in higher dimensions $e^l$ would not fit a float64).
#
# ## 2. The same lines with other arrays
#
# Everything below computes $\mathrm{tr} F$ by one function, which is never told what it runs on.

# %%
LEVELS = np.geomspace(10.0, 0.1, 4 if SHORT else 9)


def host(array):
    """NumPy's numbers of any library's array."""
    array = array.cpu() if hasattr(array, "cpu") else array.get() if hasattr(array, "get") else array
    return np.asarray(array, dtype=np.float64)


def traces_of(prior, like):
    """tr F at noised queries of each level; `like` turns NumPy arrays into the prior's kind."""
    noise = np.random.default_rng(1).standard_normal(x.shape)
    return np.array([host(prior.diffuse(1.0, float(r)).fisher(like(x + r * noise)).trace()) for r in LEVELS])


found = {"NumPy, float64": traces_of(dfmath.PointMasses(points), np.asarray)}
found["NumPy, float32"] = traces_of(dfmath.PointMasses(points.astype(np.float32)), np.float32)
if find_spec("torch") is None:
    print("torch: skipped, it is not installed")
else:
    import torch

    found["torch, float64"] = traces_of(dfmath.PointMasses(torch.tensor(points)), torch.tensor)

# %% [markdown]
# ## 3. On a GPU
#
# With torch the array says where; CuPy's arrays are on its device. Where there is no device, these cells say so and go on.

# %%
if find_spec("torch") is None or not torch.cuda.is_available():
    print("torch on a GPU: skipped, there is no torch that sees a CUDA device here")
else:
    prior = dfmath.PointMasses(torch.tensor(points, device="cuda"))
    found["torch on a GPU"] = traces_of(prior, lambda a: torch.tensor(a, device="cuda"))

# %%
try:
    import cupy

    cupy.zeros(1)
except ImportError:
    print("CuPy: skipped, it is not installed (pip install -c constraints.txt -e '.[gpu]')")
except RuntimeError as reason:
    print(f"CuPy: skipped, {reason}")
else:
    found["CuPy"] = traces_of(dfmath.PointMasses(cupy.asarray(points)), cupy.asarray)

# %% [markdown]
# ## 4. A file larger than memory, a cluster
#
# `from_file` loads up to `memory` bytes and reads larger files anew at each evaluation; with `memory=0` even this small one stays on the disk.
# A prior of a Dask array asks the workers of the client that is there, or threads of this process. For two processes:
# `Client(LocalCluster(n_workers=2, threads_per_worker=1))` before the prior is made; for Slurm and GPUs see docs/scaling.md.

# %%
folder = tempfile.TemporaryDirectory()
np.save(f"{folder.name}/points.npy", points)
streamed = dfmath.PointMasses.from_file(f"{folder.name}/points.npy", memory=0)
print(type(streamed.components).__name__, streamed)
found["a file"] = traces_of(streamed, np.asarray)

if find_spec("dask") is None:
    print("Dask: skipped, it is not installed (pip install -c constraints.txt -e '.[dask]')")
else:
    import dask.array

    scattered = dfmath.PointMasses(dask.array.from_array(points, chunks=(500, 64)))
    print(type(scattered.components).__name__, scattered)
    found["Dask, 4 chunks"] = traces_of(scattered, np.asarray)

# %% [markdown]
# ## 5. They agree

# %%
truth = found["NumPy, float64"]
others = {name: np.abs(values / truth - 1.0).max(axis=1) for name, values in found.items() if values is not truth}
figure, axis = plt.subplots(figsize=(6.4, 3.6))
for (name, values), marker in zip(others.items(), "os^vD*", strict=False):
    axis.loglog(LEVELS, np.maximum(values, 1e-17), marker=marker, markersize=5, label=name)
axis.set(
    xlabel=r"$\rho$",
    ylabel="largest relative difference of tr $F$",
    title="Beside NumPy in float64; 1e-17 is none at all",
)
axis.legend()
plt.show()

# %%
for name, values in others.items():
    promise = 1e-5 if "float32" in name else 1e-10
    assert values.max() < promise, f"{name} is promised to {promise:g}"

# %% [markdown]
# **Learnt:** the same lines, the same numbers. What you choose by the kind of array is where the work is done.
#
# **Limits.** On a CPU the compiled kernels for NumPy arrays are the fastest of these; JAX and other libraries run on the array-API reference, which is
# many times slower. A file is read once for each evaluation, so give it many queries at a time.
