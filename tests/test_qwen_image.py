"""The Qwen-Image transformer against diffusers', and its pure form."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from flax import nnx

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.models import layers, qwen_image
from digen_jax.weights import load, parity
from tests import model_checks, references
from tests.references import jit, random_model

CONFIG = references.QWEN_IMAGE_CONFIG
FEW_HEADS = dict(
  num_attention_heads=3,
  attention_head_dim=16,
  axes_dims_rope=(4, 6, 6),
  num_layers=1,
)


def padding(lengths, text_len):
  return np.arange(text_len) < np.array(lengths)[:, None]


def draw_inputs(seed, batch, grid, text_len, mask):
  """Forward arguments, as numpy, named as diffusers names them."""
  inputs = dict(
    hidden_states=references.normal(seed, batch, grid[0] * grid[1], 16),
    encoder_hidden_states=references.normal(seed + 1, batch, text_len, 20),
    timestep=np.linspace(0.937, 0.113, batch, dtype=np.float32),
    img_shape=np.array([1, *grid]),
  )
  return inputs | ({} if mask is None else dict(mask=mask))


def run_reference(module, inputs):
  tensors = {k: torch.from_numpy(x) for k, x in inputs.items()}
  shape = tuple(tensors.pop("img_shape").tolist())
  mask = tensors.pop("mask", None)
  shapes = [[shape]] * tensors["timestep"].shape[0]
  return module(
    **tensors, encoder_hidden_states_mask=mask, img_shapes=shapes
  ).sample.numpy()


def run_ours(directory, inputs):
  model = load.load_model(directory)
  shape = tuple(map(int, inputs["img_shape"]))

  @jit
  def run(params, tokens, text, mask, timestep):
    module = nnx.merge(model.graphdef, params)
    return module(tokens, text, mask, timestep, shape)

  return run(
    model.params,
    inputs["hidden_states"],
    inputs["encoder_hidden_states"],
    inputs.get("mask"),
    inputs["timestep"],
  )


HOLES = np.array([[1, 0, 1, 1, 0, 0, 1]] * 2 + [[0] * 7], bool)


@pytest.mark.parametrize(
  "overrides, batch, grid, text_len, mask",
  [
    ({}, 2, (4, 6), 9, padding((9, 5), 9)),
    (FEW_HEADS, 3, (5, 3), 7, HOLES),
    (dict(num_attention_heads=1), 1, (1, 7), 1, None),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, grid, text_len, mask):
  reference = references.qwen_image(seed=3, **overrides)
  reference.save_pretrained(tmp_path)
  inputs = draw_inputs(5, batch, grid, text_len, mask)
  actual = run_ours(tmp_path, inputs)
  assert actual.dtype == jnp.float32
  expected = run_reference(reference, inputs)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-5)


def test_small_variance_shows_every_epsilon(tmp_path):
  """Tokens, text, queries and keys so small that the epsilons matter."""
  reference = references.qwen_image(seed=4)
  for name, parameter in reference.named_parameters():
    if re.search(r"(img|txt)_in\.|to_[qk]\.|add_[qk]_", name):
      parameter.data *= 2e-3
  reference.save_pretrained(tmp_path)
  inputs = draw_inputs(6, 2, (3, 4), 5, padding((5, 3), 5))
  inputs["encoder_hidden_states"] *= 1e-3
  actual = run_ours(tmp_path, inputs)
  expected = run_reference(reference, inputs)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-5)


def test_diffusers_loads_what_we_save(tmp_path):
  reference = references.qwen_image(seed=7)
  again = model_checks.check_round_trip(reference, tmp_path)
  inputs = draw_inputs(8, 1, (2, 3), 4, None)
  # How PyTorch sums depends on where weights lie in memory.
  np.testing.assert_allclose(
    run_reference(again, inputs), run_reference(reference, inputs), atol=1e-5
  )


@pytest.mark.parametrize("grid, text_len", [((5, 8), 1024), ((84, 3), 77)])
def test_rotations_are_those_of_diffusers(grid, text_len):
  """At position 1000 an angle in float64 would be 3e-5 off."""
  rope = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
  image, text = rope([(1, *grid)], max_txt_seq_len=text_len)
  expected = torch.cat([text, image]).numpy()
  ids = qwen_image.positions((1, *grid), text_len)
  actual = layers.rope_table(ids, (16, 56, 56), dtype=np.float32)
  np.testing.assert_allclose(actual[0], expected.real, rtol=0, atol=2e-7)
  np.testing.assert_allclose(actual[1], expected.imag, rtol=0, atol=2e-7)
  fine = layers.rope_table(ids, (16, 56, 56))
  if text_len > 1000:
    assert np.abs(fine - actual).max() > 1e-5


def arguments(height=6, width=4, text_len=5):
  latents, sigma, conditioning = references.arguments(
    height=height, width=width, text_len=text_len
  )
  mask = jnp.asarray(padding((5, 3, 1), text_len))
  conditioning = dataclasses.replace(
    conditioning, pooled=None, guidance=None, mask=mask
  )
  return latents, sigma, conditioning


def test_apply_is_the_module_on_patches():
  """Channel, row, column within a token, as diffusers' pipeline packs them."""
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments()
  actual = jit(model.apply)(model.params, latents, sigma, conditioning)
  patches = latents.reshape(3, 3, 2, 2, 2, 4).transpose(0, 1, 3, 5, 2, 4)

  @jit
  def run(params, tokens):
    module = nnx.merge(model.graphdef, params)
    text, mask = conditioning.text, conditioning.mask
    return module(tokens, text, mask, sigma, (1, 3, 2))

  tokens = run(model.params, patches.reshape(3, 6, 16))
  expected = tokens.reshape(3, 3, 2, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  np.testing.assert_allclose(
    actual, expected.reshape(3, 6, 4, 4), rtol=0, atol=1e-5
  )


def test_padding_has_no_influence():
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments()
  apply = jit(model.apply)
  plain = apply(model.params, latents, sigma, conditioning)
  noise = references.normal(9, *conditioning.text.shape)
  text = jnp.where(conditioning.mask[..., None], conditioning.text, noise)
  other = dataclasses.replace(conditioning, text=text)
  np.testing.assert_array_equal(
    apply(model.params, latents, sigma, other), plain
  )
  full = dataclasses.replace(
    conditioning, mask=jnp.ones_like(conditioning.mask)
  )
  full = apply(model.params, latents, sigma, full)
  assert float(jnp.abs(full - plain)[1:].max()) > 0.01


@pytest.mark.slow
def test_same_bits_in_rollout_and_training():
  model_checks.check_bfloat16(CONFIG, arguments())


def test_layout_changes_nothing():
  model_checks.check_layouts(CONFIG, arguments())


def test_fresh_model():
  model_checks.check_fresh(CONFIG, arguments())


def test_parity_of_a_case(tmp_path):
  reference = references.qwen_image(seed=2)
  reference.save_pretrained(tmp_path)
  inputs = draw_inputs(1, 2, (2, 3), 4, padding((4, 2), 4))
  outputs = run_reference(reference, inputs)
  inputs["encoder_hidden_states_mask"] = inputs.pop("mask").astype(np.int64)
  np.savez(tmp_path / "inputs.npz", **inputs)
  np.savez(tmp_path / "outputs.npz", sample=outputs)
  (result,) = parity.check_case(tmp_path)
  assert result.output == "sample"
  assert result.passed
  np.savez(tmp_path / "outputs.npz", sample=outputs + 1e-4)
  assert not parity.check_case(tmp_path)[0].passed


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel"),
    (dict(patch_size=1), "patch_size 1"),
    (dict(out_channels=16), "4 x out_channels 16"),
    (dict(out_channels=None), "out_channels None"),
    (dict(axes_dims_rope=[4, 10]), "attention_head_dim"),
    (dict(guidance_embeds=True), "guidance_embeds=True"),
    (dict(zero_cond_t=True), "zero_cond_t=True"),
    (dict(use_additional_t_cond=True), "use_additional_t_cond=True"),
    (dict(use_layer3d_rope=True), "use_layer3d_rope=True"),
    (dict(causal_condition=True), "unknown key 'causal_condition'"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  family = models.find_family("QwenImageTransformer2DModel")
  published = dict(guidance_embeds=False, pooled_projection_dim=768)
  raw = references.QWEN_IMAGE | published
  assert family.parse_config(raw) == CONFIG
  with pytest.raises(UserError, match=message):
    family.parse_config(raw | change)


def test_bad_inputs_are_named():
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments(width=5)
  with pytest.raises(UserError, match="6 x 5; both must be even"):
    model.apply(model.params, latents, sigma, conditioning)
