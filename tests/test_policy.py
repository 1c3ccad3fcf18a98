"""What units compute, with a model of one number: batches, forms of the KL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax import policy
from digen_jax.parallel.mesh import make_mesh
from digen_jax.sampler import Sampler
from digen_jax.sampling import sample_ode
from digen_jax.types import Conditioning, TrainBatch

SIGMAS = np.array([1.0, 0.8, 0.5, 0.0], np.float32)
PARAMS = {"rate": jnp.float32(0.3)}


def apply(params, x, sigma, conditioning):
  return params["rate"] * x * sigma[:, None, None, None]


def make_recipe(**changes):
  blank = policy.Recipe(*[None] * len(dataclasses.fields(policy.Recipe)))
  fixed = dict(
    apply=apply,
    decode=lambda _, latents: latents,
    solve=sample_ode,
    sigmas=SIGMAS,
    eval_sigmas=SIGMAS,
    kernel_name="flow_sde",
    noise_level=0.7,
    latent_shape=(2, 2, 3),
    clip_range=1e-3,
    kl_weight=0.5,
    rows_per_update=3,
  )
  return dataclasses.replace(blank, **fixed | changes)


@pytest.mark.parametrize(
  ("batch_size", "count", "made"),
  [(64, 3, 4), (64, 1, 2), (2, 5, 2), (3, 5, 4), (4, 4, 4)],
)
def test_a_sampler_makes_no_more_than_it_is_asked_for(batch_size, count, made):
  shapes = []

  def decode(_, latents):
    shapes.append(latents.shape)
    return latents

  mesh = make_mesh({"data": 2}, jax.devices()[:2])
  recipe = make_recipe(decode=decode, eval_batch_size=batch_size)
  prompts = Conditioning(text=np.zeros((count, 1, 1), np.float32))
  images = Sampler(recipe, mesh, {}, {})(PARAMS, prompts, None, seed=3)
  assert shapes == [(made, 2, 2, 3)]  # one compilation, whatever the count
  one = Sampler(make_recipe(eval_batch_size=1), mesh, {}, {})
  np.testing.assert_array_equal(images, one(PARAMS, prompts, None, seed=3))
  assert len(images) == count


def test_samples_come_in_batches_and_may_share_a_prompt():
  def decode(_, latents):
    return latents

  mesh = make_mesh({"data": 2}, jax.devices()[:2])
  recipe = make_recipe(decode=decode, eval_batch_size=2)
  text = np.arange(3, dtype=np.float32)[:, None, None]
  rows = np.array([0, 0, 1, 1, 2])
  sampler = Sampler(recipe, mesh, {}, {})
  args = PARAMS, Conditioning(text=text), None, 3
  batches = list(sampler.batches(*args, rows=rows))
  assert [len(batch) for batch in batches] == [2, 2, 1]
  whole = sampler(PARAMS, Conditioning(text=text[rows]), None, 3)
  np.testing.assert_array_equal(np.concatenate(batches), whole)
  assert len(np.unique(whole.reshape(5, -1), axis=0)) == 5  # by number
  # Lanes that divide them make the same.
  parts = [
    sampler.batches(*args, rows=rows, part=p) for p in (range(2), range(2, 5))
  ]
  divided = np.concatenate([batch for part in parts for batch in part])
  np.testing.assert_array_equal(divided, whole)


def test_the_form_of_the_kl_is_that_of_the_recipe():
  rng = np.random.default_rng(0)
  x, x_next = rng.normal(size=(2, 3, 2, 2, 3)).astype(np.float32)
  sigma, sigma_next = np.float32([0.8] * 3), np.float32([0.5] * 3)
  batch = TrainBatch(
    x=x,
    x_next=x_next,
    sigma=sigma,
    sigma_next=sigma_next,
    old_log_prob=np.zeros(3, np.float32),
    advantage=np.ones(3, np.float32),
    weight=np.ones(3, np.float32),
    conditioning=None,
  )
  prompts = Conditioning(text=np.zeros((1, 1, 1), np.float32))
  kl = {}
  for form in ("diffusion", "transition"):
    _, metrics = policy.gradients(
      make_recipe(kl_form=form),
      PARAMS,
      {},
      {"rate": jnp.float32(0.1)},
      batch,
      np.zeros(3, np.int32),
      prompts,
      None,
    )
    kl[form] = float(metrics["kl_sum"])
  # The std of a step is that of the diffusion times the root of its size.
  assert kl["transition"] * 0.3 == pytest.approx(kl["diffusion"], rel=1e-4)
  assert kl["diffusion"] > 0


def test_a_video_of_one_frame_is_a_picture():
  assert policy.still(np.zeros((2, 1, 4, 5, 3))).shape == (2, 4, 5, 3)
  for shape in ((2, 3, 4, 5, 3), (1, 4, 5, 3)):
    assert policy.still(np.zeros(shape)).shape == shape
