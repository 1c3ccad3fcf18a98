"""Denoising as one `lax.scan`, and the part of it that is trained on."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.errors import UserError
from digen_jax.sampling.denoise import Apply, velocity
from digen_jax.sampling.kernels import Kernel, ode_euler
from digen_jax.types import Guidance, Trajectory

# A window of trained steps: first step ([] or [B] int32), number of steps.
Window = tuple[jax.Array | int, int]

_INITIAL = 0xFFFFFFFF  # noise index of the initial latents; steps count up


def rollout(
  apply: Apply,
  params: Any,
  latents: jax.Array,
  conditioning: Any,
  sigmas: jax.Array,
  *,
  key: jax.Array,
  kernel: Kernel,
  window: Window | None = None,
  guidance: Guidance | None = None,
) -> Trajectory:
  """Denoises a batch, stochastically inside the window, and records it.

  Steps inside the window draw from `kernel`; all others, and always the last
  one, are Euler steps of the ODE. Only the window is stored, in float32, and
  log-probabilities are those of the stored values.

  The noise of a sample at step i is keyed by `fold_in(its key, i)`: it does
  not depend on which other samples are in the batch.

  Args:
    apply: the model, `apply(params, latents, sigma, conditioning)`.
    params: its parameters.
    latents: [B, ...] initial noise, see `initial_latents`.
    conditioning: pytree of [B, ...] arrays.
    sigmas: [n+1] float32 falling noise levels, see `sigma_schedule`.
    key: one PRNG key, or [B] keys, one per sample. The key is consumed.
    kernel: the transition of the trained steps, options bound.
    window: (start, size) of the trained steps: `start` [] or [B] int32, so
      that prompt groups with windows of their own can share a batch, and
      start + size < n; `size` is a Python int and fixes the shapes, 0 trains
      nothing. None trains all steps but the last.
    guidance: classifier-free guidance, or None.

  Returns:
    The trajectory, W = size (n - 1 without a window).

  Raises:
    UserError: shapes that do not fit; a window that does not fit or holds
      the last step, whose density is too peaked to train on.
  """
  x = jnp.asarray(latents, jnp.float32)
  sigmas = _checked_schedule(sigmas)
  num_steps, batch = sigmas.shape[0] - 1, x.shape[0]
  start, size = _resolve_window(window, num_steps, batch)
  keys = sample_keys(key, batch)

  def step(carry: tuple, i: jax.Array) -> tuple:
    x, states, log_probs = carry
    states = _store(states, i - start, x)
    sigma, sigma_next = (jnp.full(batch, sigmas[j]) for j in (i, i + 1))
    v = velocity(apply, params, x, conditioning, sigma, guidance)
    transition = kernel(x, v, sigma, sigma_next)
    sampled = transition.sample(_noise(keys, i, x.shape[1:]))
    inside = (start <= i) & (i < start + size)
    inside = inside.reshape((batch,) + (1,) * (x.ndim - 1))
    x_next = jnp.where(inside, sampled, ode_euler(x, v, sigma, sigma_next).mean)
    # The log-probability must see x_next as it is stored: without the barrier
    # the compiler may compute it anew, and round it differently.
    x_next = jax.lax.optimization_barrier(x_next)
    log_probs = _store(log_probs, i - start, transition.log_prob(x_next))
    return (x_next, states, log_probs), None

  states = jnp.zeros((batch, size + 1, *x.shape[1:]), jnp.float32)
  log_probs = jnp.zeros((batch, size), jnp.float32)
  carry = (x, states, log_probs)
  carry, _ = jax.lax.scan(step, carry, jnp.arange(num_steps, dtype=jnp.int32))
  final, states, log_probs = carry
  steps = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  return Trajectory(states, log_probs, steps, final)


def sample_ode(
  apply: Apply,
  params: Any,
  latents: jax.Array,
  conditioning: Any,
  sigmas: jax.Array,
  *,
  guidance: Guidance | None = None,
  record: bool = False,
) -> jax.Array:
  """Denoises a batch without randomness: Euler steps of the flow ODE.

  Arguments as in `rollout`; `record` returns the latents after every step.

  Returns:
    [B, ...] float32 clean latents, [n, B, ...] with `record`.
  """
  x = jnp.asarray(latents, jnp.float32)
  sigmas = _checked_schedule(sigmas)

  def step(x: jax.Array, levels: jax.Array) -> tuple:
    sigma, sigma_next = (jnp.full(x.shape[0], level) for level in levels)
    v = velocity(apply, params, x, conditioning, sigma, guidance)
    x = ode_euler(x, v, sigma, sigma_next).mean
    return x, x if record else None

  levels = jnp.stack([sigmas[:-1], sigmas[1:]], axis=1)
  x, states = jax.lax.scan(step, x, levels)
  return states if record else x


def sample_keys(key: jax.Array, batch_size: int) -> jax.Array:
  """One typed PRNG key per sample, [B]: `fold_in(key, i)`.

  Args:
    key: a PRNG key, typed or a raw uint32 one; [B] typed keys are returned as
      they are. The key is consumed.
    batch_size: B.

  Raises:
    UserError: not a key, or not B of them.
  """
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    if key.dtype != jnp.uint32:
      raise UserError(
        f"key must be a PRNG key, as jax.random.key(seed) makes; got an array "
        f"of {key.dtype}"
      )
    key = jax.random.wrap_key_data(key)
  if key.ndim == 0:
    samples = jnp.arange(batch_size, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples)
  if key.shape != (batch_size,):
    raise UserError(
      f"key must be one key or one per sample ([{batch_size}]), "
      f"got shape {key.shape}"
    )
  return key


def initial_latents(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal latents [B, ...] float32, row by row from its own key.

  Independent of the noise `rollout` draws from the same keys.

  Args:
    key: one PRNG key, or [B] keys, one per sample.
    shape: (B, ...).
  """
  return _noise(sample_keys(key, shape[0]), _INITIAL, shape[1:])


