"""diffusers' schedulers beside our reading of them: each family's own noise, prediction and first step."""

from __future__ import annotations

import inspect
import math

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from dfmath.integrations.diffusers import (  # noqa: E402
    DEISSNScheduler,
    convention_of,
    network_from_model,
    schedule_from,
)

from dfmath.normalizers import Normalizer  # noqa: E402
from dfmath.samplers import sample  # noqa: E402
from dfmath.solvers import scheme  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


class Net(torch.nn.Module):
    """A model of diffusers' form that listens to what it is told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, time, return_dict=True):
        told = torch.as_tensor(time, dtype=x.dtype).reshape(-1, 1, 1, 1)
        gain = 1.0 + 0.2 * torch.cos(told / 150.0) + 0.2 * torch.tanh(told)  # hears times of either scale
        return (gain * torch.tanh(self.weight * x + 0.1 * x.flip(1)),)


TABLES = ("epsilon", "sample", "v_prediction")
FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SPACED = {"timestep_spacing": "leading", "steps_offset": 1}  # whole times
FAMILIES = [
    *[("DDIM", {"prediction_type": p, "clip_sample": False, **SPACED}) for p in TABLES],
    *[("DDIMParallel", {"prediction_type": p, "clip_sample": False, **SPACED}) for p in TABLES],
    *[("DPMSolverMultistep", {"prediction_type": p, **SPACED}) for p in TABLES],
    ("DPMSolverMultistep", FLOWS),
    *[("DPMSolverSinglestep", {"prediction_type": p}) for p in TABLES],
    *[("UniPCMultistep", {"prediction_type": p, **SPACED}) for p in TABLES],
    ("UniPCMultistep", FLOWS),
    *[("DEISMultistep", {"prediction_type": p, **SPACED}) for p in TABLES],
    ("DEISMultistep", FLOWS),
    *[("PNDM", {"prediction_type": p, "skip_prk_steps": True, **SPACED}) for p in TABLES if p != "sample"],
    *[("EulerDiscrete", {"prediction_type": p, **SPACED}) for p in TABLES],
    ("EulerDiscrete", {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}),
    *[("HeunDiscrete", {"prediction_type": p, **SPACED}) for p in TABLES if p != "sample"],
    *[("LMSDiscrete", {"prediction_type": p, **SPACED}) for p in TABLES],
    *[("EDMEuler", {"prediction_type": p}) for p in TABLES if p != "sample"],
    *[("EDMDPMSolverMultistep", {"prediction_type": p}) for p in TABLES if p != "sample"],
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("IPNDM", {}),
]
NAMES = ["-".join([name, *(str(v) for v in options.values())]) for name, options in FAMILIES]


def made(name, options):
    if name == "CosineDPMSolverMultistep":
        pytest.importorskip("torchsde")
    return getattr(diffusers, f"{name}Scheduler")(**options)


def ratio(scheduler, sigma):
    """Noise to signal, of what a scheduler calls sigma."""
    straight = "Flow" in type(scheduler).__name__ or getattr(scheduler.config, "use_flow_sigmas", False)
    return sigma / (1.0 - sigma) if straight else sigma


def levels_of(scheduler, i):
    """rho at step i and after it, by what the scheduler itself steps with."""
    if hasattr(scheduler, "sigmas"):
        return tuple(ratio(scheduler, float(scheduler.sigmas[j])) for j in (i, i + 1))
    if hasattr(scheduler, "alphas_cumprod"):
        t = int(scheduler.timesteps[i])
        before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        abars = (float(scheduler.alphas_cumprod[u]) for u in (t, before))
        return tuple(math.sqrt((1.0 - abar) / abar) for abar in abars)
    return tuple(float(scheduler.betas[j] / scheduler.alphas[j]) for j in (i, i + 1))


def step(scheduler, out, t, x):
    extra = {"generator": None} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if "LMS" in type(scheduler).__name__:
        extra = {"order": 1}  # begun in the middle of a grid it has no derivatives of earlier steps
    return scheduler.step(out, t, x, **extra).prev_sample


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=NAMES)
def test_first_steps_are_those_of_the_scheduler(name, options):
    """A first step of every deterministic solver is DDIM's, of what its network is told and of its own tensors."""
    scheduler, net = made(name, options), Net()
    scheduler.set_timesteps(20)
    i = 4
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(i)
    t, (rho, after) = scheduler.timesteps[i], levels_of(scheduler, i)
    convention, network = convention_of(scheduler), network_from_model(net, scheduler)
    z = rho * torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0)) + 0.5
    tensor = convention.tensor(z, rho)
    scaled = scheduler.scale_model_input(tensor, t) if hasattr(scheduler, "scale_model_input") else tensor
    with torch.no_grad():
        theirs = step(scheduler, net(scaled, t)[0], t, tensor)
        ours = sample(network, None, z, solver="ddim", steps=[rho, after]).x
    torch.testing.assert_close(convention.tensor(ours, after), theirs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(convention.states(theirs, after), ours, rtol=2e-5, atol=2e-5 * (1.0 + after))


ADDING = """DDIM DDPM DPMSolverMultistep UniPCMultistep DEISMultistep PNDM LCM TCD SASolver EulerDiscrete HeunDiscrete
    LMSDiscrete EulerAncestralDiscrete KDPM2Discrete KDPM2AncestralDiscrete"""


@pytest.mark.parametrize("name", ADDING.split())
def test_noise_is_added_as_the_scheduler_adds_it(name):
    scheduler = made(name, {"timestep_spacing": "leading"} if name not in ("LCM", "TCD") else {})
    scheduler.set_timesteps(20)
    data, noise = (torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    convention, t = convention_of(scheduler), scheduler.timesteps[6]
    theirs = scheduler.add_noise(data, noise, t.reshape(1).expand(2))
    rho = schedule_from(scheduler).rho(float(t))
    torch.testing.assert_close(convention.tensor(data + rho * noise, rho), theirs, rtol=2e-5, atol=2e-5 * (1.0 + rho))


@pytest.mark.parametrize("prediction", TABLES)
def test_predicted_data_is_that_of_ancestral_samplers(prediction):
    scheduler, net = made("DDPM", {"prediction_type": prediction, "clip_sample": False}), Net()
    scheduler.set_timesteps(20)
    t = scheduler.timesteps[5]
    x = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = scheduler.step(net(x, t)[0], t, x).pred_original_sample
    network = network_from_model(net, scheduler)
    torch.testing.assert_close(network.posterior_mean(x, float(t)), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predicted_data_is_that_of_the_cosine_scheduler(prediction):
    """Its steps are stochastic; what it makes of the network's output is not."""
    scheduler, net = made("CosineDPMSolverMultistep", {"prediction_type": prediction}), Net()
    scheduler.set_timesteps(20)
    i = 4
    scheduler.set_begin_index(i)
    t, rho = scheduler.timesteps[i], float(scheduler.sigmas[i])
    z = rho * torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = scheduler.convert_model_output(net(scheduler.scale_model_input(z, t), t)[0], sample=z)
    network = network_from_model(net, scheduler)
    alpha = float(network.schedule(network.schedule.time(rho))[0])
    ours = network.posterior_mean(alpha * z, network.schedule.time(rho))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_trigonometric_schedulers_have_a_unit():
    scheduler, net = made("SCM", {}), Net()
    scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=1.0)
    t = scheduler.timesteps[0]
    x = 0.5 * torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = scheduler.step(net(x, t)[0], t, x, generator=torch.Generator()).pred_original_sample
    network = network_from_model(net, scheduler)
    found = 0.5 * network.posterior_mean(x / 0.5, float(t) / (0.5 * math.pi))
    torch.testing.assert_close(found, theirs, rtol=2e-5, atol=2e-5)


def test_scores_of_the_variance_exploding_scheduler():
    """Its first step of the reverse diffusion adds (sigma^2 - sigma'^2) s before it adds noise."""
    scheduler, net = made("ScoreSdeVe", {}), Net()
    scheduler.set_timesteps(100)
    scheduler.set_sigmas(100)
    i = 40
    t, sigma, after = (
        scheduler.timesteps[i],
        float(scheduler.discrete_sigmas[60 - 1]),
        float(scheduler.discrete_sigmas[60 - 2]),
    )
    x = 3.0 * torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    network = network_from_model(net, scheduler)
    own = network.schedule.rho(float(t))
    index = int((scheduler.timesteps[i] * (100 - 1)).long())
    sigma, after = (float(scheduler.discrete_sigmas[j]) for j in (index, index - 1))
    with torch.no_grad():
        theirs = scheduler.step_pred(net(x, own)[0], t, x).prev_sample_mean
        ours = x + (sigma**2 - after**2) * network.score(x, float(t))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-4)


def test_unknown_schedulers_are_refused_by_name():
    for wrong in (diffusers.CMStochasticIterativeScheduler(), diffusers.VQDiffusionScheduler(4), object()):
        with pytest.raises(
            ValueError, match="scheduler must be one of diffusers' .*DDIM.*got .*" + type(wrong).__name__
        ):
            schedule_from(wrong)
    with pytest.raises(ValueError, match="DDIMScheduler: prediction_type must be one of"):
        schedule_from(made("DDIM", {"prediction_type": "noise"}))
    with pytest.raises(ValueError, match="use_flow_sigmas belongs to"):
        schedule_from(made("UniPCMultistep", {"prediction_type": "flow_prediction"}))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_times_that_count_signal_are_refused(name):
    scheduler = made(name, {"invert_sigmas": True})
    with pytest.raises(ValueError, match=f"{name}Scheduler: invert_sigmas must be False, got True"):
        convention_of(scheduler)
    with pytest.raises(ValueError, match="invert_sigmas must be False"):
        network_from_model(Net(), scheduler)
    with pytest.raises(ValueError, match="invert_sigmas must be False"):
        DEISSNScheduler.from_config(scheduler.config)


def test_times_without_signal_are_refused():
    scheduler = made("DDIM", {"rescale_betas_zero_snr": True})
    network = network_from_model(Net(), scheduler)
    x = torch.ones(1, 3, 4, 4)
    assert network.schedule.domain == (0.0, 998.0)
    with pytest.raises(ValueError, match="t must lie in"):
        network.noise(x, 999.0)
    with pytest.raises(ValueError, match="t must lie in"):
        network.noise(x, -1.0)
    assert torch.isfinite(network.noise(x, 998.0)).all()


# DEIS-SN


def within(network, sigmas):
    """Levels of a scheduler, which rounds the first one beyond what its table reaches."""
    high = network.schedule.rho(network.schedule.domain[1])
    return [min(float(sigma), high) for sigma in sigmas]


def runs(scheduler, net, x, steps=10):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(net(x, t)[0], t, x).prev_sample
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}], ids=str
)
def test_plain_deis_is_that_of_diffusers(order, options):
    theirs = diffusers.DEISMultistepScheduler(solver_order=order, **options)
    ours = DEISSNScheduler.from_config(theirs.config)
    assert ours.config.solver_order == order
    x = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runs(ours, Net(), x), runs(theirs, Net(), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_our_sampler_is_that_of_diffusers(order):
    """The same run by `sample` with rho-integrals in log rho, lower orders in the beginning alone."""
    theirs = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    net, x = Net(), torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    network = network_from_model(net, theirs)
    found = runs(theirs, net, x)
    rhos = within(network, theirs.sigmas)
    ours = sample(network, None, x * math.sqrt(1.0 + rhos[0] ** 2), solver="deis", order=order - 1, steps=rhos).x
    torch.testing.assert_close(ours / math.sqrt(1.0 + rhos[-1] ** 2), found, rtol=1e-4, atol=1e-4)


NORMALIZER = Normalizer((0.01, 0.3, 1.0, 200.0), (0.005, 0.2, 0.5, 0.8), (0.0,) * 4)


def normalised(config, **options):
    lists = {"normalizer_rhos": list(NORMALIZER.rhos), "normalizer_sizes": list(NORMALIZER.sizes)}
    return DEISSNScheduler.from_config(config, **lists, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_normalised_runs_are_those_of_the_core(order):
    scheduler = normalised(diffusers.DDIMScheduler().config, solver_order=order, lower_order_final=False)
    net, x = Net(), torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    found = runs(scheduler, net, x)
    network = network_from_model(net, scheduler)
    rhos = within(network, scheduler.sigmas)
    start = x * math.sqrt(1.0 + rhos[0] ** 2)
    ours = sample(network, None, start, order=order - 1, steps=rhos, normalizer=NORMALIZER).x
    torch.testing.assert_close(ours / math.sqrt(1.0 + rhos[-1] ** 2), found, rtol=1e-4, atol=1e-4)
    plain = sample(network, None, start, order=order - 1, steps=rhos).x
    assert (plain - ours).abs().max() > 1e-3, "the normalizer does nothing"


def test_schedulers_are_saved_with_their_normalizer(tmp_path):
    scheduler = normalised(diffusers.PNDMScheduler().config, solver_order=2)
    scheduler.save_pretrained(tmp_path)
    again = DEISSNScheduler.from_pretrained(tmp_path)
    assert again.normalizer == scheduler.normalizer == Normalizer(NORMALIZER.rhos, NORMALIZER.sizes, (0.0,) * 4)
    assert again.config.solver_order == 2
    x = torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(runs(again, Net(), x), runs(scheduler, Net(), x))


def test_flow_matching_configs_say_what_is_predicted():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = normalised(theirs.config, solver_order=1)
    assert (ours.config.prediction_type, ours.config.use_flow_sigmas, ours.config.flow_shift) == (
        "flow_prediction",
        True,
        3.0,
    )
    x = torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(runs(ours, Net(), x)).all()
    assert ours.sigmas[-1] == 0.0


@pytest.mark.parametrize("sigmas", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}], ids=str)
def test_images_to_start_from(sigmas):
    """Half a run, from a noised image, is the second half of the grid with lower orders in its beginning."""
    scheduler = DEISSNScheduler(solver_order=3, **sigmas)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(5)
    data, noise = (torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    t = scheduler.timesteps[5:6]
    x = scheduler.add_noise(data, noise, t)
    rhos = [float(sigma) for sigma in scheduler.sigmas[5:]]
    torch.testing.assert_close(x * math.sqrt(1.0 + rhos[0] ** 2), data + rhos[0] * noise)
    states, noises = [x * math.sqrt(1.0 + rhos[0] ** 2)], []
    for k, t in enumerate(scheduler.timesteps[5:]):
        noises.append(torch.tanh(x))
        x = scheduler.step(noises[-1], t, x).prev_sample
        order = min(k, 2, len(rhos) - 2 - k)
        weights = scheme("deis", rhos[k - order : k + 2], order=order).stages[-1].weights
        states.append(states[-1] + sum(w * noises[k - order + i] for i, w in weights.items()))
        torch.testing.assert_close(x * math.sqrt(1.0 + rhos[k + 1] ** 2), states[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solver_order": 4}, "solver_order must be 1, 2 or 3"),
        ({"normalizer_rhos": [1.0, 2.0]}, "belong together"),
        ({"normalizer_rhos": [2.0, 1.0], "normalizer_sizes": [0.5, 0.5]}, "increase"),
    ],
)
def test_wrong_schedulers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DEISSNScheduler(**change)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr must be False"):
        DEISSNScheduler.from_config(made("DDIM", {"rescale_betas_zero_snr": True}).config)


NO_TABLE = """EDMEuler EDMDPMSolverMultistep CosineDPMSolverMultistep IPNDM SCM ScoreSdeVe UnCLIP
    CMStochasticIterative DDPMWuerstchen"""


@pytest.mark.parametrize("name", NO_TABLE.split())
def test_configs_without_a_table_of_levels_are_refused(name):
    """Their networks are told other levels than those that betas nobody gave would make."""
    config = made(name, {}).config
    with pytest.raises(ValueError, match=r"config must have beta_start, .* got one with neither"):
        DEISSNScheduler.from_config(config)
    with pytest.raises(ValueError, match="config must have beta_start"):
        DEISSNScheduler.from_config({"num_train_timesteps": 10})
    betas = DEISSNScheduler.from_config({"num_train_timesteps": 10}, trained_betas=[0.01] * 10).betas
    torch.testing.assert_close(betas, torch.full((10,), 0.01))
    assert DEISSNScheduler.from_config({}, beta_start=0.001).betas[0] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CogVideoXDDIM", {}, "snr_shift_scale must be 1.0"),
        ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type must be"),
        ("DDIM", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False"),
    ],
)
def test_configs_of_other_levels_or_times_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        DEISSNScheduler.from_config(made(name, options).config)


