"""DEIS with score normalisation as a scheduler of diffusers [MATH 6.1, 6.2]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import DEISMultistepScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # pipelines look for it beside the class that they load
from diffusers.configuration_utils import register_to_config

from dfmath import _checks
from dfmath.normalizers import Normalizer
from dfmath.solvers import scheme

__all__ = ["DEISSNScheduler"]

Tensor: TypeAlias = torch.Tensor
TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# What a config may say of levels and times that this scheduler has no word for, and what it must then say.
KNOWN: dict[str, tuple[Any, str]] = {
    "rescale_betas_zero_snr": (False, "at its last time there is no signal to step from"),
    "snr_shift_scale": (1.0, "its levels are not those of its betas"),
    "timestep_type": ("discrete", "its network is told noise levels"),
    "invert_sigmas": (False, "its times count signal"),
}


class DEISSNScheduler(DEISMultistepScheduler):
    r"""DEIS-SN: exponential integration of the noise relative to the size it has at each level (Xia et al. 2023).

    .. math:: z_{k+1} = z_k + \sum_i w_{ki}\, \epsilon_i, \qquad
              w_{ki} = \int_{\rho_k}^{\rho_{k+1}} \frac{n(\rho)}{n(\rho_i)} L_i(\log \rho) \, d\rho

    Grids of times, kinds of predictions, images to start from and thresholding are those of diffusers'
    `DEISMultistepScheduler`, which this is without a normalizer; weights are by quadrature. Where diffusers' grids end
    with the same level twice (Karras, exponential, beta and flow sigmas), the last step goes to the data instead of
    nowhere.

    Parameters
    ----------
    normalizer_rhos, normalizer_sizes
        `dfmath.normalizers.Normalizer.rhos` and ``.sizes``, as lists, so that they are saved with the config.
    solver_order
        1 to 3: through how many noises, 3 if not given, where diffusers' own has 2. The polynomials' order is one less.
    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type
        What the network was trained with; these and the rest are those of `DEISMultistepScheduler`.
    thresholding, dynamic_thresholding_ratio, sample_max_value, lower_order_final
        As there.
    use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_flow_sigmas, flow_shift
        As there.
    timestep_spacing, steps_offset, use_dynamic_shifting, time_shift_type
        As there.

    Raises
    ------
    ValueError
        If `solver_order` or the normalizer does not fit, or flow sigmas are to be spaced in other ways.

    Examples
    --------
    >>> from diffusers import DDIMScheduler
    >>> n = Normalizer((0.05, 1.0, 150.0), (0.02, 0.5, 0.8), (0.0, 0.0, 0.0))
    >>> scheduler = DEISSNScheduler.from_config(
    ...     DDIMScheduler().config, normalizer_rhos=list(n.rhos), normalizer_sizes=list(n.sizes)
    ... )
    >>> scheduler.set_timesteps(10)
    >>> len(scheduler.timesteps)
    10
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 3,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        normalizer_rhos: Sequence[float] | None = None,
        normalizer_sizes: Sequence[float] | None = None,
    ) -> None:
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {solver_order!r}")
        if (normalizer_rhos is None) != (normalizer_sizes is None):
            raise ValueError("normalizer_rhos and normalizer_sizes belong together: give both or neither")
        _check_spacing(self.config)
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            solver_order=solver_order,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            lower_order_final=lower_order_final,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            use_flow_sigmas=use_flow_sigmas,
            flow_shift=flow_shift,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            use_dynamic_shifting=use_dynamic_shifting,
            time_shift_type=time_shift_type,
        )
        self.normalizer = None
        if normalizer_rhos is not None and normalizer_sizes is not None:
            rhos, sizes = (tuple(map(float, part)) for part in (normalizer_rhos, normalizer_sizes))
            self.normalizer = Normalizer(rhos, sizes, (0.0,) * len(rhos))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from another scheduler's config; a flow-matching scheduler's says what its networks predict.

        ValueError where the config has levels or times that this scheduler cannot have, as EDM's.
        """
        if isinstance(config, Mapping):
            if "shift" in config and "beta_start" not in config:  # those of flow matching have no betas
                flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
                kwargs = {**flow, "flow_shift": float(config.get("shift", 1.0)), **kwargs}
            _check_levels(config, kwargs)
            # diffusers drops what a config left to its scheduler, whose defaults are those of its networks' levels.
            kwargs = {**{name: config[name] for name in TRAINED if name in config}, **kwargs}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, mu: float | None = None
    ) -> None:
        """Make the grid of a run; mu is the shift that some pipelines compute, used where shifting is dynamic."""
        steps = _checks.positive_integer("num_inference_steps", num_inference_steps)
        super().set_timesteps(steps, device, mu if self.config.use_dynamic_shifting else None)
        if self.sigmas[-1] == self.sigmas[-2]:
            self.sigmas[-1] = 0.0

    def deis_first_order_update(self, model_output: Tensor, *args: Any, sample: Tensor, **kwargs: Any) -> Tensor:
        """One step through the last noise."""
        return self._step_through([model_output], sample)

    def multistep_deis_second_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Tensor, **kwargs: Any
    ) -> Tensor:
        """One step through the last two noises."""
        return self._step_through(model_output_list[-2:], sample)

    def multistep_deis_third_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Tensor, **kwargs: Any
    ) -> Tensor:
        """One step through the last three noises."""
        return self._step_through(model_output_list[-3:], sample)

    def _step_through(self, noises: list[Tensor], sample: Tensor) -> Tensor:
        """The last stage of a scheme on the levels of these noises and the next one."""
        last = self.step_index + 1
        levels = [self._levels(i) for i in range(last - len(noises), last + 1)]
        rhos = [sigma / alpha for alpha, sigma in levels]
        plan = scheme("deis", rhos, order=len(noises) - 1, normalizer=self.normalizer)
        (alpha, _), (after, _) = levels[-2:]
        change = sum(w * noises[i].to(torch.float32) for i, w in plan.stages[-1].weights.items())
        return (after * (sample.to(torch.float32) / alpha + change)).to(sample.dtype)

    def _levels(self, i: int) -> tuple[float, float]:
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[i].to(torch.float64))
        return float(alpha), float(sigma)


def _check_spacing(config: Mapping[str, Any]) -> None:
    """Raise where diffusers would space levels of the betas' table and read them as levels of straight lines."""
    for name in SPACINGS:
        if config["use_flow_sigmas"] and config[name]:
            raise ValueError(f"{name} must be False beside use_flow_sigmas, whose levels it would replace, got True")


def _check_levels(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise where another scheduler's levels and times are not those of betas or of straight lines."""
    whole = {**config, **given}
    for name, (wanted, why) in KNOWN.items():
        if whole.get(name, wanted) != wanted:
            raise ValueError(f"{name} must be {wanted!r}, got {whole[name]!r}: {why}")
    # IPNDM's trained_betas are not variances, so that a config's own are none without beta_start.
    if not ("beta_start" in whole or given.get("trained_betas") is not None or whole.get("use_flow_sigmas")):
        raise ValueError("config must have beta_start, or shift as those of flow matching have, got one with neither")
