"""Autoencoding in tiles against diffusers', and the tiles themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from digen_jax.errors import UserError
from digen_jax.models import vae
from digen_jax.models.vae import tiling
from digen_jax.weights import load
from tests import references
from tests.autoencoders import (
  HUNYUAN,
  KL,
  QWEN,
  WAN,
  build,
  ours,
  pixels,
  theirs,
)
from tests.references import jit

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TILING = vae.Tiling(size=16, stride=12)


def tiled_reference(class_name):
  if class_name != KL:
    reference = build(class_name, 12)
    reference.enable_tiling(16, 16)
    reference.tile_sample_stride_height = 12
    reference.tile_sample_stride_width = 12
    return reference
  reference = references.autoencoder(
    12,
    block_out_channels=(4, 8, 8),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    sample_size=16,
    use_quant_conv=True,
    use_post_quant_conv=True,
  )
  reference.enable_tiling()
  return reference


@pytest.mark.parametrize(
  "class_name, shape",
  [
    (KL, (2, 28, 20)),
    pytest.param(WAN, (1, 5, 20, 16), marks=pytest.mark.slow),
    (QWEN, (2, 1, 8, 20)),
    (HUNYUAN, (1, 17, 20, 8)),
  ],
)
def test_tiles_match_diffusers(tmp_path, class_name, shape):
  reference = tiled_reference(class_name)
  reference.save_pretrained(tmp_path)
  model = load.load_autoencoder(tmp_path, tiling=TILING)
  images = pixels(0, *shape)
  posterior = reference.encode(theirs(images) * 2 - 1).latent_dist
  encoded = jit(model.encode)(model.params, images)
  encoded = vae.denormalise(encoded, model.config)
  np.testing.assert_allclose(encoded, ours(posterior.mean), atol=2e-5)

  z = references.normal(1, *encoded.shape)
  expected = ours(reference.decode(theirs(z)).sample)
  decode = jit(model.decode)
  decoded = decode(model.params, vae.normalise(jnp.asarray(z), model.config))
  np.testing.assert_allclose(
    decoded, (expected / 2 + 0.5).clip(0, 1), atol=2e-5
  )
  reference.disable_tiling()
  whole = ours(reference.decode(theirs(z)).sample)
  assert np.abs(whole - expected).max() > 1e-2


def test_small_pictures_are_not_cut(tmp_path):
  reference = tiled_reference(KL)
  reference.save_pretrained(tmp_path)
  plain = load.load_autoencoder(tmp_path)
  tiled = load.load_autoencoder(tmp_path, tiling=TILING)
  images = pixels(0, 1, 16, 12)
  np.testing.assert_array_equal(
    *(jit(model.encode)(model.params, images) for model in (plain, tiled))
  )


def test_blending_is_linear_and_of_what_was_blended():
  before = jnp.full((1, 6, 1), 2.0)
  after = jnp.full((1, 5, 1), 6.0)
  mixed = tiling.fade(before, after, 4, axis=1)
  np.testing.assert_allclose(mixed[0, :, 0], [2, 3, 4, 5, 6])
  mixed = tiling.fade(before, after[:, :2], 4, axis=1)
  np.testing.assert_allclose(mixed[0, :, 0], [2, 4])
  np.testing.assert_array_equal(tiling.fade(before, after, 0, axis=1), after)


@pytest.mark.parametrize("sequential", [False, True])
def test_tiles_of_the_identity_are_the_picture(sequential):
  x = references.normal(0, 2, 13, 9, 3)
  tiles = vae.Tiling(size=4, stride=3)
  y = tiling.in_space(lambda tile: tile, x, tiles, tiles, sequential)
  np.testing.assert_allclose(y, x, atol=1e-6)
  y = tiling.in_time(lambda tile: tile, x, tiles, tiles, sequential)
  np.testing.assert_allclose(y, x, atol=1e-6)


def test_sequential_loops_over_tiles_of_a_shape():
  calls = []

  def double(tile):
    calls.append(tile.shape)
    return 2 * tile

  parts = [jnp.full(n, float(n)) for n in (3, 2, 3, 3)]
  results = tiling.each(double, parts, True)
  assert sorted(calls) == [(2,), (3,)]
  for part, result in zip(parts, results):
    np.testing.assert_array_equal(result, 2 * part)


def test_tiles_that_do_not_fit():
  with pytest.raises(UserError, match="stride must be positive"):
    vae.Tiling(size=16, stride=17)
  with pytest.raises(UserError, match="multiples of 8"):
    vae.Tiling(size=16, stride=12).in_latents(8)
