"""What a user imports, and the example of the README."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import digen_jax as dj


def test_import_is_light():
  heavy = (
    "torch ray orbax ml_collections transformers absl flax optax diffusers PIL"
  )
  code = (
    "import sys, digen_jax; "
    f"print([m for m in {heavy.split()} if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
  for name in dj.__all__:
    assert getattr(dj, name).__doc__, name
  with pytest.raises(AttributeError, match="no attribute 'flow_sdee'"):
    dj.flow_sdee  # noqa: B018


def test_load_model_is_that_of_the_weights_package():
  from digen_jax.weights import load

  assert dj.load_model is load.load_model


def test_grpo_in_your_own_code():
  """Two prompts ask for a bright or a dark picture; a linear model learns."""

  def apply(params, x, sigma, text):  # -> velocity
    bias = (text @ params["text"]) * sigma[:, None]
    return x @ params["latents"] + bias[:, None, None]

  def reward(pictures, text):
    return jnp.mean(pictures, axis=(1, 2, 3)) * text[:, 0]

  params = {"text": jnp.zeros((1, 3)), "latents": 0.5 * jnp.eye(3)}
  text = jnp.repeat(jnp.array([[1.0], [-1.0]]), 16, axis=0)
  group_ids = jnp.repeat(jnp.arange(2), 16)
  sigmas = dj.sigma_schedule("dance", 6, shift=3.0)
  kernel = partial(dj.flow_sde, noise_level=0.8, sigma_max=float(sigmas[1]))
  optimizer = optax.adam(0.05)

  @jax.jit
  def update(params, state, key):
    noise_key, step_key = jax.random.split(key)
    noise = dj.initial_latents(noise_key, (32, 4, 4, 3))
    trajectory = dj.rollout(
      apply,
      params,
      noise,
      text,
      sigmas,
      key=step_key,
      kernel=kernel,
      window=(0, 3),
    )
    rewards = reward(trajectory.final, text)
    advantages = dj.group_advantages(rewards, group_ids)
    batch = dj.fold(trajectory, advantages, sigmas, text)
    grads, metrics = dj.train_step(
      apply, params, batch, kernel=kernel, clip_range=1e-4
    )
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
      changes, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, changes)
    return params, state, rewards.mean(), dj.mean_metrics(metrics)

  state = optimizer.init(params)
  curve = []
  for key in jax.random.split(jax.random.key(0), 40):
    params, state, mean_reward, metrics = update(params, state, key)
    curve.append(float(mean_reward))
    assert float(metrics["ratio_max_abs_log"]) <= 1e-6
  assert np.mean(curve[:3]) < 0.1
  assert np.mean(curve[-3:]) > 0.5
