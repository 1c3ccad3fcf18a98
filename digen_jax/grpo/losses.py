"""The clipped policy-gradient loss and the KL to a reference policy."""

import jax
import jax.numpy as jnp


def grpo_loss(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  *,
  clip_range: float,
  advantage_clip: float | None = 5.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped surrogate loss, mean over transitions.

  mean of max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)) with
  r = exp(log_prob - old_log_prob).

  Source: PPO, https://arxiv.org/abs/1707.06347, eq. 7; per denoising step as
  in Flow-GRPO, https://arxiv.org/abs/2505.05470.

  Args:
    log_prob: [N] float32, of the policy that is trained; per latent element,
      as `Transition.log_prob` gives it.
    old_log_prob: [N] float32, of the policy that sampled.
    advantage: [N] float32.
    clip_range: trust region of the ratio, 1e-5 ... 1e-3 for image models:
      log-probabilities are means over latent elements.
    advantage_clip: limit of the advantage's magnitude, or None.

  Returns:
    The loss, a float32 scalar, and metrics: ratio_mean, ratio_max_abs_log
    (largest |log r|), clip_fraction (|r - 1| > clip_range).
  """
  loss, log_ratio = grpo_loss_rows(
    log_prob,
    old_log_prob,
    advantage,
    clip_range=clip_range,
    advantage_clip=advantage_clip,
  )
  metrics = {
    "ratio_mean": jnp.mean(jnp.exp(log_ratio)),
    "ratio_max_abs_log": jnp.max(jnp.abs(log_ratio)),
    "clip_fraction": jnp.mean(clipped(log_ratio, clip_range)),
  }
  return jnp.mean(loss), jax.lax.stop_gradient(metrics)


def grpo_loss_rows(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  *,
  clip_range: float,
  advantage_clip: float | None = 5.0,
) -> tuple[jax.Array, jax.Array]:
  """`grpo_loss` before the mean.

  Returns:
    The loss [N] and the log ratio [N] (with its gradient), float32.
  """
  log_prob = jnp.asarray(log_prob, jnp.float32)
  log_ratio = log_prob - jnp.asarray(old_log_prob, jnp.float32)
  advantage = jnp.asarray(advantage, jnp.float32)
  if advantage_clip is not None:
    advantage = jnp.clip(advantage, -advantage_clip, advantage_clip)
  # Around r - 1, not r: clip ranges are near the spacing of floats at 1.
  excess = jnp.expm1(log_ratio)
  limited = jnp.clip(excess, -clip_range, clip_range)
  gain = jnp.minimum(advantage * excess, advantage * limited)
  return -advantage - gain, log_ratio


def clipped(log_ratio: jax.Array, clip_range: float) -> jax.Array:
  """1.0 where the ratio has left the clip range, else 0.0; [N] float32."""
  excess = jnp.abs(jnp.expm1(log_ratio))
  return (excess > clip_range).astype(jnp.float32)


def kl_to_reference(
  mean: jax.Array, reference_mean: jax.Array, std: jax.Array
) -> jax.Array:
  """KL between two transitions of one std, per latent element: [N] float32.

  mean over elements of (mean - reference_mean)^2 / (2 std^2).

  Source: Flow-GRPO, https://arxiv.org/abs/2505.05470.

  Args:
    mean: [N, ...] of the policy that is trained.
    reference_mean: [N, ...] of the reference policy.
    std: [] or [N]. The transition's std gives the Gaussian KL, which the
      published *video* recipes use; the image recipes' weights are stated for
      the diffusion coefficient g = std / sqrt(sigma - sigma_next) instead.
  """
  mean = jnp.asarray(mean, jnp.float32)
  difference = mean - jnp.asarray(reference_mean, jnp.float32)
  elements = tuple(range(1, mean.ndim))
  square = jnp.mean(jnp.square(difference), axis=elements)
  return square / (2 * jnp.square(jnp.asarray(std, jnp.float32)))