def _noise(
  keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]
) -> jax.Array:
  """[B, *shape] standard normal noise number `index` of each sample."""

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

  return jax.vmap(draw)(keys)


def _store(buffer: jax.Array, slot: jax.Array, rows: jax.Array) -> jax.Array:
  """Writes rows [B, ...] to buffer [B, W, ...] at slot [B], where it exists."""
  if buffer.shape[1] == 0:
    return buffer

  def write(
    row_buffer: jax.Array, slot: jax.Array, row: jax.Array
  ) -> jax.Array:
    return row_buffer.at[slot].set(
      row, mode="drop", wrap_negative_indices=False
    )

  return jax.vmap(write)(buffer, slot, rows)


def _checked_schedule(sigmas: jax.Array) -> jax.Array:
  """[n+1] float32."""
  sigmas = jnp.asarray(sigmas, jnp.float32)
  if sigmas.ndim != 1 or sigmas.shape[0] < 2:
    raise UserError(
      f"sigmas must be [num_steps + 1] falling noise levels, as "
      f"sigma_schedule returns; got shape {sigmas.shape}"
    )
  return sigmas


def _resolve_window(
  window: Window | None, num_steps: int, batch: int
) -> tuple[jax.Array, int]:
  """Start per sample [B] int32, and size."""
  start, size = (0, num_steps - 1) if window is None else window
  size = operator.index(size)
  # An array on a device is not looked at: it may be traced, or not computed.
  seen = 0 if isinstance(start, jax.Array) else np.asarray(start)
  first, last = np.min(seen), np.max(seen)
  if size < 0 or first < 0 or last + size > num_steps - 1:
    raise UserError(
      f"window (start {start}, size {size}) does not fit: of {num_steps} steps "
      f"the first {num_steps - 1} can be trained, never the last"
    )
  start = jnp.asarray(start, jnp.int32)
  if start.shape not in ((), (batch,)):
    raise UserError(
      f"window start must be a scalar or [{batch}], one per sample; "
      f"got shape {start.shape}"
    )
  return jnp.broadcast_to(start, (batch,)), size
