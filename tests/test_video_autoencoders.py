"""The causal video autoencoders against diffusers'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import vae
from digen_jax.weights import export, load
from tests import references
from tests.autoencoders import (
  CONFIGS,
  HUNYUAN,
  QWEN,
  WAN,
  build,
  ours,
  pixels,
  save,
  theirs,
)
from tests.references import jit

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def statistics(config):
  """(shift, scale) of the latents, from diffusers' own config."""
  if hasattr(config, "latents_mean"):
    std = np.array(config.latents_std, np.float32)
    return np.array(config.latents_mean, np.float32), 1 / std
  return np.float32(0), np.float32(config.scaling_factor)


def assert_matches(reference, model, videos, latents):
  """Encoding and decoding, normalised latents and pixels in [0, 1].

  Returns:
    The decoded pixels.
  """
  shift, scale = statistics(reference.config)
  mean = reference.encode(theirs(videos) * 2 - 1).latent_dist.mean
  encoded = jit(model.encode)(model.params, videos)
  np.testing.assert_allclose(encoded, (ours(mean) - shift) * scale, atol=2e-5)

  decoded = jit(model.decode)(model.params, latents)
  expected = reference.decode(theirs(latents / scale + shift)).sample
  expected = (ours(expected) / 2 + 0.5).clip(0, 1)
  assert expected.std() > 0.01
  np.testing.assert_allclose(decoded, expected, atol=2e-5)
  return decoded


CASES = [
  (WAN, {}, (1, 9, 12, 20)),
  (
    WAN,
    dict(
      dim_mult=[1, 2, 3, 3],
      temperal_downsample=[False, True, False],
      num_res_blocks=2,
      decoder_base_dim=8,
      scale_factor_spatial=8,
      scale_factor_temporal=2,
    ),
    (2, 5, 24, 8),
  ),
  (QWEN, dict(z_dim=3, latents_mean=[0.1, 1.0, -2.0], latents_std=[1, 2, 3]),
   (3, 1, 12, 8)),
  (QWEN, {}, (1, 5, 8, 12)),
  (HUNYUAN, {}, (2, 9, 12, 8)),
  (HUNYUAN, {}, (3, 1, 8, 20)),
  (
    HUNYUAN,
    dict(
      block_out_channels=(4, 4, 8, 8),
      down_block_types=("HunyuanVideoDownBlock3D",) * 4,
      up_block_types=("HunyuanVideoUpBlock3D",) * 4,
      layers_per_block=2,
      norm_num_groups=4,
      mid_block_add_attention=False,
    ),
    (1, 5, 8, 12),
  ),
]  # fmt: skip


@pytest.mark.parametrize("class_name, overrides, shape", CASES)
def test_matches_diffusers(tmp_path, class_name, overrides, shape):
  reference = build(class_name, 4, **overrides)
  model = load.load_autoencoder(save(reference, tmp_path))
  config = model.config
  batch, frames, height, width = shape
  shape = (
    batch,
    (frames - 1) // config.temporal_downscale + 1,
    height // config.downscale,
    width // config.downscale,
    config.latent_channels,
  )
  videos = pixels(0, batch, frames, height, width)
  assert_matches(reference, model, videos, references.normal(1, *shape))


