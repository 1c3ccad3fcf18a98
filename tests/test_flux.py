"""The FLUX transformer against diffusers', and its pure form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from flax import nnx

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.attention import attention
from digen_jax.weights import load
from tests import model_checks, references
from tests.references import arguments, jit, random_model


@pytest.mark.parametrize(
  "overrides, batch, grid, text_len",
  [
    ({}, 2, (4, 6), 7),
    (
      dict(
        num_attention_heads=3,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
        num_layers=1,
        num_single_layers=3,
      ),
      3,
      (5, 3),
      1,
    ),
    (dict(out_channels=8, num_attention_heads=1), 1, (1, 7), 9),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, grid, text_len):
  reference = references.flux(seed=3, **overrides)
  inputs = references.flux_inputs(
    5, batch, grid, text_len, reference.config.guidance_embeds
  )
  check_parity(tmp_path, reference, inputs)


def test_small_variance_shows_every_epsilon(tmp_path):
  """Tokens, queries and keys so small that the norms' epsilons matter."""
  reference = references.flux(seed=4)
  for name, parameter in reference.named_parameters():
    if re.search(r"embedder\.(weight|bias)$|to_[qk]\.|add_[qk]_", name):
      parameter.data *= 2e-3
  check_parity(tmp_path, reference, references.flux_inputs(6, 2, (3, 4), 5, 1))


def check_parity(directory, reference, inputs):
  """Loads what diffusers saves and compares the outputs."""
  reference.save_pretrained(directory)
  expected = references.run_flux(reference, inputs)
  model = load.load_model(directory)
  ids = {key: inputs.pop(key) for key in ("img_ids", "txt_ids")}

  @jit
  def run(params, inputs):
    module = nnx.merge(model.graphdef, params)
    return module(
      inputs["hidden_states"],
      inputs["encoder_hidden_states"],
      inputs["pooled_projections"],
      inputs["timestep"],
      **ids,
      guidance=inputs.get("guidance"),
    )

  actual = run(model.params, inputs)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-5)


def test_apply_packs_patches_in_channel_row_column_order():
  model = random_model()
  latents, sigma, conditioning = arguments()
  actual = jit(model.apply)(model.params, latents, sigma, conditioning)

  tokens, ids = [], []
  for row in range(3):
    for column in range(2):
      patch = latents[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
      tokens.append(jnp.moveaxis(patch, -1, 1).reshape(3, 16))
      ids.append([0, row, column])
  output = nnx.merge(model.graphdef, model.params)(
    jnp.stack(tokens, axis=1),
    conditioning.text,
    conditioning.pooled,
    sigma,
    np.array(ids),
    np.zeros((5, 3)),
    conditioning.guidance,
  )
  for i, (_, row, column) in enumerate(ids):
    patch = jnp.moveaxis(output[:, i].reshape(3, 4, 2, 2), 1, -1)
    np.testing.assert_allclose(
      actual[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2],
      patch,
      atol=1e-5,
    )


def test_scalar_sigma_is_every_samples_sigma():
  model = random_model()
  latents, _, conditioning = arguments()
  apply = jit(model.apply)
  scalar = apply(model.params, latents, jnp.float32(0.37), conditioning)
  vector = apply(model.params, latents, jnp.full(3, 0.37), conditioning)
  np.testing.assert_allclose(scalar, vector, atol=2e-6)
  assert float(jnp.abs(scalar).mean()) > 0.1


def test_same_bits_in_rollout_and_training():
  """The forward of a gradient, whatever is recomputed, is the plain one."""
  latents, sigma, conditioning = arguments()
  model = random_model()
  plain = jax.jit(model.apply)(model.params, latents, sigma, conditioning)
  gradients = []
  for remat in ("none", "dots"):
    apply = random_model(remat=remat).apply

    def loss(params, apply=apply):
      velocity = apply(params, latents, sigma, conditioning)
      return jnp.mean(velocity**2), velocity

    gradient, velocity = jax.jit(jax.grad(loss, has_aux=True))(model.params)
    np.testing.assert_array_equal(velocity, plain)
    gradients.append(gradient)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-5 * float(jnp.abs(b).max())
    ),
    *gradients,
  )


