"""Which denoising steps are sampled with noise and trained.

A window of a few consecutive steps costs a fraction of the whole trajectory
and learns almost as much. All samples of a prompt group share one window:
rewards of different windows cannot be compared, and training collapses when
they are.
"""

import jax
import jax.numpy as jnp

from digen_jax.errors import UserError


def check_window(num_steps: int, size: int, first: int | None = None) -> int:
  """Checks a window's configuration; the last step is never trained.

  Args:
    num_steps: denoising steps n.
    size: steps in the window.
    first: the window lies in steps 0 ... first - 1; None for as many as can
      be trained, n - 1.

  Returns:
    `first`, resolved.

  Raises:
    UserError: the window does not fit, or could include the last step.
  """
  trainable = num_steps - 1
  first = trainable if first is None else first
  if not 1 <= first <= trainable:
    raise UserError(
      f"window: of {num_steps} sampling steps 1 to {trainable} can be trained "
      f"(never the last), but the window may lie in the first {first}; lower "
      "that, or sample with more steps"
    )
  if not 1 <= size <= first:
    raise UserError(
      f"window: {size} steps do not fit in the first {first} of {num_steps}; "
      f"use 1 to {first}"
    )
  return first


def window_start(
  key: jax.Array, num_steps: int, size: int, first: int | None = None
) -> jax.Array:
  """A random window: its first step, uniform in [0, first - size].

  Source: Flow-GRPO-Fast, https://github.com/yifan123/flow_grpo.

  Args:
    key: PRNG key of a prompt group in a global step; vmap over the groups'
      keys. The key is consumed.
    num_steps: denoising steps.
    size: steps in the window.
    first: the window lies in the first so many steps; None for all that can
      be trained.

  Returns:
    [] int32.

  Raises:
    UserError: see `check_window`.
  """
  first = check_window(num_steps, size, first)
  return jax.random.randint(key, (), 0, first - size + 1, jnp.int32)


def progressive_window_start(
  step: jax.Array | int,
  num_steps: int,
  size: int,
  *,
  every: int = 25,
  stride: int = 1,
  first: int | None = None,
) -> jax.Array:
  """A window that moves from high to low noise, and starts over at the end.

  Source: MixGRPO, https://arxiv.org/abs/2507.21802.

  Args:
    step: [] global step.
    num_steps: denoising steps.
    size: steps in the window.
    every: global steps between two moves.
    stride: denoising steps of a move.
    first: the window lies in the first so many steps; None for all that can
      be trained.

  Returns:
    [] int32.

  Raises:
    UserError: see `check_window`.
  """
  positions = (check_window(num_steps, size, first) - size) // stride + 1
  return jnp.asarray(step // every % positions * stride, jnp.int32)
