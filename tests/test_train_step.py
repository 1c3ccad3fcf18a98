"""The gradient of a pack against the loss written out, and its algebra."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import digen_jax as dj

B, STEPS, WIDTH = 4, 6, 3
SHAPE = (2, 3, 3)
CLIP = 1e-4
SIGMAS = dj.sigma_schedule("dance", STEPS, shift=3.0)
KERNEL = partial(dj.flow_sde, noise_level=0.8, sigma_max=float(SIGMAS[1]))
START = np.array([0, 2, 1, 2])
ADVANTAGES = np.array([1.5, -0.5, 7.0, -1.2], np.float32)


def apply(params, x, sigma, conditioning, dtype=jnp.float32):
  """A two-layer denoiser per latent pixel."""
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  text = conditioning.text.astype(dtype).mean(1) @ params["text"]["kernel"]
  time = sigma.astype(dtype)[:, None] * params["time"][None]
  hidden = x.astype(dtype) @ params["in"]["kernel"]
  hidden = hidden + (text + time)[:, None, None]
  return jnp.tanh(hidden) @ params["out"]["kernel"]


def make_params(seed):
  rng = np.random.default_rng(seed)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  return {
    "in": {"kernel": array(3, 8)},
    "text": {"kernel": array(5, 8)},
    "time": array(8),
    "out": {"kernel": array(8, 3)},
  }


PARAMS = make_params(0)
REFERENCE = jax.tree.map(lambda a, b: a + 0.1 * b, PARAMS, make_params(2))
NEAR = jax.tree.map(lambda a, b: a + 3e-4 * b, PARAMS, make_params(1))


@partial(jax.jit, static_argnames=("model", "guided"))
def make_batch(params, advantages, model=apply, guided=False):
  key = jax.random.key(0)
  text = jax.random.normal(key, (2, B, 2, 5))
  conditioning = dj.Conditioning(text=text[0])
  guidance = None
  if guided:
    negative = dj.Conditioning(text=text[1])
    guidance = dj.Guidance(negative=negative, scale=jnp.arange(1.0, B + 1))
  trajectory = dj.rollout(
    model,
    params,
    dj.initial_latents(key, (B, *SHAPE)),
    conditioning,
    SIGMAS,
    key=key,
    kernel=KERNEL,
    window=(jnp.array(START), WIDTH),
    guidance=guidance,
  )
  batch = dj.fold(
    trajectory, advantages, SIGMAS, conditioning, guidance=guidance
  )
  return trajectory, conditioning, batch


@pytest.fixture(scope="module")
def sampled():
  return make_batch(PARAMS, ADVANTAGES)


@pytest.fixture(scope="module")
def batch(sampled):
  return sampled[2]


@partial(jax.jit, static_argnames=("kernel", "kl_weight", "kl_form"))
def step(params, batch, kernel=KERNEL, **options):
  return dj.train_step(
    apply, params, batch, kernel=kernel, clip_range=CLIP, **options
  )


def assert_close(actual, expected, rtol=1e-5):
  """Relative in norm, leaf by leaf."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) > 0


def rows_of(batch, rows):
  return jax.tree.map(lambda a: a[rows] if jnp.ndim(a) else a, batch)


def test_fold_is_sample_major(sampled):
  trajectory, conditioning, batch = sampled
  assert batch.x.shape == (B * WIDTH, *SHAPE)
  for b in range(B):
    for w in range(WIDTH):
      row = b * WIDTH + w
      i = START[b] + w
      np.testing.assert_array_equal(batch.x[row], trajectory.states[b, w])
      np.testing.assert_array_equal(
        batch.x_next[row], trajectory.states[b, w + 1]
      )
      assert float(batch.sigma[row]) == SIGMAS[i]
      assert float(batch.sigma_next[row]) == SIGMAS[i + 1]
      assert float(batch.old_log_prob[row]) == trajectory.log_probs[b, w]
      assert float(batch.advantage[row]) == ADVANTAGES[b]
      np.testing.assert_array_equal(
        batch.conditioning.text[row], conditioning.text[b]
      )
  np.testing.assert_array_equal(batch.weight, np.ones(B * WIDTH))


