"""Noise schedules, transition kernels and the rollout."""

from digen_jax.sampling.denoise import (
  Apply,
  apply_guidance,
  denoise_step,
  velocity,
)
from digen_jax.sampling.kernels import (
  Kernel,
  Transition,
  dance_sde,
  flow_cps,
  flow_sde,
  make_kernel,
  ode_euler,
)
from digen_jax.sampling.rollout import (
  Window,
  initial_latents,
  rollout,
  sample_keys,
  sample_ode,
)
from digen_jax.sampling.schedules import schedule_from_config, sigma_schedule
from digen_jax.sampling.unipc import sample_unipc

__all__ = [
  "Apply",
  "Kernel",
  "Transition",
  "Window",
  "apply_guidance",
  "dance_sde",
  "denoise_step",
  "flow_cps",
  "flow_sde",
  "initial_latents",
  "make_kernel",
  "ode_euler",
  "rollout",
  "sample_keys",
  "sample_ode",
  "sample_unipc",
  "schedule_from_config",
  "sigma_schedule",
  "velocity",
]
