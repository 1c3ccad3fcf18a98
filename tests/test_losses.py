"""Losses against float64 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import digen_jax as dj
from digen_jax.grpo import grpo_loss_rows

CLIP = 1e-4
OLD = np.array([-0.64147, 2.00042, 0.76226, -1.19929, 0.3, -0.2, 1.0])
# Inside the range; beyond it with either sign of the advantage; exactly 0.
LOG_RATIO = np.array([1.4e-6, 1.1e-5, -3.8e-6, 3e-4, 3e-4, -3e-4, 0.0])
ADVANTAGE = np.array([1.3, -0.7, 8.0, -6.0, 1.5, -2.0, 0.4])


def inputs():
  old = OLD.astype(np.float32)
  new = (OLD + LOG_RATIO).astype(np.float32)
  return new, old, ADVANTAGE.astype(np.float32)


def reference(new, old, advantage, limit=5.0):
  new, old, a = (x.astype(np.float64) for x in (new, old, advantage))
  a = np.clip(a, -limit, limit)
  r = np.exp(new - old)
  plain, limited = -a * r, -a * np.clip(r, 1 - CLIP, 1 + CLIP)
  active = plain >= limited
  gradient = np.where(active | (np.abs(r - 1) <= CLIP), plain, 0)
  return np.maximum(plain, limited), r, gradient / len(r)


def test_value_gradient_and_metrics():
  new, old, advantage = inputs()
  rows, r, gradient = reference(new, old, advantage)
  (loss, metrics), grad = jax.jit(
    jax.value_and_grad(
      lambda new: dj.grpo_loss(new, old, advantage, clip_range=CLIP),
      has_aux=True,
    )
  )(new)
  assert float(loss) == pytest.approx(rows.mean(), rel=1e-6)
  np.testing.assert_allclose(grad, gradient, rtol=1e-6)
  # Clipped: rows 4 (r high, A > 0) and 5 (r low, A < 0); row 3 is not.
  np.testing.assert_array_equal(np.asarray(grad) == 0, [0, 0, 0, 0, 1, 1, 0])
  assert float(metrics["ratio_mean"]) == pytest.approx(r.mean(), rel=1e-6)
  assert float(metrics["clip_fraction"]) == pytest.approx(3 / 7)
  largest = np.max(np.abs(np.log(r)))
  assert float(metrics["ratio_max_abs_log"]) == pytest.approx(largest, rel=1e-6)


def test_advantages_are_limited_to_five_unless_told_otherwise():
  new, old, _ = inputs()
  eight, five = np.full(7, 8, np.float32), np.full(7, 5, np.float32)
  limited = dj.grpo_loss(new, old, eight, clip_range=CLIP)[0]
  assert float(limited) == float(
    dj.grpo_loss(new, old, five, clip_range=CLIP)[0]
  )
  free = dj.grpo_loss(new, old, eight, clip_range=CLIP, advantage_clip=None)[0]
  assert float(free) == pytest.approx(-8, rel=1e-3)


def test_narrow_clip_ranges_keep_their_edge():
  """At 2e-6 the spacing of floats around 1 is 6 % of the range."""
  old = np.zeros(3, np.float32)
  new = np.array([1.98e-6, 2.02e-6, -2.02e-6], np.float32)
  loss, log_ratio = grpo_loss_rows(
    new, old, np.array([1, 1, -1], np.float32), clip_range=2e-6
  )
  np.testing.assert_array_equal(log_ratio, new)
  grad = jax.grad(
    lambda new: jnp.sum(
      grpo_loss_rows(
        new, old, np.array([1, 1, -1], np.float32), clip_range=2e-6
      )[0]
    )
  )(new)
  np.testing.assert_allclose(grad, [-1, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(loss, [-1, -1, 1], rtol=1e-5)


def test_on_policy_the_gradient_is_minus_the_advantage():
  _, old, advantage = inputs()
  grad = jax.grad(
    lambda new: dj.grpo_loss(new, old, advantage, clip_range=CLIP)[0]
  )(old)
  np.testing.assert_allclose(grad, -np.clip(advantage, -5, 5) / 7, rtol=1e-6)


def test_vmap():
  new, old, advantage = inputs()
  losses, metrics = jax.vmap(
    lambda shift: dj.grpo_loss(new + shift, old, advantage, clip_range=CLIP)
  )(jnp.array([0.0, 1e-3]))
  one = dj.grpo_loss(new + np.float32(1e-3), old, advantage, clip_range=CLIP)
  assert float(losses[1]) == pytest.approx(float(one[0]), rel=1e-6)
  assert metrics["ratio_mean"].shape == (2,)


def test_kl():
  rng = np.random.default_rng(0)
  mean, reference_mean = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  std = np.array([0.8, 0.2, 1.5], np.float32)
  actual = jax.jit(dj.kl_to_reference)(mean, reference_mean, std)
  square = (mean.astype(np.float64) - reference_mean) ** 2
  expected = square.mean((1, 2)) / (2 * std.astype(np.float64) ** 2)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  scalar = dj.kl_to_reference(mean, reference_mean, 0.8)
  np.testing.assert_allclose(scalar[0], expected[0], rtol=1e-6)
  grad = jax.grad(
    lambda m: jnp.sum(dj.kl_to_reference(m, reference_mean, std))
  )(mean)
  difference = mean - reference_mean
  expected = difference / std[:, None, None] ** 2 / 20
  np.testing.assert_allclose(grad, expected, rtol=1e-5)
