"""The HunyuanVideo transformer against diffusers', and its pure form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from digen_jax import models
from digen_jax.errors import UserError
from digen_jax.models.hunyuan_video import HunyuanVideoConfig
from digen_jax.types import Conditioning
from digen_jax.weights import load, parity
from tests import model_checks as checks
from tests.references import jit, normal, random_model, randomise

TINY = dict(
  in_channels=4,
  out_channels=4,
  num_attention_heads=2,
  attention_head_dim=24,
  num_layers=1,
  num_single_layers=2,
  num_refiner_layers=2,
  text_embed_dim=20,
  pooled_projection_dim=12,
  rope_axes_dim=(4, 10, 10),
)
CONFIG = HunyuanVideoConfig(**TINY)
NAMES = (
  "hidden_states",
  "timestep",
  "encoder_hidden_states",
  "encoder_attention_mask",
  "pooled_projections",
  "guidance",
)


def hunyuan_video(seed=0, **overrides):
  reference = HunyuanVideoTransformer3DModel(**TINY | overrides)
  return randomise(reference, seed)


def arrays(seed, batch, size, lengths, guidance=True):
  """Forward arguments, as numpy, in the order of `NAMES`."""
  rng = np.random.default_rng(seed)
  text_len = max(lengths) + 2
  mask = np.arange(text_len)[None] < np.array(lengths)[:, None]
  args = [
    normal(seed + 1, batch, 4, *size),
    rng.uniform(20, 980, batch).astype(np.float32),
    normal(seed + 2, batch, text_len, 20),
    mask.astype(np.int64),
    normal(seed + 3, batch, 12),
  ]
  if guidance:
    args.append(rng.uniform(1000, 7000, batch).astype(np.float32))
  return args


def run(module, *args):
  inputs = dict(zip(NAMES, map(torch.from_numpy, args)))
  return module(**inputs).sample.numpy()


def arguments(batch=3, text_len=5):
  lengths = jnp.array([5, 3, 1])[:batch, None]
  return (
    jnp.asarray(normal(0, batch, 2, 6, 4, 4)),
    jnp.linspace(0.13, 0.87, batch),
    Conditioning(
      text=jnp.asarray(normal(1, batch, text_len, 20)),
      pooled=jnp.asarray(normal(2, batch, 12)),
      mask=jnp.arange(text_len)[None] < lengths,
      guidance=jnp.linspace(1.3, 6.1, batch),
    ),
  )


@pytest.mark.parametrize(
  "overrides, batch, size, lengths",
  [
    ({}, 2, (3, 4, 6), (5, 2)),
    (
      dict(
        num_attention_heads=3,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=False,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        out_channels=6,
      ),
      3,
      (1, 10, 6),
      (1, 4, 3),
    ),
    (
      dict(num_attention_heads=1, patch_size=3, patch_size_t=2, rope_theta=9.0),
      1,
      (4, 9, 3),
      (7,),
    ),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, size, lengths):
  reference = hunyuan_video(3, **overrides)
  guidance = reference.config.guidance_embeds
  check_parity(tmp_path, reference, arrays(4, batch, size, lengths, guidance))


def test_small_variance_shows_every_epsilon(tmp_path):
  """Tokens, queries and keys so small that the norms' epsilons matter."""
  reference = hunyuan_video(5)
  small = r"x_embedder|proj_in|to_[qkv]\.|add_[qkv]_|to_out|to_add_out|net.2"
  for name, parameter in reference.named_parameters():
    if re.search(small, name):
      parameter.data *= 2e-3
  check_parity(tmp_path, reference, arrays(6, 2, (2, 4, 6), (4, 6)))


def test_masks_that_are_no_prefix(tmp_path):
  """The refiner reads the mask; the joint attention, its length."""
  args = arrays(7, 2, (2, 4, 6), (4, 6))
  args[3] = np.array([[0, 1, 1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 0, 1, 0]])
  check_parity(tmp_path, hunyuan_video(8), args)


def check_parity(directory, reference, args):
  expected = run(reference, *args)
  reference.save_pretrained(directory)
  model = load.load_model(directory)
  args = [checks.channels_last(args[0]), *args[1:]]
  args[3] = args[3].astype(bool)
  actual = checks.run_module(model, *args)
  np.testing.assert_allclose(
    # One unit in the last place of the table at guidance 7000 is 5e-4 rad.
    checks.channels_first(actual),
    expected,
    rtol=0,
    atol=1.2e-4,
  )