def test_fold_of_some_steps_takes_those_rows(sampled):
  trajectory, conditioning, batch = sampled
  part = dj.fold(
    trajectory, ADVANTAGES, SIGMAS, conditioning, steps=slice(1, 3)
  )
  rows = [b * WIDTH + w for b in range(B) for w in (1, 2)]
  jax.tree.map(
    np.testing.assert_array_equal, part, rows_of(batch, np.array(rows))
  )


def written_out(params, batch):
  """Mean over rows of the clipped loss, from the SDE's definition."""
  s, s_next = batch.sigma, batch.sigma_next
  v = apply(params, batch.x, s, batch.conditioning)
  s, s_next = s[:, None, None, None], s_next[:, None, None, None]
  g = 0.8 * jnp.sqrt(s / jnp.maximum(1 - s, 1 - SIGMAS[1]))
  score = -(batch.x + (1 - s) * v) / s
  mean = batch.x + (v - g**2 / 2 * score) * (s_next - s)
  std = g * jnp.sqrt(s - s_next)
  log_prob = jax.scipy.stats.norm.logpdf(batch.x_next, mean, std)
  ratio = jnp.exp(log_prob.mean((1, 2, 3)) - batch.old_log_prob)
  advantage = jnp.clip(batch.advantage, -5, 5)
  limited = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
  rows = jnp.maximum(-advantage * ratio, -advantage * limited)
  return rows.mean(), (ratio, mean, std, g)


def test_gradient_is_that_of_the_loss_written_out(batch):
  expected, (ratio, *_) = jax.jit(jax.grad(written_out, has_aux=True))(
    NEAR, batch
  )
  grads, metrics = step(NEAR, batch)
  assert_close(grads, expected)
  clipped = np.abs(ratio - 1) > CLIP
  assert 0 < clipped.sum() < len(clipped)  # both branches are in it
  assert float(metrics["clip_sum"]) == clipped.sum()
  assert float(metrics["rows"]) == B * WIDTH
  loss = float(written_out(NEAR, batch)[0])
  assert float(metrics["loss_sum"]) == pytest.approx(loss * B * WIDTH, rel=1e-5)
  means = dj.mean_metrics(metrics)
  assert float(means["loss"]) == pytest.approx(loss, rel=1e-5)
  assert float(means["ratio_mean"]) == pytest.approx(float(ratio.mean()))
  largest = float(jnp.max(jnp.abs(jnp.log(ratio))))
  assert float(means["ratio_max_abs_log"]) == pytest.approx(largest, abs=5e-7)


@pytest.mark.parametrize(
  ("dtype", "guided"), [(jnp.float32, True), (jnp.bfloat16, False)]
)
def test_on_policy_the_ratio_is_one(dtype, guided):
  model = partial(apply, dtype=dtype)
  _, _, batch = make_batch(PARAMS, ADVANTAGES, model=model, guided=guided)
  _, metrics = jax.jit(
    lambda batch: dj.train_step(
      model, PARAMS, batch, kernel=KERNEL, clip_range=CLIP
    )
  )(batch)
  assert float(metrics["ratio_max_abs_log"]) <= 1e-6
  assert float(metrics["clip_sum"]) == 0


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_packs_add_up_to_the_whole(batch, kl_weight):
  options = dict(kl_weight=kl_weight, reference=REFERENCE)
  whole, metrics = step(NEAR, batch, **options)
  cuts = [np.arange(0, 5), np.arange(5, 10), np.arange(10, 12)]
  packs = [rows_of(batch, rows) for rows in cuts]
  packs[2] = dj.pad(packs[2], 5)
  parts = [step(NEAR, p, normalizer=12.0, **options) for p in packs]
  grads = jax.tree.map(lambda *g: sum(g), *(grads for grads, _ in parts))
  assert_close(grads, whole, rtol=1e-6)
  added = dj.add_metrics(dj.add_metrics(parts[0][1], parts[1][1]), parts[2][1])
  assert added.keys() == metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(added[name], value, rtol=1e-5, err_msg=name)


