"""The records that flow through the system: frozen pytrees, no behaviour.

Dimension names used everywhere: B samples, W trained (stochastic) denoising
steps of a trajectory, T text tokens, D text features, P pooled features, and
`...` the latent dimensions, channels last: `[h, w, c]` for images,
`[t, h, w, c]` for videos.
"""

import dataclasses

import jax


def _record(cls: type) -> type:
  """Registers a frozen dataclass as a pytree."""
  return jax.tree_util.register_dataclass(
    dataclasses.dataclass(frozen=True)(cls)
  )


def static_field(**kwargs):  # noqa: ANN201
  """A dataclass field that is part of the tree structure, not a leaf."""
  return dataclasses.field(metadata={"static": True}, **kwargs)


@_record
class Conditioning:
  """What a denoiser is told besides latents and noise level.

  Attributes:
    text: [B, T, D] prompt token features.
    pooled: [B, P] pooled prompt features, for families that use them.
    mask: [B, T] bool, True where `text` holds a real token, for families that
      mask their text.
    guidance: [B] float32 distilled guidance scale (e.g. 3.5), for families
      that embed it.
  """

  text: jax.Array
  pooled: jax.Array | None = None
  mask: jax.Array | None = None
  guidance: jax.Array | None = None


@_record
class Guidance:
  """Classifier-free guidance: two forwards, extrapolated.

  Attributes:
    negative: what the second forward is told, [B, ...] like the positive one.
    scale: [] or [B] float32; velocity = neg + scale * (pos - neg).
    rescale: give the result the per-token norm of the positive velocity
      (Qwen-Image).
  """

  negative: Conditioning
  scale: jax.Array
  rescale: bool = static_field(default=False)


@_record
class Trajectory:
  """What a rollout keeps of a batch of denoising trajectories.

  Attributes:
    states: [B, W+1, ...] float32 latents on entry to each trained step, and
      after the last one.
    log_probs: [B, W] float32 behaviour log-probability of each trained
      transition, as computed when it was sampled.
    steps: [B, W] int32 index into the sigma schedule of each trained step.
    final: [B, ...] float32 clean latents.
  """

  states: jax.Array
  log_probs: jax.Array
  steps: jax.Array
  final: jax.Array


@_record
class TrainBatch:
  """Trained transitions, samples x steps folded into one leading axis N.

  Attributes:
    x: [N, ...] float32 state before the transition.
    x_next: [N, ...] float32 state after it, as sampled.
    sigma: [N] float32 noise level before.
    sigma_next: [N] float32 noise level after.
    old_log_prob: [N] float32 behaviour log-probability.
    advantage: [N] float32.
    weight: [N] float32, 1 for a real row, 0 for padding.
    conditioning: [N, ...] rows of `Conditioning`.
    guidance: classifier-free guidance rows, or None.
  """

  x: jax.Array
  x_next: jax.Array
  sigma: jax.Array
  sigma_next: jax.Array
  old_log_prob: jax.Array
  advantage: jax.Array
  weight: jax.Array
  conditioning: Conditioning
  guidance: Guidance | None = None
