"""DEIS with score normalisation as a scheduler of diffusers [MATH 6.1, 6.2]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import DEISMultistepScheduler
from diffusers.configuration_utils import register_to_config

from dfmath.normalizers import Normalizer
from dfmath.solvers import scheme

__all__ = ["DEISSNScheduler"]

Tensor: TypeAlias = torch.Tensor


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
        1 to 3: through how many noises. The polynomials' order is one less.
    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, thresholding,
    dynamic_thresholding_ratio, sample_max_value, lower_order_final, use_karras_sigmas, use_exponential_sigmas,
    use_beta_sigmas, use_flow_sigmas, flow_shift, timestep_spacing, steps_offset, use_dynamic_shifting, time_shift_type
        As of `DEISMultistepScheduler`.

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
        """Make one from another scheduler's config; a flow-matching scheduler's says what its networks predict."""
        if isinstance(config, Mapping):
            if config.get("rescale_betas_zero_snr"):
                raise ValueError(
                    "rescale_betas_zero_snr must be False: at its last time there is no signal to step from"
                )
            if "shift" in config and "beta_start" not in config:  # those of flow matching have no betas
                flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
                kwargs = {**flow, "flow_shift": float(config.get("shift", 1.0)), **kwargs}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, mu: float | None = None
    ) -> None:
        """Make the grid of a run; mu is the shift that some pipelines compute, used where shifting is dynamic."""
        super().set_timesteps(num_inference_steps, device, mu if self.config.use_dynamic_shifting else None)
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