def test_apply_takes_sigma_and_raw_guidance(tmp_path):
  reference = hunyuan_video(12)
  reference.save_pretrained(tmp_path)
  model = load.load_model(tmp_path)
  latents, sigma, conditioning = arguments()
  expected = run(
    reference,
    checks.channels_first(latents),
    1000 * np.asarray(sigma),
    np.array(conditioning.text),
    np.array(conditioning.mask),
    np.array(conditioning.pooled),
    1000 * np.asarray(conditioning.guidance),
  )
  apply = jit(model.apply)
  actual = apply(model.params, latents, sigma, conditioning)
  np.testing.assert_allclose(
    checks.channels_first(actual), expected, rtol=0, atol=1.2e-4
  )
  one = apply(model.params, latents, sigma[0], conditioning)
  np.testing.assert_allclose(one[0], actual[0], atol=1e-5)


def test_padding_changes_nothing():
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments()
  apply = jit(model.apply)
  expected = apply(model.params, latents, sigma, conditioning)
  noise = jnp.where(conditioning.mask[:, :, None], conditioning.text, 9.0)
  other = dataclasses.replace(conditioning, text=noise)
  actual = apply(model.params, latents, sigma, other)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  every = jnp.ones_like(conditioning.mask)
  whole = dataclasses.replace(conditioning, mask=every)
  changed = jnp.abs(apply(model.params, latents, sigma, whole) - expected)
  assert float(changed[0].max()) < 1e-5  # whose prompt fills the rows
  assert float(changed[1].max()) > 1e-2
  empty = dataclasses.replace(conditioning, mask=~every)
  output = apply(model.params, latents, sigma, empty)
  assert bool(jnp.isfinite(output).all())
  unmasked = dataclasses.replace(conditioning, mask=None)
  shape = jax.eval_shape(model.apply, model.params, latents, sigma, unmasked)
  assert shape.shape == latents.shape


@pytest.mark.slow
def test_same_bits_in_rollout_and_training():
  checks.check_bfloat16(CONFIG, arguments())


def test_row_blocks(monkeypatch):
  checks.check_row_blocks(CONFIG, arguments(), monkeypatch)


def test_layouts_agree():
  checks.check_layouts(CONFIG, arguments(batch=2))


def test_fresh_model():
  checks.check_fresh(CONFIG, arguments())


def test_round_trip(tmp_path):
  reference = hunyuan_video(13)
  again = checks.check_round_trip(reference, tmp_path)
  args = arrays(1, 1, (1, 4, 4), (3,))
  # How PyTorch sums depends on where weights lie in memory.
  np.testing.assert_allclose(
    run(again, *args), run(reference, *args), atol=1e-5
  )


def test_parity_case(tmp_path):
  reference = hunyuan_video(14)
  reference.save_pretrained(tmp_path)
  args = arrays(1, 1, (2, 4, 4), (3,))
  np.savez(tmp_path / "inputs.npz", **dict(zip(NAMES, args)))
  np.savez(tmp_path / "outputs.npz", sample=run(reference, *args))
  meta = '{"time_table_ulp_sens": {"sample": 5e-5}}'
  (tmp_path / "meta.json").write_text(meta)
  (result,) = parity.check_case(tmp_path)
  assert result.passed


def test_video_size_never_holds_all_scores():
  family = models.find_family("HunyuanVideoTransformer3DModel")
  config = HunyuanVideoConfig(remat="block", dtype="bfloat16")
  inputs = (
    jnp.zeros((1, 33, 90, 160, 16)),  # 129 frames of 720 x 1280
    jnp.ones(1),
    Conditioning(
      text=jnp.zeros((1, 256, 4096)),
      pooled=jnp.zeros((1, 768)),
      mask=jnp.ones((1, 256), bool),
      guidance=jnp.ones(1),
    ),
  )
  model = models.abstract_model(family, config)
  checks.check_video_size(model, inputs, 33 * 45 * 80)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel"),
    (dict(image_condition_type="token_replace"), "token_replace"),
    (dict(qk_norm="layer_norm"), "'rms_norm'"),
    (dict(mlp_ratio=3.0), "mlp_ratio=3.0"),
    (dict(rope_axes_dim=[4, 10]), "attention_head_dim 24"),
    (dict(audio_dim=3), "audio_dim"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  family = models.find_family("HunyuanVideoTransformer3DModel")
  raw = dict(_class_name=family.class_name, mlp_ratio=4.0) | TINY
  assert family.parse_config(raw | {"_diffusers_version": "1"}) == CONFIG
  with pytest.raises(UserError, match=message):
    family.parse_config(raw | change)


def test_bad_inputs_are_named():
  model = random_model(base=CONFIG)
  latents, sigma, conditioning = arguments()
  with pytest.raises(UserError, match=r"2 x 5 x 4 .* patches of 1 x 2 x 2"):
    model.apply(model.params, latents[:, :, :5], sigma, conditioning)
  for field in ("pooled", "guidance"):
    lacking = dataclasses.replace(conditioning, **{field: None})
    with pytest.raises(UserError, match=f"Conditioning.{field}"):
      model.apply(model.params, latents, sigma, lacking)
