"""Tiny random models of ours and diffusers', shared by the model tests."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
  AutoencoderKL,
  FluxTransformer2DModel,
  QwenImageTransformer2DModel,
  SD3Transformer2DModel,
)

from digen_jax import models
from digen_jax.models import flux as flux_lib
from digen_jax.models import qwen_image as qwen_image_lib
from digen_jax.models import sd3 as sd3_lib
from digen_jax.types import Conditioning

FLUX = dict(
  in_channels=16,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=24,
  num_attention_heads=2,
  joint_attention_dim=20,
  pooled_projection_dim=12,
  guidance_embeds=True,
  axes_dims_rope=(4, 10, 10),
)
QWEN_IMAGE = dict(
  in_channels=16,
  out_channels=4,
  num_layers=2,
  attention_head_dim=24,
  num_attention_heads=2,
  joint_attention_dim=20,
  axes_dims_rope=(4, 10, 10),
)
SD3 = dict(
  sample_size=16,
  in_channels=4,
  out_channels=4,
  num_layers=3,
  attention_head_dim=24,
  num_attention_heads=2,
  joint_attention_dim=20,
  caption_projection_dim=48,
  pooled_projection_dim=12,
  pos_embed_max_size=9,
  dual_attention_layers=(0,),
  qk_norm="rms_norm",
)
VAE = dict(
  block_out_channels=(8, 16),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=1,
  latent_channels=4,
  norm_num_groups=4,
  sample_size=16,
  scaling_factor=0.36,
  shift_factor=0.12,
  use_quant_conv=False,
  use_post_quant_conv=False,
)

CONFIG = flux_lib.FluxConfig(**FLUX)
QWEN_IMAGE_CONFIG = qwen_image_lib.QwenImageConfig(**QWEN_IMAGE)
SD3_CONFIG = sd3_lib.SD3Config(**SD3)


def randomise(module, seed):
  """Random values for every parameter and table: no scale stays 1, no bias 0."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in module.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("scale_shift_table"):
      value = 0.4 * noise
    elif parameter.ndim > 1:
      value = noise / parameter[0].numel() ** 0.5
    elif name.endswith("weight"):
      value = 1 + 0.25 * noise
    else:
      value = 0.15 * noise
    parameter.data = value
  saved = module.state_dict()  # rotary frequencies, say, are not among them
  for name, buffer in module.named_buffers():
    if name in saved:
      buffer.copy_(0.4 * torch.randn(buffer.shape, generator=generator))
  return module.eval().requires_grad_(False)


def flux(seed=0, **overrides):
  return randomise(FluxTransformer2DModel(**FLUX | overrides), seed)


def qwen_image(seed=0, **overrides):
  return randomise(QwenImageTransformer2DModel(**QWEN_IMAGE | overrides), seed)


def sd3(seed=0, **overrides):
  return randomise(SD3Transformer2DModel(**SD3 | overrides), seed)


def autoencoder(seed=0, **overrides):
  return randomise(AutoencoderKL(**VAE | overrides), seed)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flux_inputs(seed, batch, grid, text_len, guidance):
  """Forward arguments, as numpy, named as diffusers names them."""
  rng = np.random.default_rng(seed)
  rows, columns = grid
  ids = np.stack(
    np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"), -1
  )
  inputs = dict(
    hidden_states=normal(seed + 1, batch, rows * columns, FLUX["in_channels"]),
    encoder_hidden_states=normal(
      seed + 2, batch, text_len, FLUX["joint_attention_dim"]
    ),
    pooled_projections=normal(seed + 3, batch, FLUX["pooled_projection_dim"]),
    timestep=rng.uniform(0.05, 0.95, batch),
    img_ids=ids.reshape(-1, 3),
    txt_ids=np.zeros((text_len, 3)),
  )
  if guidance:
    inputs["guidance"] = rng.uniform(1, 5, batch)
  return {name: x.astype(np.float32) for name, x in inputs.items()}


def run_flux(module, inputs):
  inputs = {name: torch.from_numpy(x) for name, x in inputs.items()}
  return module(**inputs).sample.numpy()


def jit(function, **settings):
  """`jax.jit` for programs that run once: little time spent on optimising."""
  options = dict(
    xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True
  )
  return jax.jit(function, compiler_options=options, **settings)


def random_model(seed=0, base=CONFIG, **overrides):
  """A model with every parameter random; a fresh one outputs zero."""
  config = dataclasses.replace(base, **overrides)
  family = next(
    f for f in models.FAMILIES.values() if isinstance(config, f.config)
  )
  model = models.abstract_model(family, config)
  rng = np.random.default_rng(seed)

  def draw(path, leaf, axes):
    kind = path[-1].key
    inputs = leaf.shape[axes[0] == "layers" : -1]
    fan_in = math.prod(inputs) if kind == "kernel" else 16
    noise = rng.normal(size=leaf.shape) / fan_in**0.5
    return jnp.asarray(noise + (kind == "scale"), jnp.float32)

  params = jax.tree.map_with_path(draw, model.params, model.logical_axes)
  return dataclasses.replace(model, params=params)


def arguments(seed=0, batch=3, height=6, width=4, text_len=5):
  latents = jnp.asarray(normal(seed, batch, height, width, 4))
  conditioning = Conditioning(
    text=jnp.asarray(normal(seed + 1, batch, text_len, 20)),
    pooled=jnp.asarray(normal(seed + 2, batch, 12)),
    guidance=jnp.linspace(1.3, 4.1, batch),
  )
  return latents, jnp.linspace(0.13, 0.87, batch), conditioning
