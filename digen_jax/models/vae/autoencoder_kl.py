"""AutoencoderKL: the image autoencoder of FLUX and SD3, on NHWC arrays.

A convolutional encoder to a diagonal Gaussian at 1/8 of the resolution (for
four levels) and its mirrored decoder.

Source: Rombach et al. 2022 (latent diffusion), section 3.1 and appendix G.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import config as config_lib
from digen_jax.models.attention import attention
from digen_jax.models.layers import Linear
from digen_jax.models.vae.common import Conv, GroupNorm, posterior, repeat
from digen_jax.models.vae.tiling import Tiling, decode_tiled, encode_tiled


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """Sizes of an AutoencoderKL; names and defaults as in `config.json`.

  Attributes:
    block_out_channels: per level, from full resolution down.
    layers_per_block: residual blocks per encoder level (decoder: one more).
    latent_channels: c of the latents.
    norm_num_groups: of every GroupNorm.
    scaling_factor: latents are (z - shift_factor) * scaling_factor.
    shift_factor: see above; None means 0.
    dtype: compute dtype of convolutions.
    tiling: spatial tiles for large images; None takes images whole.
    sequential: one tile at a time, for bounded memory.
  """

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  dtype: Any = jnp.float32
  tiling: Tiling | None = None
  sequential: bool = False

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    channels = tuple(self.block_out_channels)
    object.__setattr__(self, "block_out_channels", channels)
    if any(c % self.norm_num_groups for c in channels):
      raise UserError(
        f"block_out_channels {channels} must be multiples of "
        f"norm_num_groups {self.norm_num_groups}"
      )

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def temporal_downscale(self) -> int:
    """Frames per latent frame: images are all there is."""
    return 1

  @property
  def latents_shift(self) -> float:
    """Latents are (z - shift) * scale."""
    return self.shift_factor or 0.0

  @property
  def latents_scale(self) -> float:
    """See `latents_shift`."""
    return self.scaling_factor


def parse_config(raw: Mapping[str, Any], **compute: Any) -> AutoencoderKLConfig:
  """`config.json` content -> config record; raises UserError."""
  return config_lib.from_dict(
    AutoencoderKLConfig,
    raw,
    class_name="AutoencoderKL",
    fixed=dict(
      act_fn="silu",
      down_block_types="DownEncoderBlock2D",
      up_block_types="UpDecoderBlock2D",
      latents_mean=None,
      latents_std=None,
    ),
    ignored=("sample_size", "force_upcast"),
    **compute,
  )


def config_dict(config: AutoencoderKLConfig) -> dict[str, Any]:
  """Config record -> `config.json` content; undoes `parse_config`."""
  levels = len(config.block_out_channels)
  return config_lib.to_dict(config, class_name="AutoencoderKL") | dict(
    down_block_types=["DownEncoderBlock2D"] * levels,
    up_block_types=["UpDecoderBlock2D"] * levels,
  )


class ResnetBlock(nnx.Module):
  """Norm, SiLU, convolution, twice, with a residual."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    config: AutoencoderKLConfig,
    rngs: nnx.Rngs,
  ):
    conv = functools.partial(Conv, dtype=config.dtype, rngs=rngs)
    self.norm1 = GroupNorm(in_channels, config.norm_num_groups)
    self.conv1 = conv(in_channels, out_channels)
    self.norm2 = GroupNorm(out_channels, config.norm_num_groups)
    self.conv2 = conv(out_channels, out_channels)
    if in_channels != out_channels:
      self.conv_shortcut = conv(in_channels, out_channels, (1, 1))
    self.has_shortcut = in_channels != out_channels

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, in] -> [B, H, W, out]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return (self.conv_shortcut(x) if self.has_shortcut else x) + y


class AttentionBlock(nnx.Module):
  """Single-head self-attention over all pixels, with a residual."""

  def __init__(
    self, channels: int, config: AutoencoderKLConfig, rngs: nnx.Rngs
  ):
    linear = functools.partial(
      Linear,
      channels,
      channels,
      axes=("conv_in", "conv_out"),
      dtype=config.dtype,
      rngs=rngs,
    )
    self.group_norm = GroupNorm(channels, config.norm_num_groups)
    self.to_q = linear()
    self.to_k = linear()
    self.to_v = linear()
    self.to_out = linear()

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, C] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    y = self.group_norm(x).reshape(batch, height * width, 1, channels)
    y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
    return x + self.to_out(y).reshape(x.shape)


