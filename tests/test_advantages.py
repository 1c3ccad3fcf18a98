"""Advantages against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import digen_jax as dj

GROUPS = np.array([7, 2, 7, 31, 2, 7, 31, 2, 31, 7, 5, 5, 5, 9])  # any order
rng = np.random.default_rng(0)
REWARDS = rng.uniform(size=14)
REWARDS[GROUPS == 5] = 0.1  # a group that teaches nothing


def reference(rewards, groups, scope, ddof, eps):
  def std(x):
    return np.std(x, ddof=ddof) if len(x) > ddof else 0.0

  stds = {g: std(rewards[groups == g]) for g in groups}
  centred = np.array(
    [r - rewards[groups == g].mean() for r, g in zip(rewards, groups)]
  )
  if scope == "none":
    return centred
  scale = {
    "group": np.array([stds[g] for g in groups]),
    "global": std(rewards),
    "max_group": max(stds.values()),
  }[scope]
  return centred / (scale + eps)


@pytest.mark.parametrize("scope", ["group", "global", "max_group", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_values(scope, ddof, eps):
  expected = reference(REWARDS, GROUPS, scope, ddof, eps)
  actual = jax.jit(
    lambda r, g: dj.group_advantages(r, g, scope=scope, ddof=ddof, eps=eps)
  )(REWARDS.astype(np.float32), GROUPS)
  assert actual.dtype == jnp.float32 and actual.shape == (14,)
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-7)


def test_by_hand():
  actual = dj.group_advantages(
    [1.0, 3.0, 10.0, 10.0, 5.0], [0, 0, 1, 1, 2], eps=0.0
  )
  np.testing.assert_array_equal(actual, [-1, 1, 0, 0, 0])


@pytest.mark.parametrize("scope", ["group", "global", "max_group", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_no_variance_is_exactly_zero(scope, ddof):
  # 0.1 summed 24 times is not 2.4: a rounded mean would leave a remainder.
  rewards = np.full(24, 0.1, np.float32)
  actual = dj.group_advantages(
    rewards, np.arange(24) % 3, scope=scope, ddof=ddof, eps=0.0
  )
  np.testing.assert_array_equal(actual, np.zeros(24))


def test_rewards_far_from_zero_keep_their_digits():
  rewards = np.float32(1000 + rng.uniform(size=14) / 8)
  expected = reference(rewards.astype(np.float64), GROUPS, "group", 0, 1e-4)
  actual = dj.group_advantages(rewards, GROUPS)
  np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


def test_clip():
  whole = dj.group_advantages(REWARDS, GROUPS)
  actual = dj.group_advantages(REWARDS, GROUPS, clip=0.5)
  np.testing.assert_array_equal(actual, np.clip(whole, -0.5, 0.5))
  assert np.sum(np.abs(actual) == 0.5) >= 4


def test_grad_and_vmap():
  def first(rewards):
    return dj.group_advantages(rewards, jnp.array(GROUPS))[0]

  rewards = jnp.asarray(REWARDS, jnp.float32)
  grad = jax.jit(jax.grad(first))(rewards)
  eps = 1e-6
  for i in range(14):
    bump = eps * (np.arange(14) == i)
    up = reference(REWARDS + bump, GROUPS, "group", 0, 1e-4)[0]
    down = reference(REWARDS - bump, GROUPS, "group", 0, 1e-4)[0]
    if GROUPS[i] != 5:  # not differentiable where the variance is 0
      assert float(grad[i]) == pytest.approx((up - down) / (2 * eps), abs=1e-4)
  assert np.all(np.isfinite(grad))
  two = jax.vmap(dj.group_advantages)(
    jnp.stack([rewards, -rewards]), jnp.stack([jnp.array(GROUPS)] * 2)
  )
  np.testing.assert_allclose(two[0], -two[1], rtol=1e-6, atol=1e-6)


def test_a_reward_that_is_not_finite_spoils_its_group_only():
  rewards = REWARDS.astype(np.float32)
  rewards[0] = np.nan
  bad = np.isnan(dj.group_advantages(rewards, GROUPS))
  np.testing.assert_array_equal(bad, np.isin(GROUPS, 7))


@pytest.mark.parametrize("scope", ["group", "global", "max_group", "none"])
def test_host_and_device_agree(scope):
  host = dj.group_advantages(REWARDS, GROUPS, scope=scope, clip=1.0)
  assert isinstance(host, np.ndarray)
  device = dj.group_advantages(
    jnp.asarray(REWARDS, jnp.float32),
    jnp.asarray(GROUPS),
    scope=scope,
    clip=1.0,
  )
  assert host.dtype == device.dtype == np.float32
  np.testing.assert_allclose(host, device, rtol=1e-6, atol=1e-7)


def test_bad_input():
  with pytest.raises(dj.UserError, match="scope must be one of group, global"):
    dj.group_advantages(REWARDS, GROUPS, scope="batch")
  with pytest.raises(dj.UserError, match=r"both be \[N\]"):
    dj.group_advantages(REWARDS, GROUPS[:-1])
