"""The rollout against a plain loop, and what must not change its result."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import digen_jax as dj

B, STEPS = 6, 5
SHAPE = (4, 4, 3)
SIGMAS = dj.sigma_schedule("dance", STEPS, shift=3.0)
KERNEL = partial(dj.flow_sde, noise_level=0.8, sigma_max=float(SIGMAS[1]))


def apply(params, x, sigma, conditioning, dtype=jnp.float32):
  """A two-layer denoiser per latent pixel."""
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  text = conditioning.text.astype(dtype).mean(1) @ params["text"]
  time = sigma.astype(dtype)[:, None] * params["time"][None]
  hidden = x.astype(dtype) @ params["in"] + (text + time)[:, None, None]
  return jnp.tanh(hidden) @ params["out"]


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  shapes = {"in": (3, 16), "text": (5, 16), "time": (16,), "out": (16, 3)}
  return {
    name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
    for name, shape in shapes.items()
  }


@pytest.fixture(scope="module")
def inputs():
  text = jax.random.normal(jax.random.key(1), (B, 2, 5))
  latents = dj.initial_latents(jax.random.key(2), (B, *SHAPE))
  return latents, dj.Conditioning(text=text)


@partial(jax.jit, static_argnames=("apply", "kernel", "size"))
def sample(params, inputs, key, start, *, apply, kernel, size, guidance):
  window = None if size is None else (start, size)
  return dj.rollout(
    apply,
    params,
    *inputs,
    SIGMAS,
    key=key,
    kernel=kernel,
    window=window,
    guidance=guidance,
  )


def run(
  params,
  inputs,
  *,
  key=None,
  apply=apply,
  kernel=KERNEL,
  window=None,
  guidance=None,
):
  """A rollout, compiled once per window size."""
  start, size = (0, None) if window is None else window
  return sample(
    params,
    inputs,
    jax.random.key(3) if key is None else key,
    jnp.broadcast_to(jnp.asarray(start, jnp.int32), inputs[0].shape[:1]),
    apply=apply,
    kernel=kernel,
    size=size,
    guidance=guidance,
  )


@jax.jit
def one_step(params, x, text, key, i, stochastic):
  levels = jnp.asarray(SIGMAS)[i], jnp.asarray(SIGMAS)[i + 1]
  v = apply(params, x, levels[0][None], text)
  step = KERNEL(x, v, *levels)
  noise = jax.random.normal(jax.random.fold_in(key, i), SHAPE)
  noisy = step.mean + step.std * noise[None]
  x_next = jnp.where(stochastic, noisy, x + (levels[1] - levels[0]) * v)
  return x_next, step.log_prob(x_next)[0]


def loop(params, inputs, key, start, size):
  """The same thing, step by step, sample by sample, in numpy."""
  latents, conditioning = inputs
  states = np.zeros((B, size + 1, *SHAPE))
  log_probs = np.zeros((B, size))
  final = np.zeros((B, *SHAPE))
  for b in range(B):
    x = np.asarray(latents[b : b + 1])
    text = dj.Conditioning(text=conditioning.text[b : b + 1])
    noise_key = jax.random.fold_in(key, b)
    for i in range(STEPS):
      w = i - start[b]
      if 0 <= w <= size:
        states[b, w] = x[0]
      inside = 0 <= w < size
      x, log_prob = one_step(params, x, text, noise_key, i, inside)
      if inside:
        log_probs[b, w] = log_prob
    final[b] = x[0]
  return states, log_probs, final


@pytest.mark.parametrize(
  "window", [None, (0, 2), (np.array([0, 1, 2, 1, 0, 2]), 2)]
)
def test_equals_a_plain_loop(params, inputs, window):
  key = jax.random.key(3)
  trajectory = run(params, inputs, key=key, window=window)
  start, size = (0, STEPS - 1) if window is None else window
  start = np.broadcast_to(start, (B,))
  states, log_probs, final = loop(params, inputs, key, start, size)
  np.testing.assert_allclose(trajectory.states, states, atol=3e-6)
  np.testing.assert_allclose(trajectory.log_probs, log_probs, atol=2e-6)
  np.testing.assert_allclose(trajectory.final, final, atol=3e-6)
  np.testing.assert_array_equal(
    trajectory.steps, start[:, None] + np.arange(size)[None]
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(trajectory)} == {
    jnp.dtype("float32"),
    jnp.dtype("int32"),
  }


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("flow_sde", jnp.float32),
    ("flow_sde", jnp.bfloat16),
    ("dance_sde", jnp.bfloat16),
    ("flow_cps", jnp.float32),
  ],
)
def test_log_probs_are_those_of_the_stored_states(params, inputs, name, dtype):
  model = partial(apply, dtype=dtype)
  kernel = dj.make_kernel(name, noise_level=0.8, sigma_max=float(SIGMAS[1]))
  trajectory = run(params, inputs, apply=model, kernel=kernel)
  assert trajectory.states.dtype == jnp.float32

  @jax.jit
  def recompute(x, sigma, sigma_next, x_next):
    return dj.denoise_step(
      model, params, x, inputs[1], sigma, sigma_next, kernel=kernel
    ).log_prob(x_next)

  for w in range(STEPS - 1):
    again = recompute(
      trajectory.states[:, w],
      SIGMAS[w],
      SIGMAS[w + 1],
      trajectory.states[:, w + 1],
    )
    np.testing.assert_allclose(again, trajectory.log_probs[:, w], atol=1e-6)


def test_without_a_window_the_last_step_is_the_ode(params, inputs):
  trajectory = run(params, inputs)
  x = trajectory.states[:, -1]
  v = apply(params, x, jnp.full(B, SIGMAS[-2]), inputs[1])
  np.testing.assert_allclose(trajectory.final, x - SIGMAS[-2] * v, atol=1e-6)


def test_an_empty_window_is_the_ode_sampler(params, inputs):
  ode = dj.sample_ode(apply, params, *inputs, SIGMAS)
  trajectory = run(params, inputs, window=(0, 0))
  np.testing.assert_allclose(trajectory.final, ode, atol=1e-6)
  assert trajectory.log_probs.shape == (B, 0)
  noisy = run(params, inputs, window=(0, 1))
  assert np.max(np.abs(noisy.final - ode)) > 0.1


def test_a_sample_does_not_depend_on_its_batch(params, inputs):
  keys = dj.sample_keys(jax.random.key(3), B)
  start = jnp.array([0, 1, 2, 1, 0, 2])
  whole = run(params, inputs, key=keys, window=(start, 2))
  order = jnp.array([4, 1])
  part = jax.tree.map(lambda a: a[order], inputs)
  some = run(params, part, key=keys[order], window=(start[order], 2))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(some)):
    np.testing.assert_allclose(a[order], b, atol=1e-6)


def test_noise_differs_between_samples_steps_and_the_initial_latents():
  key = jax.random.key(0)

  def still(params, x, sigma, conditioning):
    return jnp.zeros_like(x)

  trajectory = dj.rollout(
    still,
    {},
    jnp.zeros((2, 256)),
    None,
    SIGMAS,
    key=key,
    kernel=partial(dj.dance_sde, eta=1.0),
  )
  draws = np.diff(trajectory.states, axis=1).reshape(-1, 256)
  draws = np.concatenate([draws, dj.initial_latents(key, (2, 256))])
  correlation = np.abs(np.corrcoef(draws) - np.eye(len(draws)))
  assert np.max(correlation) < 0.25


def test_keys():
  key = jax.random.key(7)
  keys = dj.sample_keys(key, 3)
  expected = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3)]
  np.testing.assert_array_equal(jax.random.key_data(keys), expected)
  assert dj.sample_keys(keys, 3) is keys
  raw = dj.sample_keys(jax.random.PRNGKey(7), 3)
  np.testing.assert_array_equal(jax.random.key_data(raw), expected)
  with pytest.raises(dj.UserError, match=r"one per sample \(\[4\]\)"):
    dj.sample_keys(keys, 4)
  with pytest.raises(dj.UserError, match="must be a PRNG key"):
    dj.sample_keys(jnp.zeros(2), 2)


def test_guidance_is_two_forwards(params, inputs):
  latents, positive = inputs
  negative = dj.Conditioning(text=jnp.zeros_like(positive.text))
  scale = jnp.arange(1.0, B + 1)
  guidance = dj.Guidance(negative=negative, scale=scale)
  v, v_negative = (
    apply(params, latents, jnp.full(B, 0.7), c) for c in (positive, negative)
  )
  step = dj.denoise_step(
    apply,
    params,
    latents,
    positive,
    0.7,
    0.5,
    kernel=dj.ode_euler,
    guidance=guidance,
  )
  guided = v_negative + scale[:, None, None, None] * (v - v_negative)
  np.testing.assert_allclose(step.mean, latents - 0.2 * guided, atol=2e-6)
  plain = run(params, inputs)
  ones = dataclasses.replace(guidance, scale=jnp.ones(B))
  same = run(params, inputs, guidance=ones)
  np.testing.assert_allclose(same.final, plain.final, atol=2e-5)
  other = run(params, inputs, guidance=guidance)
  assert np.max(np.abs(other.final - plain.final)) > 0.01


def test_rescaled_guidance_keeps_the_norm_of_every_token():
  rng = np.random.default_rng(0)
  positive, negative = rng.normal(size=(2, 2, 4, 6, 3)).astype(np.float32)
  guided = dj.apply_guidance(positive, negative, 4.0, rescale=True)

  def tokens(v):
    v = np.asarray(v).reshape(2, 2, 2, 3, 2, 3)
    return v.transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 12)

  np.testing.assert_allclose(
    np.linalg.norm(tokens(guided), axis=-1),
    np.linalg.norm(tokens(positive), axis=-1),
    rtol=1e-6,
  )
  plain = tokens(dj.apply_guidance(positive, negative, 4.0))
  cosine = np.sum(tokens(guided) * plain, -1)
  cosine /= np.linalg.norm(tokens(guided), axis=-1)
  np.testing.assert_allclose(cosine, np.linalg.norm(plain, axis=-1), rtol=1e-6)


def test_sharded_over_samples_it_needs_no_communication(params, inputs):
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P("data"))
  keys = dj.sample_keys(jax.random.key(3), B)
  start = jnp.array([0, 1, 2, 1, 0, 2])
  negative = dj.Conditioning(text=jnp.zeros((B, 2, 5)))

  def guided(params, inputs, keys, start, negative):
    guidance = dj.Guidance(negative=negative, scale=jnp.float32(2))
    return run(params, inputs, key=keys, window=(start, 2), guidance=guidance)

  alone = guided(params, inputs, keys, start, negative)
  args = (
    jax.device_put(params, jax.NamedSharding(mesh, jax.P())),
    *jax.device_put((inputs, keys, start, negative), rows),
  )
  compiled = jax.jit(guided).lower(*args).compile()
  for collective in ("all-gather", "all-reduce", "collective-permute"):
    assert collective not in compiled.as_text()
  spread = compiled(*args)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread)):
    assert b.sharding.is_equivalent_to(rows, b.ndim)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_vmap_and_grad(params, inputs):
  keys = jax.random.split(jax.random.key(0), 2)
  many = jax.vmap(lambda key: run(params, inputs, key=key, window=(1, 2)))(keys)
  one = run(params, inputs, key=keys[1], window=(1, 2))
  np.testing.assert_allclose(many.states[1], one.states, atol=2e-6)

  def energy(params):
    return jnp.sum(run(params, inputs, window=(1, 2)).final ** 2)

  grad = jax.jit(jax.grad(energy))(params)["time"]
  bump = jnp.zeros(16).at[3].set(1e-2)
  up, down = (
    energy({**params, "time": params["time"] + sign * bump}) for sign in (1, -1)
  )
  assert float(grad[3]) == pytest.approx(float(up - down) / 2e-2, rel=2e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(window=(3, 2)), "does not fit: of 5 steps the first 4"),
    (dict(window=(np.array([0, 0, 0, 0, 0, 4]), 1)), "never the last"),
    (dict(window=(-1, 2)), "does not fit"),
    (dict(window=(jnp.arange(3), 2)), r"scalar or \[6\]"),
    (dict(key=jax.random.split(jax.random.key(0), 3)), r"one per sample"),
  ],
)
def test_bad_input(params, inputs, change, message):
  with pytest.raises(dj.UserError, match=message):
    dj.rollout(
      apply,
      params,
      *inputs,
      SIGMAS,
      kernel=KERNEL,
      **{"key": jax.random.key(0), **change},
    )


def test_conditioning_that_does_not_match_its_negative(params, inputs):
  negative = dj.Conditioning(text=jnp.zeros((B, 7, 5)))
  guidance = dj.Guidance(negative=negative, scale=jnp.float32(2))
  with pytest.raises(dj.UserError, match="pad both to one text length"):
    run(params, inputs, guidance=guidance)
  with pytest.raises(dj.UserError, match="sigmas must be"):
    dj.sample_ode(apply, params, *inputs, SIGMAS[None])
