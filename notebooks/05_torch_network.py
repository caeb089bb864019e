# %% [markdown]
# # Wrap a torch network: DF-TM and DF-EA
#
# A score network knows $s$; its Fisher costs differentiation. The paper (Wang et al., ICML 2025) replaces it twice:
#
# - **DF-TM**: a small head learns the trace, $\mathrm{tr} F = d/\sigma^2 - (\alpha^2/\sigma^4)(E[|x_0|^2 \mid x] - |m|^2)$;
# - **DF-EA**: products use the trajectory's end $\hat x$, $F v \approx v/\sigma^2 - (\alpha^2/\sigma^4)\,[\hat x \hat x^T - m m^T] v$.
#
# Here both stand beside the truth: a mixture whose $F$ is known, and a network that has seen nothing of it but samples.

# %%
import os
from importlib.util import find_spec

if find_spec("torch") is None:
    raise SystemExit("this notebook needs the torch extra: pip install -c constraints.txt -e '.[torch]'")

import matplotlib.pyplot as plt
import numpy as np
import torch
from dfmath.integrations.adjoint import adjoint, run
from dfmath.integrations.likelihood import network_log_likelihood
from dfmath.integrations.torch import ScoreNetwork, symmetry_defect
from dfmath.integrations.trace_matching import train_trace_model
from dfmath.integrations.training import TrainingPlan

import dfmath
from dfmath.approximations import EndpointFisher
from dfmath.schedules import EDM
from dfmath.solvers import scheme

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
torch.manual_seed(0)
torch.set_num_threads(1)  # small layers gain nothing from more

# %% [markdown]
# ## 1. A truth, and a network trained on its samples
#
# Five Gaussians in 16 dimensions. The network is a denoiser $D(z, \rho)$ in EDM's preconditioning, trained on $|D(x_0 + \rho\epsilon, \rho) - x_0|^2$.

# %%
d, low, high = 16, 0.05, 20.0
rng = np.random.default_rng(0)
factors = rng.standard_normal((5, d, d)) * np.geomspace(0.5, 0.03, d) / 2
covariances = factors @ factors.swapaxes(1, 2) + 0.01 * np.eye(d)
truth = dfmath.GaussianMixture(torch.tensor(rng.standard_normal((5, d))), torch.tensor(covariances))
samples = truth.sample(20_000, seed=1).float()
size = samples.std().item()


