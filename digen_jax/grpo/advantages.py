"""Group-relative advantages."""

from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.errors import UserError

Array = jax.Array | np.ndarray
Scope = Literal["group", "global", "max_group", "none"]


def group_advantages(
  rewards: Array,
  group_ids: Array,
  *,
  scope: Scope = "group",
  ddof: int = 0,
  eps: float = 1e-4,
  clip: float | None = None,
) -> Array:
  """(reward - mean of its group) / (std + eps).

  A group whose rewards are all equal has advantage 0 exactly: nothing can be
  learned from it. NumPy arrays are computed on the host: no device is asked,
  which may be busy.

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
  host = isinstance(rewards, np.ndarray) and isinstance(group_ids, np.ndarray)
  xp = np if host else jnp
  rewards = xp.asarray(rewards, xp.float32)
  group_ids = xp.asarray(group_ids)
  if rewards.ndim != 1 or group_ids.shape != rewards.shape:
    raise UserError(
      "group_advantages: rewards and group_ids must both be [N]; got "
      f"{rewards.shape} and {group_ids.shape}"
    )
  size = {} if host else {"size": rewards.shape[0]}
  _, segment = xp.unique(group_ids, return_inverse=True, **size)
  centred = _centred(rewards, segment, xp)
  if scope == "none":
    std = xp.ones_like(rewards)
  elif scope == "global":
    whole = xp.zeros_like(segment)
    std = _std(_centred(rewards, whole, xp), whole, ddof, xp) + eps
  else:
    std = _std(centred, segment, ddof, xp) + eps
    std = xp.max(std) if scope == "max_group" else std
  advantages = xp.where(
    centred == 0, 0.0, centred / xp.where(std > 0, std, 1)
  ).astype(xp.float32)
  return advantages if clip is None else xp.clip(advantages, -clip, clip)


def _centred(x: Array, segment: Array, xp: ModuleType) -> Array:
  """x [N] minus the mean of its segment; exactly 0 where all are equal."""
  # From the minimum first: rewards far from 0 keep their digits.
  x = x - _segment_min(x, segment)
  return x - _segment_sum(x, segment) / _segment_sum(xp.ones_like(x), segment)


def _std(centred: Array, segment: Array, ddof: int, xp: ModuleType) -> Array:
  """Standard deviation [N] of each element's segment."""
  count = _segment_sum(xp.ones_like(centred), segment)
  squares = _segment_sum(xp.square(centred), segment)
  variance = squares / xp.maximum(count - ddof, 1)
  # The square root of 0 has no gradient: go round it.
  root = xp.sqrt(xp.where(variance > 0, variance, 1))
  return xp.where(variance > 0, root, 0)


def _segment_sum(x: Array, segment: Array) -> Array:
  """[N] sum over each element's segment."""
  if isinstance(x, np.ndarray):
    total = np.zeros_like(x)
    np.add.at(total, segment, x)
    return total[segment]
  return jax.ops.segment_sum(x, segment, x.shape[0])[segment]


def _segment_min(x: Array, segment: Array) -> Array:
  """[N] minimum of each element's segment."""
  if isinstance(x, np.ndarray):
    least = np.full_like(x, np.inf)
    with np.errstate(invalid="ignore"):  # NaN stays NaN, as on a device
      np.minimum.at(least, segment, x)
    return least[segment]
  return jax.ops.segment_min(x, segment, x.shape[0])[segment]