def test_padding_counts_for_nothing(batch):
  padded = dj.pad(batch, 17)
  np.testing.assert_array_equal(padded.weight, [1.0] * 12 + [0.0] * 5)
  assert padded.x.shape == (17, *SHAPE)
  grads, metrics = step(NEAR, padded)
  expected, expected_metrics = step(NEAR, batch)
  assert_close(grads, expected, rtol=1e-6)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
  assert all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(dj.pad(batch, 12)), jax.tree.leaves(batch))
  )
  with pytest.raises(dj.UserError, match="12 rows do not fit in 11"):
    dj.pad(batch, 11)


def test_weights_scale_their_rows(batch):
  weight = jnp.arange(12, dtype=jnp.float32)
  weighted = dataclasses.replace(batch, weight=weight)
  grads, _ = step(NEAR, weighted, normalizer=1.0)
  parts = [
    jax.tree.map(
      lambda g, i=i: i * g, step(NEAR, rows_of(batch, np.array([i])))[0]
    )
    for i in range(12)
  ]
  assert_close(grads, jax.tree.map(lambda *g: sum(g), *parts), rtol=1e-5)


@pytest.mark.parametrize("form", ["diffusion", "transition"])
def test_kl_to_the_reference(batch, form):
  def kl(params):
    _, (_, mean, std, g) = written_out(params, batch)
    _, (_, reference_mean, *_) = written_out(REFERENCE, batch)
    scale = std if form == "transition" else g
    rows = ((mean - reference_mean) ** 2 / (2 * scale**2)).mean((1, 2, 3))
    return rows.mean()

  plain, _ = step(NEAR, batch)
  expected = jax.tree.map(
    lambda p, k: p + 0.5 * k, plain, jax.jit(jax.grad(kl))(NEAR)
  )
  grads, metrics = step(
    NEAR, batch, kl_weight=0.5, reference=REFERENCE, kl_form=form
  )
  assert_close(grads, expected)
  assert float(metrics["kl_sum"]) == pytest.approx(
    12 * float(kl(NEAR)), rel=1e-5
  )


def test_kl_of_cps_has_one_form(batch):
  kernel = partial(dj.flow_cps, noise_level=0.8)
  sums = [
    float(
      step(
        NEAR,
        batch,
        kernel=kernel,
        kl_weight=1.0,
        reference=REFERENCE,
        kl_form=form,
      )[1]["kl_sum"]
    )
    for form in ("diffusion", "transition")
  ]
  assert sums[0] == sums[1] > 0


def test_frozen_parameters_have_no_gradient(batch):
  trainable = {"in": NEAR["in"], "time": NEAR["time"]}
  frozen = {"text": NEAR["text"], "out": NEAR["out"]}
  grads, _ = step(trainable, batch, frozen=frozen)
  whole, _ = step(NEAR, batch)
  assert_close(grads, {"in": whole["in"], "time": whole["time"]}, rtol=1e-6)


def test_join():
  joined = dj.join({"a": {"x": 1}, "c": 2}, {"a": {"y": 3}, "b": 4})
  assert joined == {"a": {"x": 1, "y": 3}, "b": 4, "c": 2}
  with pytest.raises(dj.UserError, match="both trainable and frozen"):
    dj.join({"a": 1}, {"a": 2})


def test_a_kl_weight_needs_a_reference(batch):
  with pytest.raises(dj.UserError, match="kl_weight needs a reference"):
    dj.train_step(
      apply, PARAMS, batch, kernel=KERNEL, clip_range=CLIP, kl_weight=0.1
    )


def test_sharded_rows_give_the_same_gradient(batch):
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
  params = jax.device_put(NEAR, jax.NamedSharding(mesh, jax.P()))
  assert_close(step(params, spread)[0], step(NEAR, batch)[0], rtol=1e-6)