@pytest.mark.parametrize("frames", [17, 21])
def test_long_videos_are_cut_in_time(tmp_path, frames):
  """Beyond 16 frames the stretches' own norms show."""
  reference = build(HUNYUAN, 5)
  model = load.load_autoencoder(save(reference, tmp_path))
  videos = pixels(2, 1, frames, 8, 12)
  latents = references.normal(3, 1, (frames - 1) // 4 + 1, 2, 3, 4)
  cut = assert_matches(reference, model, videos, latents) * 2 - 1
  reference.use_framewise_decoding = False
  _, scale = statistics(reference.config)
  whole = ours(reference.decode(theirs(latents / scale)).sample).clip(-1, 1)
  assert np.abs(whole - cut).max() > 1e-3


def test_small_variance_keeps_group_norm_epsilon(tmp_path):
  reference = build(HUNYUAN, 6)
  for conv in (reference.encoder.conv_in, reference.decoder.conv_in):
    conv.conv.weight.data *= 1e-3
    conv.conv.bias.data *= 1e-3
  model = load.load_autoencoder(save(reference, tmp_path))
  videos = np.full((1, 5, 8, 8, 3), 0.7, np.float32)
  latents = references.normal(1, 1, 2, 2, 2, 4)
  assert_matches(reference, model, videos, latents)


@pytest.mark.parametrize("class_name", [QWEN, HUNYUAN])
def test_images_are_videos_of_one_frame(tmp_path, class_name):
  model = load.load_autoencoder(save(build(class_name, 7), tmp_path))
  images = pixels(0, 2, 8, 12)
  latents = jit(model.encode)(model.params, images)
  assert latents.shape == (2, 2, 3, 4)
  video = jit(model.encode)(model.params, images[:, None])
  np.testing.assert_array_equal(latents, video[:, 0])
  images = jit(model.decode)(model.params, latents)
  assert images.shape == (2, 8, 12, 3)
  video = jit(model.decode)(model.params, latents[:, None])
  np.testing.assert_array_equal(images, video[:, 0])


def test_images_use_flat_kernels(tmp_path):
  """A third of the work of a video's frame."""
  model = load.load_autoencoder(save(build(QWEN, 7), tmp_path))

  def ranks(latents):
    jaxpr = jax.make_jaxpr(model.decode)(model.params, latents)
    return {
      equation.outvars[0].aval.ndim
      for equation in jaxpr.jaxpr.eqns
      if "conv_general" in str(equation.primitive)
      and equation.outvars[0].aval.size
    }

  assert ranks(jnp.zeros((2, 3, 2, 4))) == {4}
  assert ranks(jnp.zeros((2, 2, 3, 2, 4))) == {4, 5}


def test_pixels_are_clipped_inside(tmp_path):
  reference = build(WAN, 8)
  reference.decoder.conv_out.weight.data *= 20
  model = load.load_autoencoder(save(reference, tmp_path))
  z = references.normal(0, 1, 2, 2, 3, 4)

  def decode(params, z):
    return nnx.merge(model.graphdef, params).decode(z)

  decoded = jit(decode)(model.params, z)
  expected = ours(reference.decode(theirs(z)).sample)
  assert np.mean(np.abs(expected) == 1) > 0.1
  # Rounding is as many times larger as the last layer's weights.
  np.testing.assert_allclose(decoded, expected, atol=5e-4)


@pytest.mark.parametrize(
  "class_name, frames, height",
  [(WAN, 9, 20), pytest.param(HUNYUAN, 21, 8, marks=pytest.mark.slow)],
)
def test_sequential_gives_the_same(tmp_path, class_name, frames, height):
  path = save(build(class_name, 9), tmp_path)
  tiling = vae.Tiling(size=16, stride=12)
  videos = pixels(0, 1, frames, height, 8)
  latents = references.normal(1, 1, (frames - 1) // 4 + 1, height // 4, 2, 4)

  def run(sequential):
    model = load.load_autoencoder(path, tiling=tiling, sequential=sequential)
    return (
      jit(model.encode)(model.params, videos),
      jit(model.decode)(model.params, latents),
    )

  for whole, parts in zip(run(False), run(True)):
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_sequential_memory_does_not_grow_with_the_video(tmp_path):
  path = save(build(WAN, 9), tmp_path)

  def working_memory(frames, sequential):
    """Bytes beyond a few copies of the video."""
    model = load.load_autoencoder(path, sequential=sequential)
    latents = jax.ShapeDtypeStruct((1, frames, 8, 8, 4), jnp.float32)
    compiled = jax.jit(model.decode).lower(model.params, latents).compile()
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes - 3 * analysis.output_size_in_bytes

  long = working_memory(17, True)
  assert long < 1.5 * working_memory(5, True)
  assert working_memory(17, False) > 2 * long


@pytest.mark.parametrize("class_name", CONFIGS)
def test_diffusers_loads_what_we_save(tmp_path, class_name):
  reference = build(class_name, 10)
  model = load.load_autoencoder(save(reference, tmp_path / "in"))
  family = vae.find_family(class_name)
  raw = family.config_dict(model.config)
  assert family.parse_config(raw) == model.config
  export.save_module(tmp_path / "out", model.params, raw)
  again, problems = type(reference).from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(problems.values())
  z = torch.from_numpy(references.normal(0, 1, 4, 2, 2, 2))
  torch.testing.assert_close(
    again.eval().decode(z).sample, reference.decode(z).sample, rtol=0, atol=0
  )


def test_bfloat16_is_close(tmp_path):
  path = save(build(WAN, 11), tmp_path)
  latents = references.normal(0, 1, 2, 2, 3, 4)

  def decode(dtype):
    model = load.load_autoencoder(path, dtype=dtype)
    return jit(model.decode)(model.params, latents)

  narrow, full = decode("bfloat16"), decode("float32")
  assert narrow.dtype == jnp.float32
  error = np.linalg.norm(narrow - full) / np.linalg.norm(full - full.mean())
  assert 1e-4 < error < 0.1


def test_gradients_of_nothing_are_finite():
  """With all parameters 0, norms are of 0."""
  config = vae.FAMILIES[WAN].parse_config(CONFIGS[WAN])
  model = vae.abstract_autoencoder(config)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), model.params)
  latents = jnp.ones((1, 1, 1, 4))
  gradient = jax.grad(lambda p: jnp.sum(model.decode(p, latents)))
  grads = jax.tree.leaves(jit(gradient)(params))
  assert all(np.isfinite(g).all() for g in grads)
  assert any(np.any(g != 0) for g in grads)


