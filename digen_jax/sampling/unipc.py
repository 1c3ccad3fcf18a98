"""UniPC for flow models: the multistep sampler that Wan's pipelines carry.

Deterministic, second order, one model evaluation a step. Every state is a
linear combination of earlier states and of the clean latents predicted at
them, with coefficients that depend on the schedule alone: they are worked out
in float64 beforehand, and the loop on the device only adds.

Source: Zhao et al. 2023, UniPC, algorithms 1 and 2 with B(h) = e^h - 1 and
data prediction; for x_t = (1 - sigma) x_0 + sigma noise, lambda =
log((1 - sigma) / sigma). As in diffusers the model is not evaluated again at
a corrected state, and the last step is of first order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.errors import UserError
from digen_jax.sampling.denoise import Apply, velocity
from digen_jax.types import Guidance


class Coefficients(NamedTuple):
  """What each of n steps adds up.

  Attributes:
    correct: [n, 5] of (state, state before, x0, x0 before, x0 before that):
      the corrected state.
    predict: [n, 3] of (corrected state, x0, x0 before): the next state.
  """

  correct: np.ndarray
  predict: np.ndarray


def coefficients(sigmas: np.ndarray) -> Coefficients:
  """The coefficients of a schedule, float32, worked out in float64.

  Args:
    sigmas: [n+1] falling noise levels in (0, 1), terminal 0; see
      `sigma_schedule("wan", n)`.

  Raises:
    UserError: a schedule that starts at 1, where lambda is infinite.
  """
  sigmas = np.asarray(sigmas, np.float64)
  if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] or sigmas[0] >= 1:
    raise UserError(
      "UniPC needs [num_steps + 1] noise levels that start below 1 and end at "
      f"0, as sigma_schedule('wan', ...) returns; got {sigmas}"
    )
  steps = len(sigmas) - 1
  levels = np.log1p(-sigmas[:-1]) - np.log(sigmas[:-1])
  correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
  correct[0, 0] = 1.0
  for i in range(1, steps):
    order = min(2, i)  # that of the prediction being corrected
    correct[i] = _corrector(sigmas, levels, i, order)
  for i in range(steps - 1):
    predict[i] = _predictor(sigmas, levels, i, order=min(2, i + 1))
  predict[-1, 1] = 1.0  # to sigma 0: the predicted clean latents
  return Coefficients(correct.astype(np.float32), predict.astype(np.float32))


def _predictor(
  sigmas: np.ndarray, levels: np.ndarray, i: int, order: int
) -> np.ndarray:
  """Step i -> i + 1: coefficients of (state, x0, x0 before)."""
  h = levels[i + 1] - levels[i]
  scale = -(1 - sigmas[i + 1]) * np.expm1(-h)
  row = np.array([sigmas[i + 1] / sigmas[i], scale, 0.0])
  if order == 2:
    ratio = (levels[i - 1] - levels[i]) / h
    row[1:] += np.array([-1.0, 1.0]) * 0.5 * scale / ratio
  return row


def _corrector(
  sigmas: np.ndarray, levels: np.ndarray, i: int, order: int
) -> np.ndarray:
  """State i again, now that x0 is known there; see `Coefficients.correct`."""
  h = levels[i] - levels[i - 1]
  scale = -(1 - sigmas[i]) * np.expm1(-h)
  row = np.array([0.0, sigmas[i] / sigmas[i - 1], 0.0, scale, 0.0])
  if order == 1:
    weights, ratio = np.array([0.0, 0.5]), 1.0
  else:
    # rho of the paper's equation (5), with phi_1 and phi_2 at -h.
    ratio = (levels[i - 2] - levels[i - 1]) / h
    phi_1 = np.expm1(-h) / -h - 1.0
    phi_2 = phi_1 / -h - 0.5
    right = np.array([phi_1, 2.0 * phi_2]) / np.expm1(-h)
    weights = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], right)
  before, now = weights * scale
  before /= ratio
  return row + np.array([0.0, 0.0, now, -now - before, before])


def sample_unipc(
  apply: Apply,
  params: Any,
  latents: jax.Array,
  conditioning: Any,
  sigmas: np.ndarray,
  *,
  guidance: Guidance | None = None,
  record: bool = False,
) -> jax.Array:
  """Denoises a batch with UniPC.

  The model is told whole thousandths of noise level, as the scheduler's
  integer timesteps have it.

  Args:
    apply: the model, `apply(params, latents, sigma, conditioning)`.
    params: its parameters.
    latents: [B, ...] initial noise.
    conditioning: pytree of [B, ...] arrays.
    sigmas: [n+1] noise levels on the host, see `coefficients`.
    guidance: classifier-free guidance, or None.
    record: return the latents after every step.

  Returns:
    [B, ...] float32 clean latents, [n, B, ...] with `record`.

  Raises:
    UserError: see `coefficients`.
  """
  table = coefficients(sigmas)
  sigmas = np.asarray(sigmas, np.float32)[:-1]
  times = np.floor(sigmas * np.float32(1000)) / np.float32(1000)
  x = jnp.asarray(latents, jnp.float32)

  def step(carry: tuple, now: tuple) -> tuple:
    x, before, x0_before, x0_earlier = carry
    sigma, time, correct, predict = now
    time = jnp.full(x.shape[0], time)
    x0 = x - sigma * velocity(apply, params, x, conditioning, time, guidance)
    x = _combine(correct, x, before, x0, x0_before, x0_earlier)
    x_next = _combine(predict, x, x0, x0_before)
    return (x_next, x, x0, x0_before), x_next if record else None

  zeros = jnp.zeros_like(x)
  rows = (sigmas, times, *table)
  carry, states = jax.lax.scan(step, (x, zeros, zeros, zeros), rows)
  return states if record else carry[0]


def _combine(weights: jax.Array, *terms: jax.Array) -> jax.Array:
  return sum(w * term for w, term in zip(weights, terms))