class MidBlock(nnx.Module):
  """Residual block, attention (unless switched off), residual block."""

  def __init__(
    self, channels: int, config: AutoencoderKLConfig, rngs: nnx.Rngs
  ):
    self.resnets = nnx.List(
      [ResnetBlock(channels, channels, config, rngs) for _ in range(2)]
    )
    self.attention = (
      AttentionBlock(channels, config, rngs)
      if config.mid_block_add_attention
      else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, C] -> [B, H, W, C]."""
    x = self.resnets[0](x)
    if self.attention is not None:
      x = self.attention(x)
    return self.resnets[1](x)


class DownBlock(nnx.Module):
  """Residual blocks, then (but on the last level) half the resolution."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    last: bool,
    config: AutoencoderKLConfig,
    rngs: nnx.Rngs,
  ):
    widths = [in_channels] + [out_channels] * config.layers_per_block
    self.resnets = nnx.List(
      [ResnetBlock(*pair, config, rngs) for pair in itertools.pairwise(widths)]
    )
    if not last:
      self.downsample = Conv(
        out_channels,
        out_channels,
        stride=(2, 2),
        padding=((0, 1), (0, 1)),
        dtype=config.dtype,
        rngs=rngs,
      )
    self.last = last

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, in] -> [B, H/2, W/2, out], or [B, H, W, out] if last."""
    for resnet in self.resnets:
      x = resnet(x)
    return x if self.last else self.downsample(x)


class UpBlock(nnx.Module):
  """Residual blocks, then (but on the last level) twice the resolution."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    last: bool,
    config: AutoencoderKLConfig,
    rngs: nnx.Rngs,
  ):
    widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
    self.resnets = nnx.List(
      [ResnetBlock(*pair, config, rngs) for pair in itertools.pairwise(widths)]
    )
    if not last:
      self.upsample = Conv(
        out_channels, out_channels, dtype=config.dtype, rngs=rngs
      )
    self.last = last

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, in] -> [B, 2H, 2W, out], or [B, H, W, out] if last."""
    for resnet in self.resnets:
      x = resnet(x)
    if self.last:
      return x
    return self.upsample(repeat(x, (2, 2)))


class Encoder(nnx.Module):
  """Images to the Gaussian's parameters."""

  def __init__(self, config: AutoencoderKLConfig, rngs: nnx.Rngs):
    channels = config.block_out_channels
    conv = functools.partial(Conv, dtype=config.dtype, rngs=rngs)
    self.conv_in = conv(config.in_channels, channels[0])
    widths = (channels[0], *channels)
    self.down_blocks = nnx.List(
      [
        DownBlock(*pair, level == len(channels) - 1, config, rngs)
        for level, pair in enumerate(itertools.pairwise(widths))
      ]
    )
    self.mid_block = MidBlock(channels[-1], config, rngs)
    self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups)
    self.conv_out = conv(channels[-1], 2 * config.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, 3] -> [B, h, w, 2c]."""
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """Latents to images."""

  def __init__(self, config: AutoencoderKLConfig, rngs: nnx.Rngs):
    channels = config.block_out_channels[::-1]
    conv = functools.partial(Conv, dtype=config.dtype, rngs=rngs)
    self.conv_in = conv(config.latent_channels, channels[0])
    self.mid_block = MidBlock(channels[0], config, rngs)
    widths = (channels[0], *channels)
    self.up_blocks = nnx.List(
      [
        UpBlock(*pair, level == len(channels) - 1, config, rngs)
        for level, pair in enumerate(itertools.pairwise(widths))
      ]
    )
    self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups)
    self.conv_out = conv(channels[-1], config.out_channels)

  def __call__(self, z: jax.Array) -> jax.Array:
    """z: [B, h, w, c] -> [B, H, W, 3]."""
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Encoder and decoder; latents here are raw, not normalised."""

  def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
    channels = config.latent_channels
    conv = functools.partial(Conv, window=(1, 1), dtype=config.dtype, rngs=rngs)
    self.config = config
    self.encoder = Encoder(config, rngs)
    self.decoder = Decoder(config, rngs)
    if config.use_quant_conv:
      self.quant_conv = conv(2 * channels, 2 * channels)
    if config.use_post_quant_conv:
      self.post_quant_conv = conv(channels, channels)

  def moments(self, images: jax.Array) -> jax.Array:
    """Mean and unclipped log-variance side by side: [B, h, w, 2c] float32."""

    def run(images: jax.Array) -> jax.Array:
      moments = self.encoder(images)
      if self.config.use_quant_conv:
        moments = self.quant_conv(moments)
      return moments.astype(jnp.float32)

    return encode_tiled(run, images, self.config)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The posterior of images.

    Args:
      images: [B, H, W, 3] in [-1, 1]; H and W multiples of
        `config.downscale`.

    Returns:
      mean, log-variance (clipped to [-30, 20]): [B, h, w, c] float32.
    """
    return posterior(self.moments(images))

  def decode(self, z: jax.Array) -> jax.Array:
    """Raw latents [B, h, w, c] -> images [B, H, W, 3] float32 around [-1, 1]."""

    def run(z: jax.Array) -> jax.Array:
      if self.config.use_post_quant_conv:
        z = self.post_quant_conv(z)
      return self.decoder(z).astype(jnp.float32)

    return decode_tiled(run, z, self.config)