WITH_TABLE = """DDIM DDPM DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep PNDM LCM TCD SASolver
    EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete RePaint"""


@pytest.mark.parametrize("name", WITH_TABLE.split())
def test_levels_are_those_of_the_config(name):
    """Also where it leaves them to its scheduler, whose defaults are not those of every other one."""
    for options in ({}, {"beta_schedule": "scaled_linear", "beta_end": 0.015, "num_train_timesteps": 500}):
        theirs = made(name, options)
        ours = DEISSNScheduler.from_config(theirs.config)
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=0.0)
    assert DEISSNScheduler.from_config(theirs.config, beta_end=0.01).config.beta_end == 0.01


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_spacings_of_other_levels_are_not_for_flows(spacing):
    """diffusers makes them of the table of betas, up to 157, and reads them as levels of straight lines."""
    words = f"{spacing} must be False beside use_flow_sigmas"
    with pytest.raises(ValueError, match=words):
        DEISSNScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **{spacing: True})
    for name, options in (("FlowMatchEulerDiscrete", {"shift": 3.0}), ("UniPCMultistep", FLOWS)):
        with pytest.raises(ValueError, match=words):
            DEISSNScheduler.from_config(made(name, options).config, **{spacing: True})
        with pytest.raises(ValueError, match=words):
            DEISSNScheduler.from_config(made(name, {**options, spacing: True}).config)
    assert DEISSNScheduler(**{spacing: True}).config[spacing]
