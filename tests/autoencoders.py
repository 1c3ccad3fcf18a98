"""Tiny random autoencoders of diffusers', and arrays for them."""

import diffusers
import numpy as np
import torch
from diffusers.utils import logging

from tests import references

logging.set_verbosity_error()

CAUSAL = dict(
  base_dim=4,
  z_dim=4,
  dim_mult=[1, 2, 2],
  num_res_blocks=1,
  temperal_downsample=[True, True],
  latents_mean=[-0.8, 0.3, 0.1, -0.2],
  latents_std=[2.8, 1.5, 0.7, 1.2],
)
CONFIGS = {
  "AutoencoderKLWan": CAUSAL
  | dict(scale_factor_spatial=4, scale_factor_temporal=4),
  "AutoencoderKLQwenImage": CAUSAL,
  "AutoencoderKLHunyuanVideo": dict(
    latent_channels=4,
    block_out_channels=(4, 8, 8),
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    layers_per_block=1,
    norm_num_groups=2,
    scaling_factor=0.7,
    spatial_compression_ratio=4,
  ),
}
WAN, QWEN, HUNYUAN = CONFIGS
KL = "AutoencoderKL"


def build(class_name, seed=0, **overrides):
  module = getattr(diffusers, class_name)(**CONFIGS[class_name] | overrides)
  references.randomise(module, seed)
  generator = torch.Generator().manual_seed(seed + 1)
  for name, parameter in module.named_parameters():
    if name.endswith("gamma"):
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.data = 1 + 0.25 * noise
  return module


def save(reference, path):
  reference.save_pretrained(path)
  return path


def theirs(x):
  """Channels-last -> torch, channels first."""
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def ours(x):
  return np.moveaxis(x.numpy(), 1, -1)


def pixels(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.uniform(size=(*shape, 3)).astype(np.float32)