class Denoiser(torch.nn.Module):
    """D(z, rho) = c_skip z + c_out net(c_in z, log rho)."""

    def __init__(self, width=128):
        super().__init__()
        layers = [torch.nn.Linear(d + 1, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.body, self.last = torch.nn.Sequential(*layers), torch.nn.Linear(width, d)

    def forward(self, z, rho):
        """Predict x0 from z (B, d) at noise-to-signal ratios rho (B,)."""
        rho = rho[:, None]
        total = torch.sqrt(size**2 + rho**2)
        seen = torch.cat([z / total, torch.log(rho) / 4], dim=1)
        return (size / total) ** 2 * z + size * rho / total * self.last(self.body(seen))


module = Denoiser()
steps = 800 if SHORT else 2500
optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    clean = samples[torch.randint(len(samples), (256,))]
    rho = torch.exp(torch.empty(256).uniform_(np.log(low), np.log(high)))
    noisy = clean + rho[:, None] * torch.randn_like(clean)
    weight = (size**2 + rho**2) / (size * rho) ** 2
    loss = (weight[:, None] * (module(noisy, rho) - clean) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()

network = ScoreNetwork(module, EDM(low / 2, 2 * high), "denoiser")  # the time of EDM's schedule is rho
q = truth.diffuse(1.0, 0.3)
x = q.sample(256, seed=2).float()
F, score = network.fisher(x, t=0.3), q.score(x.double())
off = (network.score(x, 0.3) - score).norm() / score.norm()
skew = symmetry_defect(F, probes=8, seed=0).mean()
print(f"score off by {off:.1%} at rho = 0.3; symmetry defect of its Jacobian {skew:.3f}")
assert off < 0.5, "the network has learnt something"
assert skew < 0.5, "a learnt score is nearly a gradient"

# %% [markdown]
# **Learnt:** any module becomes a model of the density by one line that says what it predicts. Its Jacobian is not quite symmetric: a network's
# field is nearly a gradient, and no theorem makes it one.
#
# ## 2. Traces: DF-TM, its local loss, and probes
#
# The head rides on the network's own features. `form="paper"` regresses $|x_0|^2/d$; `form="local-loss"` the sample's own denoising loss
# $|\epsilon - \epsilon_\theta|^2/d$, with $\mathrm{tr} F = (d - l)/\sigma^2$: no cancellation of $1/\sigma^4$ terms.

# %%
plan = TrainingPlan(steps=300 if SHORT else 1200, rate=2e-3)
heads = {
    form: train_trace_model(network, samples, plan, form, rho=(low, high), features="body").model
    for form in ("local-loss", "paper")
}

levels = np.geomspace(low, high, 5 if SHORT else 9)
errors = {name: [] for name in ("DF-TM (paper)", "local loss", "Hutchinson, 1 probe", "exact autodiff")}
for level in map(float, levels):
    x = truth.diffuse(1.0, level).sample(256, seed=3)
    right, states = truth.diffuse(1.0, level).fisher(x).trace(), x.float()
    v = 2.0 * torch.randint(0, 2, states.shape) - 1.0
    F = network.fisher(states, level)
    ways = (heads["paper"](states, level), heads["local-loss"](states, level), (v * F.matvec(v)).sum(1), F.trace())
    for name, trace in zip(errors, ways, strict=True):
        errors[name].append((level**2 / d * (trace - right).abs()).median().item())

figure, axis = plt.subplots(figsize=(6.4, 3.8))
for (name, values), marker in zip(errors.items(), "os^v", strict=True):
    axis.loglog(levels, values, marker=marker, markersize=4, label=name)
axis.set(
    xlabel=r"$\rho$", ylabel=r"median $\sigma^2 |T - \mathrm{tr} F|/d$", title="Traces of one network, beside the truth"
)
axis.legend()
plt.show()

# %%
print({name: [f"{value:.0e}" for value in values] for name, values in errors.items()})
assert errors["DF-TM (paper)"][0] > 10 * errors["local loss"][0], "the paper's form cancels at low noise [MATH 4.2]"
assert errors["local loss"][0] < 0.3, "the local loss does not [MATH 4.3]"
assert np.mean(errors["local loss"]) < np.mean(errors["Hutchinson, 1 probe"]), "and it is nearer than one probe"

# %% [markdown]
# **Learnt:** the paper's regression needs a relative accuracy of $\sigma^2/\alpha^2$, and loses it at low noise. The same head with the local loss
# is below one probe's error on average over the levels, in the evaluation that gives the score anyway.
#
# ## 3. Products: DF-EA
#
# $\hat x$ comes from 40 steps of Heun's method. Beside the paper's form: the centred one, $P \approx (\hat x - m)(\hat x - m)^T$, no $P$ at all, and the
# network's own Jacobian.

# %%
names = ("paper (DF-EA)", "centred", "P left out", "network's Jacobian")
products = {name: [] for name in names}
for level in map(float, levels[1:]):
    x = truth.diffuse(1.0, level).sample(128, seed=4)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    right, states = truth.diffuse(1.0, level).fisher(x).matvec(v), x.float()
    end = run(network, scheme("heun", np.geomspace(level, low, 41).tolist()), states).end.double()
    mean = network.posterior_mean(states, level).double()
    found = [EndpointFisher(end, mean, 1.0, level, variant).matvec(v) for variant in ("paper", "centred")]
    found += [v / level**2, network.fisher(states, level).matvec(v.float()).double()]
    for name, product in zip(names, found, strict=True):
        products[name].append(((product - right).norm(dim=1) / right.norm(dim=1)).median().item())

figure, axis = plt.subplots(figsize=(6.4, 3.8))
for (name, values), marker in zip(products.items(), "os^v", strict=True):
    axis.loglog(levels[1:], values, marker=marker, markersize=4, label=name)
axis.set(xlabel=r"$\rho$", ylabel=r"median $|F_{EA} v - F v|\,/\,|F v|$", title="Products, beside the truth")
axis.legend()
plt.show()

# %%
assert products["paper (DF-EA)"][0] > products["centred"][0], (
    "the cross terms of the paper's form grow at low noise [MATH 4.6]"
)
assert products["network's Jacobian"][-1] < 0.1, "at high noise F is I/sigma^2, and the network knows"

# %% [markdown]
# **Learnt:** the endpoint is a rank-one guess of $P$. For a single product the paper's form is worse than leaving $P$ out, and the centred one
# about as good. Whether a gradient through the whole sampler can live with that is the next question.
#
# ## 4. What it is for: a likelihood and a gradient
#
# The likelihood by three traces, and the gradient of $|x_0|^2$ at the sampler's end by its adjoint, $\mu \leftarrow \mu + \rho F \mu$ step by step.

# %%
x = truth.diffuse(1.0, low).sample(32 if SHORT else 64, seed=6)
right = truth.diffuse(1.0, low).log_density(x)
miss = {}
for name, way in {"exact": "exact", "hutchinson": "hutchinson", "local-loss head": heads["local-loss"]}.items():
    found = network_log_likelihood(network, x.float(), low, high, trace=way, steps=20)
    miss[name] = ((found.log_density.double() - right).abs() / d).median().item()
print("log-likelihood, median error in nats per dimension:", {name: round(value, 3) for name, value in miss.items()})

start = high * torch.randn((32, d), generator=torch.Generator().manual_seed(7))
path = run(network, scheme("ddim", np.geomspace(high, low, 41).tolist()), start)
gradient = {
    product: adjoint(path, 2 * path.end, product) for product in ("vjp", "difference", "none", "centred", "paper")
}
cosine = {k: torch.cosine_similarity(g, gradient["vjp"]).median().item() for k, g in gradient.items()}
print("cosine with the exact gradient:", {name: round(value, 3) for name, value in cosine.items()})

# %%
assert miss["local-loss head"] < 0.5, "a head that rides along gives a usable likelihood"
assert cosine["difference"] > 0.9, "one more evaluation, no differentiation: nearly the exact gradient"

# %% [markdown]
# **Learnt:** for likelihoods use the local-loss head; for gradients start with `"difference"`, and measure what is cheaper against `"vjp"`
# on your own network before you rely on it.
#
# **Limits.** A network trained for seconds on 16 dimensions. `dfmath reproduce` does this at length on 64 (its tables are in benchmarks/results);
# on images of hundreds of thousands of dimensions the order of the methods has to be measured again: notebook 6 says how.
