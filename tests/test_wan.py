"""The Wan transformer against diffusers', and its pure form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.models.wan import WanConfig
from digen_jax.types import Conditioning
from digen_jax.weights import export, load, parity
from tests import model_checks as checks
from tests.references import jit, normal, random_model, randomise

TINY = dict(
  num_attention_heads=2,
  attention_head_dim=24,
  in_channels=4,
  out_channels=4,
  text_dim=20,
  ffn_dim=40,
  num_layers=2,
  rope_max_seq_len=32,
)
CONFIG = WanConfig(**TINY)
SMALL = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)


def wan(seed=0, **overrides):
  return randomise(WanTransformer3DModel(**TINY | overrides), seed)


def run(module, latents, timestep, text):
  args = (torch.from_numpy(x) for x in (latents, timestep, text))
  return module(*args).sample.numpy()


def arguments(batch=3, text_len=5):
  return (
    jnp.asarray(normal(0, batch, 2, 6, 4, 4)),
    jnp.linspace(0.13, 0.87, batch),
    Conditioning(text=jnp.asarray(normal(1, batch, text_len, 20))),
  )


@pytest.mark.parametrize(
  "overrides, batch, size, text_len",
  [
    ({}, 2, (3, 4, 6), 7),
    (
      dict(num_attention_heads=3, attention_head_dim=16, out_channels=6),
      3,
      (1, 10, 6),
      1,
    ),
    (
      dict(num_attention_heads=1, patch_size=(2, 1, 3), freq_dim=32),
      1,
      (4, 1, 9),
      9,
    ),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, size, text_len):
  reference = wan(3, **overrides)
  latents = normal(4, batch, 4, *size)
  timestep = np.array([999, 423, 57], np.int64)[:batch]
  text = normal(5, batch, text_len, 20)
  check_parity(tmp_path, reference, latents, timestep, text)


def test_a_timestep_for_each_token(tmp_path):
  rng = np.random.default_rng(0)
  timestep = rng.uniform(0, 1000, (2, 18)).astype(np.float32)
  timestep[:, :6] = 0
  args = normal(6, 2, 4, 3, 4, 6), timestep, normal(7, 2, 5, 20)
  check_parity(tmp_path, wan(8), *args)


def test_small_variance_shows_every_epsilon(tmp_path):
  """Tokens, queries and keys so small that the norms' epsilons matter."""
  reference = wan(9)
  # Values of the last cross-attention stay large: they show its queries.
  small = (
    r"patch_embedding|to_[qk]\.|attn1\.to_(v|out)|0\.attn2\.to_(v|out)|net\.2"
  )
  for name, parameter in reference.named_parameters():
    if re.search(small, name):
      parameter.data *= 2e-3
  args = normal(10, 2, 4, 2, 4, 6), np.array([999, 400]), normal(11, 2, 5, 20)
  check_parity(tmp_path, reference, *args)


def check_parity(directory, reference, latents, timestep, text):
  expected = run(reference, latents, timestep, text)
  reference.save_pretrained(directory)
  model = load.load_model(directory)
  timestep = timestep.astype(np.float32)
  actual = checks.run_module(
    model, checks.channels_last(latents), timestep, text
  )
  np.testing.assert_allclose(
    checks.channels_first(actual), expected, rtol=0, atol=4e-5
  )


def test_apply_takes_sigma(tmp_path):
  reference = wan(12)
  reference.save_pretrained(tmp_path)
  model = load.load_model(tmp_path)
  latents, sigma, conditioning = arguments()
  expected = run(
    reference,
    checks.channels_first(latents),
    1000 * np.asarray(sigma),
    np.array(conditioning.text),
  )
  actual = jit(model.apply)(model.params, latents, sigma, conditioning)
  np.testing.assert_allclose(
    checks.channels_first(actual), expected, rtol=0, atol=4e-5
  )
  one = jit(model.apply)(model.params, latents, sigma[0], conditioning)
  np.testing.assert_allclose(one[0], actual[0], atol=1e-5)


def test_same_bits_in_rollout_and_training():
  checks.check_bfloat16(CONFIG, arguments())


def test_row_blocks(monkeypatch):
  checks.check_row_blocks(CONFIG, arguments(), monkeypatch)


def test_layouts_agree():
  """Also where the norm over all heads sums across devices."""
  checks.check_layouts(CONFIG, arguments(batch=2))


def test_fresh_model():
  checks.check_fresh(CONFIG, arguments())


def test_round_trip(tmp_path):
  reference = wan(13)
  again = checks.check_round_trip(reference, tmp_path)
  args = normal(1, 1, 4, 1, 4, 4), np.array([400]), normal(2, 1, 3, 20)
  # How PyTorch sums depends on where weights lie in memory.
  np.testing.assert_allclose(
    run(again, *args), run(reference, *args), atol=1e-5
  )


