"""The SD3 transformer against diffusers', and its pure form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed
from flax import nnx

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.grpo.train_step import join
from digen_jax.models import lora, sd3
from digen_jax.weights import load, names, parity
from tests import model_checks, references
from tests.references import jit, random_model

CONFIG = references.SD3_CONFIG
SD3 = dict(num_layers=2, dual_attention_layers=(), qk_norm=None)


def draw_inputs(seed, batch, height, width, text_len):
  """Forward arguments, as numpy, named as diffusers names them."""
  return dict(
    hidden_states=references.normal(seed, batch, 4, height, width),
    encoder_hidden_states=references.normal(seed + 1, batch, text_len, 20),
    pooled_projections=references.normal(seed + 2, batch, 12),
    timestep=np.linspace(937.3, 113.7, batch, dtype=np.float32),
  )


def run_reference(module, inputs):
  inputs = {name: torch.from_numpy(x) for name, x in inputs.items()}
  return module(**inputs).sample.numpy()


def check_parity(directory, reference, inputs):
  """Loads what diffusers saves and compares the outputs."""
  reference.save_pretrained(directory)
  expected = run_reference(reference, inputs)
  model = load.load_model(directory)

  @jit
  def run(params, latents, text, pooled, timestep):
    module = nnx.merge(model.graphdef, params)
    latents = latents.transpose(0, 2, 3, 1)
    return module(latents, text, pooled, timestep).transpose(0, 3, 1, 2)

  actual = run(model.params, *inputs.values())
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize(
  "overrides, batch, height, width, text_len",
  [
    ({}, 2, 12, 8, 9),
    (
      dict(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=4,
        dual_attention_layers=(0, 1),
        pos_embed_max_size=6,
      ),
      3,
      6,
      10,
      1,
    ),
    (SD3 | dict(num_attention_heads=1, caption_projection_dim=24), 1, 2, 18, 5),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, height, width, text_len):
  reference = references.sd3(seed=3, **overrides)
  inputs = draw_inputs(5, batch, height, width, text_len)
  check_parity(tmp_path, reference, inputs)


def test_small_variance_shows_every_epsilon(tmp_path):
  """Tokens, queries and keys so small that the norms' epsilons matter."""
  reference = references.sd3(seed=4)
  for name, parameter in reference.named_parameters():
    if re.search(r"(pos_embed\.proj|embedder)\.\w+$|to_[qk]\.|add_[qk]_", name):
      parameter.data *= 2e-3
  reference.pos_embed.pos_embed *= 2e-3
  check_parity(tmp_path, reference, draw_inputs(6, 2, 6, 8, 5))


def test_diffusers_loads_what_we_save(tmp_path):
  reference = references.sd3(seed=7)
  again = model_checks.check_round_trip(reference, tmp_path)
  inputs = draw_inputs(8, 1, 4, 6, 4)
  # How PyTorch sums depends on where weights lie in memory.
  np.testing.assert_allclose(
    run_reference(again, inputs), run_reference(reference, inputs), atol=1e-5
  )


def test_layers_are_numbered_through_the_stacks():
  model = random_model(base=CONFIG, num_layers=6, dual_attention_layers=(0, 1))
  found = {}
  for entry in names.entries(model.params, names.SD3):
    if entry.path[1:] == ("attn", "to_q", "kernel"):
      found[entry.path[0]] = [int(name.split(".")[1]) for name in entry.names]
  assert found == {
    "dual_blocks": [0, 1],
    "blocks": [2, 3, 4],
    "last_block": [5],
  }


@pytest.mark.parametrize("sample_size, side, dim", [(16, 9, 48), (128, 96, 64)])
def test_fresh_positions_are_those_of_diffusers(sample_size, side, dim):
  expected = PatchEmbed(
    height=sample_size,
    width=sample_size,
    patch_size=2,
    in_channels=4,
    embed_dim=dim,
    pos_embed_max_size=side,
  ).pos_embed
  config = dataclasses.replace(
    CONFIG,
    sample_size=sample_size,
    pos_embed_max_size=side,
    num_attention_heads=1,
    attention_head_dim=dim,
    caption_projection_dim=dim,
  )
  np.testing.assert_array_equal(sd3.position_table(config), expected)


