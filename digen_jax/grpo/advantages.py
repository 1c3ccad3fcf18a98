"""Group-relative advantages."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from digen_jax.errors import UserError

Scope = Literal["group", "global", "max_group", "none"]


def group_advantages(
  rewards: jax.Array,
  group_ids: jax.Array,
  *,
  scope: Scope = "group",
  ddof: int = 0,
  eps: float = 1e-4,
  clip: float | None = None,
) -> jax.Array:
  """(reward - mean of its group) / (std + eps).

  A group whose rewards are all equal has advantage 0 exactly: nothing can be
  learned from it.

  Source: GRPO, https://arxiv.org/abs/2402.03300, sec. 4.1.2; the std over the
  whole batch as in Flow-GRPO, https://arxiv.org/abs/2505.05470.

  Args:
    rewards: [N] float, finite.
    group_ids: [N] int, equal for samples of one prompt, in any order.
    scope: the rewards the std is taken over: "group", the sample's own;
      "global", the whole batch; "max_group", the largest std of any group
      (LongCat-Video); "none", divide by nothing (Dr. GRPO).
    ddof: 0 for the population std, 1 for the sample std (0 where there is
      only one reward).
    eps: added to the std.
    clip: limit of the magnitude of the result, or None.

  Returns:
    [N] float32.

  Raises:
    UserError: an unknown scope, or shapes that differ.
  """
  if scope not in get_args(Scope):
    raise UserError(
      f"group_advantages: scope must be one of {', '.join(get_args(Scope))}; "
      f"got {scope!r}"
    )
  rewards = jnp.asarray(rewards, jnp.float32)
  group_ids = jnp.asarray(group_ids)
  if rewards.ndim != 1 or group_ids.shape != rewards.shape:
    raise UserError(
      "group_advantages: rewards and group_ids must both be [N]; got "
      f"{rewards.shape} and {group_ids.shape}"
    )
  n = rewards.shape[0]
  _, segment = jnp.unique(group_ids, size=n, return_inverse=True)
  centred = _centred(rewards, segment)
  if scope == "none":
    std = jnp.ones_like(rewards)
  elif scope == "global":
    whole = jnp.zeros_like(segment)
    std = _std(_centred(rewards, whole), whole, ddof) + eps
  else:
    std = _std(centred, segment, ddof) + eps
    std = jnp.max(std) if scope == "max_group" else std
  advantages = jnp.where(
    centred == 0, 0.0, centred / jnp.where(std > 0, std, 1)
  )
  return advantages if clip is None else jnp.clip(advantages, -clip, clip)


def _centred(x: jax.Array, segment: jax.Array) -> jax.Array:
  """x [N] minus the mean of its segment; exactly 0 where all are equal."""
  n = x.shape[0]
  # From the minimum first: rewards far from 0 keep their digits.
  x = x - jax.ops.segment_min(x, segment, n)[segment]
  count = jax.ops.segment_sum(jnp.ones_like(x), segment, n)
  return (
    x - (jax.ops.segment_sum(x, segment, n) / jnp.maximum(count, 1))[segment]
  )


def _std(centred: jax.Array, segment: jax.Array, ddof: int) -> jax.Array:
  """Standard deviation [N] of each element's segment."""
  n = centred.shape[0]
  count = jax.ops.segment_sum(jnp.ones_like(centred), segment, n)
  squares = jax.ops.segment_sum(jnp.square(centred), segment, n)
  variance = (squares / jnp.maximum(count - ddof, 1))[segment]
  # The square root of 0 has no gradient: go round it.
  return jnp.where(
    variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0
  )