def test_sizes_that_do_not_fit():
  config = vae.FAMILIES[WAN].parse_config(CONFIGS[WAN])
  model = vae.abstract_autoencoder(config)
  for shape, message in (
    ((1, 6, 8, 8, 3), "videos of 6 frames: .* multiple of 4"),
    ((1, 10, 8, 3), "pictures of 10 x 8: .* multiples of 4"),
  ):
    with pytest.raises(UserError, match=message):
      jax.eval_shape(
        model.encode, model.params, jax.ShapeDtypeStruct(shape, jnp.float32)
      )


@pytest.mark.parametrize(
  "class_name, change, message",
  [
    (WAN, dict(is_residual=True), "is_residual=True"),
    (WAN, dict(patch_size=2), "patch_size=2"),
    (WAN, dict(attn_scales=[0.5]), "attn_scales"),
    (WAN, dict(scale_factor_spatial=8), r"\(4, 8\), but .* \(4, 4\)"),
    (WAN, dict(temperal_downsample=[True]), "temperal_downsample"),
    (WAN, dict(latents_std=[1.0]), "latents_std has 1 entries"),
    (QWEN, dict(in_channels=3), "in_channels"),
    (HUNYUAN, dict(act_fn="gelu"), "act_fn"),
    (HUNYUAN, dict(temporal_compression_ratio=8), "only 4 is"),
    (HUNYUAN, dict(spatial_compression_ratio=2), "ratio of 4 or 8"),
    (HUNYUAN, dict(norm_num_groups=3), "norm_num_groups 3"),
    (HUNYUAN, dict(up_block_types=["UpDecoderBlock2D"] * 3), "up_block_types"),
  ],
)
def test_config_rejects_what_it_cannot_do(class_name, change, message):
  family = vae.find_family(class_name)
  assert family.parse_config(CONFIGS[class_name]).downscale == 4
  with pytest.raises(UserError, match=message):
    family.parse_config(CONFIGS[class_name] | change)


def test_unknown_records_are_refused():
  config = dataclasses.make_dataclass("OtherConfig", [])()
  with pytest.raises(UserError, match="OtherConfig is no config"):
    vae.create_autoencoder(config, jax.random.key(0))
