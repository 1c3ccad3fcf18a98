"""RL post-training of image and video generators in JAX.

The pure functions, for use in code of your own. A model is any
`apply(params, latents, sigma, conditioning) -> velocity`; importing this
package pulls in jax and nothing heavier.

One GRPO update:

  sigmas = dj.sigma_schedule("flux", 10, height=512, width=512)
  kernel = partial(dj.flow_sde, noise_level=0.9, sigma_max=float(sigmas[1]))
  trajectory = dj.rollout(apply, params, noise, conditioning, sigmas,
                          key=key, kernel=kernel, window=(0, 3))
  advantages = dj.group_advantages(reward(trajectory.final), group_ids)
  batch = dj.fold(trajectory, advantages, sigmas, conditioning)
  grads, metrics = dj.train_step(apply, params, batch, kernel=kernel,
                                 clip_range=1e-4)
"""

from typing import Any

from digen_jax.errors import UserError
from digen_jax.grpo import (
  add_metrics,
  check_window,
  fold,
  group_advantages,
  grpo_loss,
  join,
  kl_to_reference,
  mean_metrics,
  pad,
  progressive_window_start,
  train_step,
  window_start,
)
from digen_jax.sampling import (
  Transition,
  apply_guidance,
  dance_sde,
  denoise_step,
  flow_cps,
  flow_sde,
  initial_latents,
  make_kernel,
  ode_euler,
  rollout,
  sample_keys,
  sample_ode,
  schedule_from_config,
  sigma_schedule,
)
from digen_jax.types import Conditioning, Guidance, TrainBatch, Trajectory

__all__ = [
  "Conditioning",
  "Guidance",
  "TrainBatch",
  "Trajectory",
  "Transition",
  "UserError",
  "add_metrics",
  "apply_guidance",
  "check_window",
  "dance_sde",
  "denoise_step",
  "flow_cps",
  "flow_sde",
  "fold",
  "group_advantages",
  "grpo_loss",
  "initial_latents",
  "join",
  "kl_to_reference",
  "load_model",
  "make_kernel",
  "mean_metrics",
  "ode_euler",
  "pad",
  "progressive_window_start",
  "rollout",
  "sample_keys",
  "sample_ode",
  "schedule_from_config",
  "sigma_schedule",
  "train_step",
  "window_start",
]


def __getattr__(name: str) -> Any:
  """Imports `load_model` on first use: the models bring flax with them."""
  if name == "load_model":
    from digen_jax.weights.load import load_model

    return load_model
  raise AttributeError(f"module 'digen_jax' has no attribute {name!r}")
