"""The autoencoders at their published sizes, without allocating any."""

import math

import diffusers
import jax
import numpy as np
import pytest
import torch

from digen_jax.models import vae
from digen_jax.parallel import mesh as mesh_lib
from digen_jax.parallel import rules
from digen_jax.weights import names
from tests.autoencoders import HUNYUAN, KL, QWEN, WAN

# FLUX and SD3; the others' published sizes are diffusers' defaults.
IMAGES = dict(
  block_out_channels=(128, 256, 512, 512),
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  layers_per_block=2,
  latent_channels=16,
  use_quant_conv=False,
  use_post_quant_conv=False,
)


@pytest.mark.parametrize(
  "class_name, overrides, count, downscale",
  [
    (KL, IMAGES, 83_819_683, (8, 1)),
    (QWEN, {}, 126_892_531, (8, 4)),
    (WAN, {}, 126_892_531, (8, 4)),
    (HUNYUAN, {}, 246_478_803, (8, 4)),
  ],
)
def test_tensors_are_those_of_diffusers(
  class_name, overrides, count, downscale
):
  with torch.device("meta"):
    reference = getattr(diffusers, class_name)(**overrides)
  expected = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
  config = vae.find_family(class_name).parse_config(dict(reference.config))
  model = vae.abstract_autoencoder(config)
  entries = names.entries(model.params, names.NAME_MAPS[class_name])
  actual = {
    name: entry.tensor_shape for entry in entries for name in entry.names
  }
  assert actual == expected
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params)]
  assert sum(sizes) == count
  assert (config.downscale, config.temporal_downscale) == downscale
  assert config.latent_channels == 16
  # Every parameter names its dimensions.
  mesh = mesh_lib.make_mesh(dict(fsdp=2), jax.devices()[:2])
  rules.param_shardings(mesh, model.logical_axes, model.params, rules.TRAINER)


@pytest.mark.parametrize("class_name", [QWEN, WAN])
def test_published_statistics_of_the_latents(class_name):
  config = vae.find_family(class_name).config()
  z = np.zeros((1, 1, 1, 16), np.float32)
  latents = vae.normalise(z, config)
  assert latents.shape == z.shape
  np.testing.assert_allclose(latents[..., 0], 0.7571 / 2.8184, rtol=1e-6)
  np.testing.assert_allclose(latents[..., 15], 0.2921 / 1.9160, rtol=1e-6)
  np.testing.assert_allclose(vae.denormalise(latents, config), z, atol=1e-6)