def test_bfloat16():
  model_checks.check_bfloat16(references.CONFIG, arguments())


def test_layouts_agree():
  model_checks.check_layouts(references.CONFIG, arguments())


def test_apply_is_a_stable_static_argument():
  first, second = random_model(0), random_model(1)
  assert first.apply == second.apply
  assert hash(first.apply) == hash(second.apply)
  assert first.apply != random_model(0, dtype="bfloat16").apply


def test_fresh_model():
  model_checks.check_fresh(references.CONFIG, arguments())
  model = models.create_model(references.CONFIG, jax.random.key(0))
  kernels = model.params["double_blocks"]["attn"]["to_q"]["kernel"]
  assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.1


def test_timestep_embedding_matches_diffusers():
  t = np.array([0.0, 1.7, 437.3, 999.0, 4100.0], np.float32)
  expected = get_timestep_embedding(
    torch.from_numpy(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0
  )
  actual = layers.timestep_embedding(jnp.asarray(t))
  # One unit in the last place of 4100 is 5e-4.
  np.testing.assert_allclose(actual[:4], expected[:4], atol=1e-4)
  np.testing.assert_allclose(actual[4], expected[4], atol=1e-3)


def test_rope_rotates_adjacent_pairs():
  table = layers.rope_table(np.array([[2.0, 3.0]]), (2, 4), theta=100.0)
  angles = np.array([2.0, 3.0, 3.0 / 10.0])
  np.testing.assert_allclose(table[0, 0], np.cos(angles), rtol=1e-6)
  np.testing.assert_allclose(table[1, 0], np.sin(angles), rtol=1e-6)
  x = jnp.array([1.0, 0.0, 0.0, 1.0, 2.0, 0.0]).reshape(1, 1, 1, 6)
  expected = np.concatenate(
    [
      [np.cos(2.0), np.sin(2.0)],
      [-np.sin(3.0), np.cos(3.0)],
      [2 * np.cos(0.3), 2 * np.sin(0.3)],
    ]
  )
  actual = layers.apply_rope(x, table)[0, 0, 0]
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_attention_ignores_masked_keys():
  query, key, value = (
    jnp.asarray(references.normal(i, 2, 5, 3, 4)) for i in range(3)
  )
  mask = jnp.array([[True, True, True, False, False], [True] * 5])
  actual = attention(query, key, value, mask)
  short = attention(query[:1], key[:1, :3], value[:1, :3])
  np.testing.assert_allclose(actual[:1], short, atol=1e-6)
  full = attention(query[1:], key[1:], value[1:])
  np.testing.assert_allclose(actual[1:], full, atol=1e-6)
  weights = np.einsum("shd,thd->hst", query[1], key[1]) / 2.0
  weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
  expected = np.einsum("hst,thd->shd", weights, value[1])
  np.testing.assert_allclose(actual[1], expected, atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="SD3Transformer2DModel"), "SD3Transformer2DModel"),
    (dict(patch_size=2), "patch_size"),
    (dict(axes_dims_rope=[4, 10]), "attention_head_dim"),
    (dict(in_channels=6), "multiple of 4"),
    (dict(zero_cond_t=True), "zero_cond_t"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  family = models.find_family("FluxTransformer2DModel")
  raw = dict(_class_name=family.class_name) | references.FLUX
  assert (
    family.parse_config(raw | {"_diffusers_version": "1"}) == references.CONFIG
  )
  with pytest.raises(UserError, match=message):
    family.parse_config(raw | change)


def test_bad_inputs_are_named():
  model = random_model()
  latents, sigma, conditioning = arguments(height=5)
  with pytest.raises(UserError, match="5 x 4; both must be even"):
    model.apply(model.params, latents, sigma, conditioning)
  latents, _, _ = arguments()
  for field in ("pooled", "guidance"):
    lacking = dataclasses.replace(conditioning, **{field: None})
    with pytest.raises(UserError, match=f"Conditioning.{field}"):
      model.apply(model.params, latents, sigma, lacking)
  with pytest.raises(UserError, match="NoSuchModel"):
    models.find_family("NoSuchModel")
