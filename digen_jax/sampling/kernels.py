"""Transition kernels: one denoising step as a Gaussian, mean and std.

A rectified-flow model predicts the velocity v = noise - x0 at
x_s = (1 - s) x0 + s noise. Its ODE moves a sample from s to s' < s without
randomness; the kernels here draw from a distribution with the same marginals
instead, so that a step has a probability and a policy gradient exists.

A kernel has the signature `kernel(x, v, sigma, sigma_next) -> Transition`;
bind its options with `functools.partial`, or by name with `make_kernel`.
Everything is float32, whatever the model computes in.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.errors import UserError
from digen_jax.types import static_field


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
  """The distribution of the next latents given the present ones.

  Attributes:
    mean: [B, ...] float32.
    std: [] or [B] float32 standard deviation, the same for all elements of a
      sample; 0 where the step is deterministic.
    density: "gaussian", or "residual" for the unnormalised form Flow-CPS
      trains with (see `log_prob`).
  """

  mean: jax.Array
  std: jax.Array
  density: str = static_field(default="gaussian")

  def sample(self, noise: jax.Array) -> jax.Array:
    """Next latents [B, ...] for standard normal `noise` [B, ...]."""
    return self.mean + _column(self.std, self.mean) * noise

  def log_prob(self, x_next: jax.Array) -> jax.Array:
    """Log-probability of `x_next` [B, ...] per latent element: [B] float32.

    The *mean* over the elements of a sample, not their sum, as in every
    published recipe: clip ranges are stated for it. The "residual" density is
    -(x_next - mean)^2 alone, without 1 / (2 std^2) and constants. `x_next` is
    data: pass it through `jax.lax.stop_gradient` if it depends on parameters.
    Where std is 0 a Gaussian has no density and the result is not finite.
    """
    elements = tuple(range(1, self.mean.ndim))
    square = jnp.mean(jnp.square(x_next - self.mean), axis=elements)
    if self.density == "residual":
      return -square
    log_norm = jnp.log(self.std) + 0.5 * math.log(2 * math.pi)
    return -square / (2 * jnp.square(self.std)) - log_norm


Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Transition]


def ode_euler(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array | float,
  sigma_next: jax.Array | float,
) -> Transition:
  """Deterministic Euler step of the flow ODE: x + (sigma_next - sigma) v.

  Args:
    x: [B, ...] latents at `sigma`.
    v: [B, ...] velocity predicted there.
    sigma: [] or [B] noise level in (0, 1].
    sigma_next: [] or [B] noise level after the step, below `sigma`.

  Returns:
    A transition with std 0; it has no log-probability.
  """
  x, v, step = _aligned(x, v, sigma, sigma_next)
  std = jnp.zeros_like(step.size)
  return Transition(x - step.size * v, _per_sample(std))


def flow_sde(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array | float,
  sigma_next: jax.Array | float,
  *,
  noise_level: float,
  sigma_max: float | jax.Array,
) -> Transition:
  """Flow-GRPO's stochastic step: diffusion g = a sqrt(s / (1 - s)).

  g diverges at s = 1. There 1 - s is replaced by 1 - sigma_max, which makes
  the std of the first step exactly `noise_level`. It is replaced wherever it
  would be smaller, so schedules that start just below 1 are safe as well.

  Source: Flow-GRPO, https://arxiv.org/abs/2505.05470, ODE-to-SDE conversion.

  Args:
    x: [B, ...] latents at `sigma`.
    v: [B, ...] velocity predicted there.
    sigma: [] or [B] noise level in (0, 1].
    sigma_next: [] or [B] noise level after the step, below `sigma`.
    noise_level: a. 0 gives the Euler step, without a log-probability.
    sigma_max: the second entry of the sigma schedule.

  Returns:
    The Gaussian transition.
  """
  x, v, step = _aligned(x, v, sigma, sigma_next)
  floor = jnp.asarray(1 - sigma_max, jnp.float32)
  one_minus_s = jnp.maximum(step.one_minus_s, floor)
  mean = _sde_mean(x, v, step, noise_level**2 / (2 * one_minus_s))
  std = noise_level * jnp.sqrt(step.s * (step.size / one_minus_s))
  return Transition(mean, _per_sample(std))


def dance_sde(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array | float,
  sigma_next: jax.Array | float,
  *,
  eta: float,
) -> Transition:
  """DanceGRPO's stochastic step: constant diffusion g = eta.

  Source: DanceGRPO, https://arxiv.org/abs/2505.07818, rectified-flow SDE.

  Args:
    x: [B, ...] latents at `sigma`.
    v: [B, ...] velocity predicted there.
    sigma: [] or [B] noise level in (0, 1].
    sigma_next: [] or [B] noise level after the step, below `sigma`.
    eta: diffusion coefficient, typically 0.3.

  Returns:
    The Gaussian transition.
  """
  x, v, step = _aligned(x, v, sigma, sigma_next)
  mean = _sde_mean(x, v, step, eta**2 / (2 * step.s))
  return Transition(mean, _per_sample(eta * jnp.sqrt(step.size)))


def flow_cps(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array | float,
  sigma_next: jax.Array | float,
  *,
  noise_level: float,
) -> Transition:
  """Coefficients-preserving stochastic step.

  The predicted noise keeps cos(a pi/2) of its share in the next latents and
  fresh noise takes sin(a pi/2), so their squares add up to sigma_next^2 and
  the sample has exactly the noise its level says. Its log-probability is the
  "residual" form.

  Source: Flow-CPS, https://arxiv.org/abs/2509.05952.

  Args:
    x: [B, ...] latents at `sigma`.
    v: [B, ...] velocity predicted there.
    sigma: [] or [B] noise level in (0, 1].
    sigma_next: [] or [B] noise level after the step, below `sigma`.
    noise_level: a in [0, 1], typically 0.8.

  Returns:
    The transition, with density "residual".

  Raises:
    UserError: noise_level outside of [0, 1].
  """
  if not 0 <= noise_level <= 1:
    raise UserError(
      f"flow_cps: noise_level must be in [0, 1], got {noise_level}"
    )
  x, v, step = _aligned(x, v, sigma, sigma_next)
  angle = noise_level * (math.pi / 2)
  clean, noise = x - step.s * v, x + step.one_minus_s * v
  kept = step.s_next * jnp.cos(angle)
  mean = (1 - step.s_next) * clean + kept * noise
  std = _per_sample(step.s_next * jnp.sin(angle))
  return Transition(mean, std, density="residual")


def make_kernel(
  name: str, *, noise_level: float, sigma_max: float | jax.Array
) -> Kernel:
  """A kernel from its name in a config.

  Args:
    name: "flow_sde", "dance_sde", "flow_cps" or "ode_euler".
    noise_level: a of Flow-SDE and Flow-CPS, eta of Dance-SDE.
    sigma_max: the second entry of the sigma schedule; only Flow-SDE uses it.

  Raises:
    UserError: the name is not known; the kernel, when it is called, for
      a noise level it cannot have.
  """
  kernels = {
    "flow_sde": functools.partial(
      flow_sde, noise_level=noise_level, sigma_max=sigma_max
    ),
    "dance_sde": functools.partial(dance_sde, eta=noise_level),
    "flow_cps": functools.partial(flow_cps, noise_level=noise_level),
    "ode_euler": ode_euler,
  }
  if name not in kernels:
    near = difflib.get_close_matches(name, kernels, n=1, cutoff=0.0)[0]
    raise UserError(
      f"kernel {name!r} is not known; did you mean {near!r}? "
      f"(known: {', '.join(kernels)})"
    )
  return kernels[name]


class _Step(NamedTuple):
  """The noise levels of a step, float32, broadcastable against the latents."""

  s: jax.Array
  s_next: jax.Array
  one_minus_s: jax.Array
  size: jax.Array  # s - s_next, positive


def _aligned(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array | float,
  sigma_next: jax.Array | float,
) -> tuple[jax.Array, jax.Array, _Step]:
  """Checks shapes and casts to float32."""
  x, v = jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32)
  if x.shape != v.shape:
    raise UserError(
      f"a transition needs x and v of one shape, got {x.shape} and {v.shape}"
    )
  # Numbers from the host keep their digits through the differences.
  on_device = isinstance(sigma, jax.Array) or isinstance(sigma_next, jax.Array)
  as_float = jnp.float32 if on_device else np.float64
  s, s_next = as_float(sigma), as_float(sigma_next)
  step = [jnp.asarray(a, jnp.float32) for a in (s, s_next, 1 - s, s - s_next)]
  for level in step:
    if level.shape not in ((), x.shape[:1]):
      raise UserError(
        f"sigma and sigma_next must be scalars or [{x.shape[0]}], one per "
        f"sample of x {x.shape}; got {level.shape}"
      )
  return x, v, _Step(*(_column(a, x) for a in step))


def _sde_mean(
  x: jax.Array, v: jax.Array, step: _Step, rate: jax.Array
) -> jax.Array:
  """Euler-Maruyama mean; `rate` is g^2 / (2 s), the pull of the score."""
  drift = (1 + rate * step.one_minus_s) * step.size
  return x * (1 - rate * step.size) - v * drift


def _column(per_sample: jax.Array, x: jax.Array) -> jax.Array:
  """[B] -> [B, 1, ...] with the rank of x; a scalar stays one."""
  if per_sample.ndim == 0:
    return per_sample
  return per_sample.reshape(per_sample.shape + (1,) * (x.ndim - 1))


def _per_sample(column: jax.Array) -> jax.Array:
  """[B, 1, ...] -> [B]; a scalar stays one."""
  return column.reshape(column.shape[:1])