def test_what_diffusers_keeps_in_float32(tmp_path):
  """Loaded in bfloat16, bit by bit; and it matters."""
  wan(15).save_pretrained(tmp_path / "in")
  theirs = WanTransformer3DModel.from_pretrained(
    tmp_path / "in", torch_dtype=torch.bfloat16
  )
  expected = theirs.requires_grad_(False).state_dict()
  model = load.load_model(tmp_path / "in", param_dtype="bfloat16")
  raw = model.family.config_dict(model.config)
  export.save_module(tmp_path / "out", model.params, raw, dtype=None)
  stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
  assert stored.keys() == expected.keys()
  for name, tensor in stored.items():
    assert tensor.dtype == expected[name].dtype, name
    assert torch.equal(tensor, expected[name]), name
  kinds = {x.dtype for x in jax.tree.leaves(model.params)}
  assert kinds == {jnp.dtype("float32"), jnp.dtype("bfloat16")}

  half = load.load_model(tmp_path / "in", dtype="bfloat16")
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
  latents, timestep = normal(16, 2, 4, 2, 6, 4), np.float32([999, 423])
  text = normal(17, 2, 5, 20)

  def errors(model, reference):
    for params in (model.params, rounded):
      actual = checks.run_module(
        dataclasses.replace(model, params=params),
        checks.channels_last(latents),
        timestep,
        text,
      )
      difference = checks.channels_first(actual) - reference
      yield np.linalg.norm(difference) / np.linalg.norm(reference)

  x, t, prompt = map(torch.from_numpy, (latents, timestep, text))
  in_half = theirs(x.bfloat16(), t, prompt.bfloat16()).sample.float().numpy()
  kept, lost = errors(half, in_half)
  assert kept < lost < 0.01
  # In float32 the weights' rounding shows alone.
  kept, lost = errors(model, run(theirs.float(), latents, timestep, text))
  assert kept < 1e-5 and lost > 5e-4


def test_parity_case(tmp_path):
  reference = wan(14)
  reference.save_pretrained(tmp_path)
  args = normal(1, 1, 4, 2, 4, 4), np.array([500]), normal(2, 1, 3, 20)
  names = "hidden_states", "timestep", "encoder_hidden_states"
  np.savez(tmp_path / "inputs.npz", **dict(zip(names, args)))
  np.savez(tmp_path / "outputs.npz", sample=run(reference, *args))
  (result,) = parity.check_case(tmp_path)
  assert result.passed


@pytest.mark.parametrize("overrides", [{}, SMALL])
def test_video_size_never_holds_all_scores(overrides):
  family = models.find_family("WanTransformer3DModel")
  config = WanConfig(**overrides, remat="block", dtype="bfloat16")
  model = models.abstract_model(family, config)
  inputs = (
    jnp.zeros((1, 21, 60, 104, 16)),  # 81 frames of 480 x 832
    jnp.ones(1),
    Conditioning(text=jnp.zeros((1, 512, 4096))),
  )
  checks.check_video_size(model, inputs, 21 * 30 * 52)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="SD3Transformer2DModel"), "SD3Transformer2DModel"),
    (dict(added_kv_proj_dim=8), "added_kv_proj_dim=8"),
    (dict(image_dim=1280), "image_dim=1280"),
    (dict(cross_attn_norm=False), "cross_attn_norm=False"),
    (dict(qk_norm="rms_norm"), "'rms_norm_across_heads'"),
    (dict(patch_size=[2, 2]), "three numbers"),
    (dict(attention_head_dim=9), "must be even"),
    (dict(audio_dim=3), "audio_dim"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  family = models.find_family("WanTransformer3DModel")
  raw = dict(_class_name=family.class_name, image_dim=None) | TINY
  assert family.parse_config(raw | {"_diffusers_version": "1"}) == CONFIG
  with pytest.raises(UserError, match=message):
    family.parse_config(raw | change)


@pytest.mark.parametrize(
  "shape, message",
  [
    ((1, 2, 5, 4, 4), "2 x 5 x 4 .* filled by patches of 1 x 2 x 2"),
    ((1, 4, 4, 4), r"must be \[B, f, h, w, c\]"),
    ((1, 33, 4, 4, 4), "33 tokens .* knows 32 positions"),
  ],
)
def test_bad_inputs_are_named(shape, message):
  model = random_model(base=CONFIG)
  _, _, conditioning = arguments(batch=1)
  with pytest.raises(UserError, match=message):
    model.apply(model.params, jnp.zeros(shape), jnp.ones(1), conditioning)