def arguments(height=6, width=4):
  latents, sigma, conditioning = references.arguments(
    height=height, width=width
  )
  return latents, sigma, dataclasses.replace(conditioning, guidance=None)


def test_apply_takes_sigma(tmp_path):
  reference = references.sd3(seed=1)
  reference.save_pretrained(tmp_path)
  model = load.load_model(tmp_path)
  latents, sigma, conditioning = arguments()
  actual = jit(model.apply)(model.params, latents, sigma, conditioning)
  inputs = dict(
    hidden_states=latents.transpose(0, 3, 1, 2),
    encoder_hidden_states=conditioning.text,
    pooled_projections=conditioning.pooled,
    timestep=1000 * sigma,
  )
  inputs = {name: np.array(x) for name, x in inputs.items()}
  expected = run_reference(reference, inputs).transpose(0, 2, 3, 1)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-5)


def test_the_position_table_is_never_trained():
  model = random_model(base=CONFIG)
  trainable, frozen = lora.split_trainable(model.params, "full")
  assert jax.tree.map(jnp.shape, frozen) == {
    "patch_embed": {"pos_embed": (1, 81, 48)}
  }
  jax.tree.map(
    np.testing.assert_array_equal, join(trainable, frozen), model.params
  )
  adapted = lora.adapt(
    model, rank=1, alpha=1.0, targets=("attn",), key=jax.random.key(0)
  )
  trainable, frozen = lora.split_trainable(adapted.params, "lora")
  assert "patch_embed" not in trainable
  assert frozen["patch_embed"]["pos_embed"].shape == (1, 81, 48)


@pytest.mark.slow
def test_same_bits_in_rollout_and_training():
  # What the text asks in the last block, nobody hears.
  idle = r"\.pos_embed$|last_block\.attn\.(add_q_proj|norm_added_q)"
  model_checks.check_bfloat16(CONFIG, arguments(), idle)


def test_layout_changes_nothing():
  model_checks.check_layouts(CONFIG, arguments())


def test_fresh_model():
  model_checks.check_fresh(CONFIG, arguments())


def test_parity_of_a_case(tmp_path):
  reference = references.sd3(seed=2, **SD3)
  reference.save_pretrained(tmp_path)
  inputs = draw_inputs(1, 2, 4, 6, 3)
  sample = run_reference(reference, inputs)
  np.savez(tmp_path / "inputs.npz", **inputs)
  np.savez(tmp_path / "outputs.npz", sample=sample)
  (result,) = parity.check_case(tmp_path)
  assert result.output == "sample"
  assert result.passed
  np.savez(tmp_path / "outputs.npz", sample=sample + 1e-4)
  assert not parity.check_case(tmp_path)[0].passed


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel"),
    (dict(patch_size=1), "patch_size 1"),
    (dict(out_channels=8), "out_channels 8"),
    (dict(caption_projection_dim=40), "caption_projection_dim 40"),
    (dict(dual_attention_layers=[1]), r"dual_attention_layers \(1,\)"),
    (dict(dual_attention_layers=[0, 1, 2]), "without the last of the 3"),
    (dict(qk_norm="layer_norm"), "'layer_norm'"),
    (dict(use_rope=True), "unknown key 'use_rope'"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  family = models.find_family("SD3Transformer2DModel")
  raw = dict(SD3Transformer2DModel(**references.SD3).config)
  assert family.parse_config(raw) == CONFIG
  with pytest.raises(UserError, match=message):
    family.parse_config(raw | change)


def test_bad_inputs_are_named():
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments(height=5)
  with pytest.raises(UserError, match="5 x 4; both must be even"):
    model.apply(model.params, latents, sigma, conditioning)
  latents, _, _ = arguments(height=20)
  with pytest.raises(UserError, match=r"20 x 4, but .* ends at 18"):
    model.apply(model.params, latents, sigma, conditioning)
  latents, _, _ = arguments()
  lacking = dataclasses.replace(conditioning, pooled=None)
  with pytest.raises(UserError, match=r"Conditioning\.pooled"):
    model.apply(model.params, latents, sigma, lacking)
