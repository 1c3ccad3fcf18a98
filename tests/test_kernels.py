"""Transition kernels against formulas in float64."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import digen_jax as dj

SIGMAS = np.array([1.0, 0.96, 0.82, 0.43, 0.0])  # first, early, middle, last
MAX = 0.96
PAIRS = list(pairwise(SIGMAS))
LEVEL = 0.7


def flow_reference(x, v, s, s_next, a, s_max):
  """The SDE as published: drift plus half the squared diffusion times score."""
  g2 = a**2 * s / max(1 - s, 1 - s_max)
  x0 = x - s * v
  score = -(x - (1 - s) * x0) / s**2
  dt = s_next - s
  return x + (v - g2 / 2 * score) * dt, np.sqrt(g2 * -dt)


def dance_reference(x, v, s, s_next, eta):
  x0 = x - s * v
  score = -(x - (1 - s) * x0) / s**2
  dt = s_next - s
  return x + (v - eta**2 / 2 * score) * dt, eta * np.sqrt(-dt)


def cps_reference(x, v, s, s_next, a):
  std = s_next * np.sin(a * np.pi / 2)
  x0, x1 = x - s * v, x + (1 - s) * v
  return (1 - s_next) * x0 + np.sqrt(s_next**2 - std**2) * x1, std


KERNELS = {
  "flow_sde": (
    partial(dj.flow_sde, noise_level=LEVEL, sigma_max=MAX),
    partial(flow_reference, a=LEVEL, s_max=MAX),
  ),
  "dance_sde": (
    partial(dj.dance_sde, eta=0.3),
    partial(dance_reference, eta=0.3),
  ),
  "flow_cps": (
    partial(dj.flow_cps, noise_level=0.8),
    partial(cps_reference, a=0.8),
  ),
  "ode_euler": (
    dj.ode_euler,
    lambda x, v, s, s_next: (x + (s_next - s) * v, 0.0),
  ),
}
STOCHASTIC = ("flow_sde", "dance_sde", "flow_cps")


@pytest.fixture
def latents():
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, 2, 5, 4, 6)).astype(np.float32)


def relative(actual, expected):
  actual = np.asarray(actual, np.float64)
  return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("pair", PAIRS)
def test_mean_and_std(name, pair, latents):
  kernel, reference = KERNELS[name]
  x, v, _ = latents
  mean, std = reference(x.astype(np.float64), v.astype(np.float64), *pair)
  transition = jax.jit(lambda x, v: kernel(x, v, *pair))(x, v)
  assert relative(transition.mean, mean) < 5e-7
  assert transition.mean.dtype == transition.std.dtype == jnp.float32
  np.testing.assert_allclose(transition.std, std, rtol=5e-7)


@pytest.mark.parametrize("name", KERNELS)
def test_one_noise_level_per_sample(name, latents):
  kernel, _ = KERNELS[name]
  x, v, _ = latents
  s, s_next = np.array(PAIRS[1:3], np.float32).T
  together = jax.jit(kernel)(x, v, jnp.asarray(s), jnp.asarray(s_next))
  assert together.std.shape == (2,)
  for i in range(2):
    alone = kernel(x[i : i + 1], v[i : i + 1], float(s[i]), float(s_next[i]))
    np.testing.assert_allclose(together.mean[i], alone.mean[0], atol=5e-7)
    np.testing.assert_allclose(together.std[i], alone.std, rtol=1e-6)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_log_prob_is_the_mean_gaussian_density(name, latents):
  x, v, x_next = latents
  for pair in PAIRS[:3]:
    transition = KERNELS[name][0](x, v, *pair)
    mean, std = KERNELS[name][1](*latents[:2].astype(np.float64), *pair)
    expected = stats.norm.logpdf(x_next.astype(np.float64), mean, std)
    expected = expected.reshape(2, -1).mean(1)
    actual = jax.jit(lambda t: t.log_prob(x_next))(transition)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_log_prob_of_cps_is_the_squared_residual(latents):
  x, v, x_next = latents
  transition = KERNELS["flow_cps"][0](x, v, *PAIRS[1])
  mean, _ = cps_reference(*latents[:2].astype(np.float64), *PAIRS[1], 0.8)
  expected = -((x_next - mean) ** 2).reshape(2, -1).mean(1)
  np.testing.assert_allclose(transition.log_prob(x_next), expected, rtol=1e-6)


def test_sample_adds_scaled_noise(latents):
  x, v, noise = latents
  transition = KERNELS["flow_sde"][0](
    x, v, jnp.full(2, 0.82), jnp.full(2, 0.43)
  )
  expected = (
    transition.mean + np.asarray(transition.std)[:, None, None, None] * noise
  )
  np.testing.assert_allclose(transition.sample(noise), expected, rtol=1e-6)


def test_known_values():
  x, v = jnp.ones((1, 1)), jnp.full((1, 1), 0.5)
  flow = dj.flow_sde(x, v, 0.8, 0.7, noise_level=0.7, sigma_max=0.96)
  assert float(flow.mean[0, 0]) == pytest.approx(0.81525, rel=1e-6)
  assert float(flow.std) == pytest.approx(0.4427188724, rel=1e-6)
  log_prob = flow.log_prob(flow.mean)[0]
  assert float(log_prob) == pytest.approx(-0.1041182233, rel=2e-6)
  dance = dj.dance_sde(x, v, 0.8, 0.7, eta=0.3)
  assert float(dance.mean[0, 0]) == pytest.approx(0.9438125, rel=1e-6)
  assert float(dance.std) == pytest.approx(0.0948683298, rel=1e-6)
  log_prob = dance.log_prob(dance.mean)[0]
  assert float(log_prob) == pytest.approx(1.4363268176, rel=1e-6)
  cps = dj.flow_cps(x, v, 0.8, 0.7, noise_level=0.8)
  assert float(cps.mean[0, 0]) == pytest.approx(0.4179430857, rel=1e-6)
  assert float(cps.std) == pytest.approx(0.6657395614, rel=1e-6)


def test_first_flow_step_has_the_noise_level_as_std():
  sigmas = dj.sigma_schedule("sd3", 10)
  x, v = jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)
  step = dj.flow_sde(
    x, v, sigmas[0], sigmas[1], noise_level=0.7, sigma_max=sigmas[1]
  )
  assert float(step.std) == pytest.approx(0.7, rel=1e-7)
  assert float(step.mean[0, 0]) == pytest.approx(
    0.755 * 2 - 0.0398706794 * 3, rel=1e-6
  )


def test_flow_sde_is_tame_just_below_one():
  """A schedule that starts at 0.999999 must not have a diffusion of 1000 a."""
  sigmas = dj.sigma_schedule("wan", 20)
  x, v = jnp.ones((1, 4)), jnp.ones((1, 4))
  step = dj.flow_sde(
    x, v, sigmas[0], sigmas[1], noise_level=0.7, sigma_max=float(sigmas[1])
  )
  assert float(step.std) == pytest.approx(0.7, rel=1e-4)
  assert np.all(np.abs(step.mean) < 1)


@pytest.mark.parametrize("pair", PAIRS[:3])
def test_no_noise_is_the_euler_step(pair, latents):
  x, v, _ = latents
  euler = dj.ode_euler(x, v, *pair)
  assert float(euler.std) == 0
  for step in (
    dj.flow_sde(x, v, *pair, noise_level=0.0, sigma_max=MAX),
    dj.dance_sde(x, v, *pair, eta=0.0),
    dj.flow_cps(x, v, *pair, noise_level=0.0),
  ):
    np.testing.assert_allclose(step.mean, euler.mean, atol=1e-6)
    assert float(step.std) == 0


@pytest.mark.parametrize("name", STOCHASTIC)
def test_marginals_are_those_of_the_flow(name):
  """Unit Gaussian data: the exact velocity is linear, and so every variance."""
  sigmas = np.linspace(1, 0, 2001)
  kernel = {
    "flow_sde": partial(dj.flow_sde, noise_level=LEVEL, sigma_max=sigmas[1]),
    "dance_sde": partial(dj.dance_sde, eta=0.3),
    "flow_cps": partial(dj.flow_cps, noise_level=0.05),
  }[name]
  s = sigmas[:-1]
  gain = (s - (1 - s)) / ((1 - s) ** 2 + s**2)  # v = gain x
  ones = jnp.ones((2000, 1))
  step = jax.jit(kernel)(
    ones, jnp.float32(gain)[:, None], jnp.float32(s), jnp.float32(sigmas[1:])
  )
  variance = 1.0
  for factor, std in zip(np.asarray(step.mean[:, 0]), np.asarray(step.std)):
    variance = float(factor) ** 2 * variance + float(std) ** 2
  assert variance == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_gradient_of_the_log_prob(name, latents):
  """d log p / d v by hand: residual over variance times d mean / d v."""
  x, v, x_next = latents
  kernel, reference = KERNELS[name]
  pair = PAIRS[2]

  def total(v):
    return jnp.sum(kernel(x, v, *pair).log_prob(x_next))

  actual = jax.jit(jax.grad(total))(v)
  x, v, x_next = latents.astype(np.float64)
  mean, std = reference(x, v, *pair)
  slope = reference(0.0, 1.0, *pair)[0]
  scale = 2.0 if name == "flow_cps" else 1 / std**2
  expected = (x_next - mean) * scale * slope / x[0].size
  assert relative(actual, expected) < 2e-6


def test_vmap(latents):
  x, v, x_next = latents
  s, s_next = np.array(PAIRS[1:3], np.float32).T

  def one(x, v, s, s_next, x_next):
    step = KERNELS["flow_sde"][0](x[None], v[None], s, s_next)
    return step.log_prob(x_next[None])[0]

  actual = jax.vmap(one)(x, v, s, s_next, x_next)
  step = KERNELS["flow_sde"][0](x, v, s, s_next)
  np.testing.assert_allclose(actual, step.log_prob(x_next), rtol=1e-6)


def test_low_precision_velocity_is_cast_first(latents):
  x, v, _ = latents
  v = jnp.asarray(v, jnp.bfloat16)
  for kernel, _ in KERNELS.values():
    low = kernel(x, v, *PAIRS[1])
    high = kernel(x, v.astype(jnp.float32), *PAIRS[1])
    np.testing.assert_array_equal(low.mean, high.mean)
    assert low.mean.dtype == jnp.float32


def test_host_numbers_keep_their_digits():
  """Differences of double noise levels are taken before they are rounded."""
  sigmas = dj.sigma_schedule("dance", 16, shift=7).astype(np.float64)
  sigmas[1] += 3e-8  # not a float32
  x = jnp.ones((1, 2))
  step = dj.dance_sde(x, x, sigmas[0], sigmas[1], eta=0.3)
  expected = 0.3 * np.sqrt(sigmas[0] - sigmas[1])
  assert float(step.std) == pytest.approx(expected, rel=1e-7)


def test_make_kernel(latents):
  x, v, _ = latents
  for name in KERNELS:
    kernel = dj.make_kernel(name, noise_level=0.6, sigma_max=MAX)
    direct = {
      "flow_sde": partial(dj.flow_sde, noise_level=0.6, sigma_max=MAX),
      "dance_sde": partial(dj.dance_sde, eta=0.6),
      "flow_cps": partial(dj.flow_cps, noise_level=0.6),
      "ode_euler": dj.ode_euler,
    }[name]
    actual, expected = kernel(x, v, *PAIRS[1]), direct(x, v, *PAIRS[1])
    np.testing.assert_array_equal(actual.mean, expected.mean)
    np.testing.assert_array_equal(actual.std, expected.std)
  with pytest.raises(dj.UserError, match="did you mean 'flow_sde'"):
    dj.make_kernel("flow-sde", noise_level=0.6, sigma_max=MAX)


def test_noise_levels_of_cps(latents):
  x, v, _ = latents
  for level in (-0.1, 1.1):
    with pytest.raises(dj.UserError, match="flow_cps: noise_level must be in"):
      dj.flow_cps(x, v, 0.8, 0.7, noise_level=level)


def test_shapes_that_do_not_fit(latents):
  x, v, _ = latents
  with pytest.raises(dj.UserError, match="one shape"):
    dj.ode_euler(x, v[:1], 0.5, 0.4)
  with pytest.raises(dj.UserError, match=r"scalars or \[2\]"):
    dj.ode_euler(x, v, jnp.full(3, 0.5), jnp.full(3, 0.4))
