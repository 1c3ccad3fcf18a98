"""The image autoencoder against diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from digen_jax.errors import UserError
from digen_jax.models import vae
from digen_jax.models.vae import autoencoder_kl
from digen_jax.weights import load
from tests import references


def nchw(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
  "overrides, batch, size",
  [
    ({}, 2, (16, 24)),
    (
      dict(
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=False,
        layers_per_block=2,
        norm_num_groups=2,
      ),
      1,
      (10, 6),
    ),
    (
      dict(
        block_out_channels=(4, 8, 12),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=6,
        shift_factor=None,
      ),
      3,
      (20, 12),
    ),
  ],
)
def test_matches_diffusers(tmp_path, overrides, batch, size):
  reference = references.autoencoder(seed=4, **overrides)
  reference.save_pretrained(tmp_path)
  model = load.load_autoencoder(tmp_path)
  config = reference.config
  images = np.random.default_rng(0).uniform(size=(batch, *size, 3))
  images = images.astype(np.float32)
  posterior = reference.encode(torch.from_numpy(nchw(images)) * 2 - 1)
  shift = config.shift_factor or 0.0
  mean = posterior.latent_dist.mean.numpy()
  latents = jax.jit(model.encode)(model.params, images)
  np.testing.assert_allclose(
    nchw(latents), (mean - shift) * config.scaling_factor, atol=2e-5
  )
  assert latents.shape[1] == size[0] // model.config.downscale

  latents = references.normal(1, batch, *latents.shape[1:])
  raw = torch.from_numpy(nchw(latents)) / config.scaling_factor + shift
  expected = (reference.decode(raw).sample / 2 + 0.5).clip(0, 1).numpy()
  decoded = jax.jit(model.decode)(model.params, latents)
  assert decoded.shape == images.shape
  np.testing.assert_allclose(nchw(decoded), expected, atol=4e-5)


def test_small_variance_keeps_group_norm_epsilon(tmp_path):
  """Constant images times tiny weights: the epsilon decides the output."""
  reference = references.autoencoder(seed=5)
  reference.encoder.conv_in.weight.data *= 1e-3
  reference.encoder.conv_in.bias.data *= 1e-3
  reference.save_pretrained(tmp_path)
  model = load.load_autoencoder(tmp_path)
  images = np.full((1, 8, 8, 3), 0.7, np.float32)
  mean = reference.encode(torch.from_numpy(nchw(images)) * 2 - 1)
  mean = mean.latent_dist.mean.numpy()
  expected = (mean - 0.12) * 0.36
  actual = jax.jit(model.encode)(model.params, images)
  np.testing.assert_allclose(nchw(actual), expected, atol=2e-5)


def test_normalise_is_the_published_formula():
  config = autoencoder_kl.AutoencoderKLConfig(
    scaling_factor=0.3611, shift_factor=0.1159
  )
  latents = vae.normalise(jnp.float32(2.1159), config)
  np.testing.assert_allclose(latents, 0.7222, rtol=1e-6)
  z = vae.denormalise(latents, config)
  np.testing.assert_allclose(z, 2.1159, rtol=1e-6)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(_class_name="AutoencoderKLWan"), "AutoencoderKLWan"),
    (dict(act_fn="gelu"), "act_fn"),
    (dict(down_block_types=["AttnDownBlock2D"] * 2), "down_block_types"),
    (dict(latents_mean=[0.0] * 4), "latents_mean"),
    (dict(norm_num_groups=5), "norm_num_groups 5"),
    (dict(temporal_compression=4), "temporal_compression"),
  ],
)
def test_config_rejects_what_it_cannot_do(change, message):
  raw = dict(_class_name="AutoencoderKL") | references.VAE
  assert autoencoder_kl.parse_config(raw).downscale == 2
  with pytest.raises(UserError, match=message):
    autoencoder_kl.parse_config(raw | change)
