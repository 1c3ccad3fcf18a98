"""The causal video autoencoder of HunyuanVideo.

AutoencoderKL with convolutions over time as well: every layer sees the
present and earlier frames only, and the first frame is encoded on its own.
Its group norms, however, average over all frames, so a video cannot be
processed frame by frame. Long videos are cut into stretches that overlap
instead (`TIME_TILING`); this is part of the model's definition, since a
stretch is normalised by itself.

Source: Kong et al. 2024 (HunyuanVideo: a systematic framework for large video
generative models), section 4.1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import config as config_lib
from digen_jax.models.attention import attention
from digen_jax.models.layers import Linear
from digen_jax.models.vae.common import (
  Conv,
  GroupNorm,
  as_video,
  convolve,
  posterior,
  repeat,
)
from digen_jax.models.vae.tiling import (
  Tiling,
  decode_tiled,
  encode_tiled,
  in_time,
)

# Frames; videos of more than `size` are cut.
TIME_TILING = Tiling(size=16, stride=12)

Factors = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class AutoencoderKLHunyuanVideoConfig:
  """Sizes of the autoencoder; names and defaults as in `config.json`.

  Attributes:
    latent_channels: c of the latents.
    block_out_channels: per level, from full resolution down.
    layers_per_block: residual blocks per encoder level (decoder: one more).
    norm_num_groups: of every GroupNorm.
    scaling_factor: latents are z * scaling_factor.
    spatial_compression_ratio: pixels per latent pixel, along each side.
    temporal_compression_ratio: frames per latent frame, after the first.
    dtype: compute dtype of convolutions.
    tiling: spatial tiles for large pictures; None takes them whole.
    sequential: one tile, in space and time, at a time: bounded memory.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 16
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 0.476986
  spatial_compression_ratio: int = 8
  temporal_compression_ratio: int = 4
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
    if self.temporal_compression_ratio != 4:
      raise UserError(
        "AutoencoderKLHunyuanVideo with temporal_compression_ratio="
        f"{self.temporal_compression_ratio} is not supported; only 4 is"
      )
    if self.spatial_compression_ratio not in (4, 8) or len(channels) < 3:
      raise UserError(
        f"block_out_channels {channels} with spatial_compression_ratio="
        f"{self.spatial_compression_ratio} is not supported; give 3 levels or "
        "more, and a ratio of 4 or 8"
      )

  @property
  def factors(self) -> tuple[Factors, ...]:
    """(time, height, width) factors per level, for encoder and decoder.

    Both count levels from their own input: the decoder is not the encoder
    reversed.
    """
    last = len(self.block_out_channels) - 1
    spatial = self.spatial_compression_ratio.bit_length() - 1
    return tuple(
      (
        2 if last - 2 <= level < last else 1,
        2 if level < spatial else 1,
        2 if level < spatial else 1,
      )
      for level in range(last + 1)
    )

  @property
  def downscale(self) -> int:
    """Pixels per latent pixel, along each side."""
    return self.spatial_compression_ratio

  @property
  def temporal_downscale(self) -> int:
    """Frames per latent frame, after the first."""
    return self.temporal_compression_ratio

  @property
  def latents_shift(self) -> float:
    """Latents are (z - shift) * scale."""
    return 0.0

  @property
  def latents_scale(self) -> float:
    """See `latents_shift`."""
    return self.scaling_factor


def parse_config(
  raw: Mapping[str, Any], **compute: Any
) -> AutoencoderKLHunyuanVideoConfig:
  """`config.json` content -> config record; raises UserError."""
  return config_lib.from_dict(
    AutoencoderKLHunyuanVideoConfig,
    raw,
    class_name="AutoencoderKLHunyuanVideo",
    fixed=dict(
      act_fn="silu",
      down_block_types="HunyuanVideoDownBlock3D",
      up_block_types="HunyuanVideoUpBlock3D",
    ),
    **compute,
  )


def config_dict(config: AutoencoderKLHunyuanVideoConfig) -> dict[str, Any]:
  """Config record -> `config.json` content; undoes `parse_config`."""
  levels = len(config.block_out_channels)
  return config_lib.to_dict(
    config, class_name="AutoencoderKLHunyuanVideo"
  ) | dict(
    down_block_types=["HunyuanVideoDownBlock3D"] * levels,
    up_block_types=["HunyuanVideoUpBlock3D"] * levels,
  )


class CausalConv(nnx.Module):
  """Convolution over time and space that sees no later frame.

  The border repeats: in space the outermost pixels, in time the first frame.

  Attributes:
    kernel: [size, size, size, in, out].
    bias: [out].
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    size: int = 3,
    *,
    stride: Factors = (1, 1, 1),
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.lecun_normal()
    shape = (size, size, size, in_channels, out_channels)
    self.kernel = nnx.Param(
      init(rngs.params(), shape, jnp.float32),
      logical_axes=("kernel", "kernel", "kernel", "conv_in", "conv_out"),
    )
    self.bias = nnx.Param(jnp.zeros(out_channels), logical_axes=("conv_out",))
    self.size = size
    self.stride = stride
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F', H', W', out] compute dtype."""
    side = (self.size // 2, self.size // 2)
    border = ((0, 0), (self.size - 1, 0), side, side, (0, 0))
    return convolve(
      jnp.pad(x, border, mode="edge"),
      self.kernel[...],
      self.bias[...],
      stride=self.stride,
      padding=((0, 0),) * 3,
      dtype=self.dtype,
    )


class ResnetBlock(nnx.Module):
  """Norm, SiLU, causal convolution, twice, with a residual."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    config: AutoencoderKLHunyuanVideoConfig,
    rngs: nnx.Rngs,
  ):
    conv = functools.partial(CausalConv, dtype=config.dtype, rngs=rngs)
    self.norm1 = GroupNorm(in_channels, config.norm_num_groups)
    self.conv1 = conv(in_channels, out_channels)
    self.norm2 = GroupNorm(out_channels, config.norm_num_groups)
    self.conv2 = conv(out_channels, out_channels)
    if in_channels != out_channels:
      self.conv_shortcut = conv(in_channels, out_channels, 1)
    self.has_shortcut = in_channels != out_channels

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F, H, W, out]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return (self.conv_shortcut(x) if self.has_shortcut else x) + y


class AttentionBlock(nnx.Module):
  """Single-head self-attention to this frame and earlier ones; residual."""

  def __init__(
    self,
    channels: int,
    config: AutoencoderKLHunyuanVideoConfig,
    rngs: nnx.Rngs,
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
    """x: [B, F, H, W, C] -> [B, F, H, W, C]."""
    batch, frames, height, width, channels = x.shape
    y = self.group_norm(x).reshape(batch, -1, 1, channels)
    query, key, value = self.to_q(y), self.to_k(y), self.to_v(y)
    # There are few frames, `TIME_TILING` at most. One at a time needs no mask,
    # and half the work and a fraction of the memory that one would.
    ends = [(t + 1) * height * width for t in range(frames)]
    y = [
      attention(query[:, start:end], key[:, :end], value[:, :end])
      for start, end in itertools.pairwise([0, *ends])
    ]
    return x + self.to_out(jnp.concatenate(y, axis=1)).reshape(x.shape)


class MidBlock(nnx.Module):
  """Residual block, attention (unless switched off), residual block."""

  def __init__(
    self,
    channels: int,
    config: AutoencoderKLHunyuanVideoConfig,
    rngs: nnx.Rngs,
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
    """x: [B, F, H, W, C] -> [B, F, H, W, C]."""
    x = self.resnets[0](x)
    if self.attention is not None:
      x = self.attention(x)
    return self.resnets[1](x)


class DownBlock(nnx.Module):
  """Residual blocks, then a strided convolution where a factor is not 1."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    factors: Factors,
    config: AutoencoderKLHunyuanVideoConfig,
    rngs: nnx.Rngs,
  ):
    widths = [in_channels] + [out_channels] * config.layers_per_block
    self.resnets = nnx.List(
      [ResnetBlock(*pair, config, rngs) for pair in itertools.pairwise(widths)]
    )
    self.scales = factors != (1, 1, 1)
    if self.scales:
      self.downsample = CausalConv(
        out_channels,
        out_channels,
        stride=factors,
        dtype=config.dtype,
        rngs=rngs,
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F', H', W', out]."""
    for resnet in self.resnets:
      x = resnet(x)
    return self.downsample(x) if self.scales else x


class UpBlock(nnx.Module):
  """Residual blocks, then a repetition and convolution to match."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    factors: Factors,
    config: AutoencoderKLHunyuanVideoConfig,
    rngs: nnx.Rngs,
  ):
    widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
    self.resnets = nnx.List(
      [ResnetBlock(*pair, config, rngs) for pair in itertools.pairwise(widths)]
    )
    self.factors = factors
    self.scales = factors != (1, 1, 1)
    if self.scales:
      self.upsample = CausalConv(
        out_channels, out_channels, dtype=config.dtype, rngs=rngs
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F', H', W', out]."""
    for resnet in self.resnets:
      x = resnet(x)
    if not self.scales:
      return x
    # In time the first frame stands for itself alone.
    first = repeat(x[:, :1], (1, *self.factors[1:]))
    later = repeat(x[:, 1:], self.factors)
    return self.upsample(jnp.concatenate([first, later], axis=1))


class Encoder(nnx.Module):
  """Videos to the Gaussian's parameters."""

  def __init__(self, config: AutoencoderKLHunyuanVideoConfig, rngs: nnx.Rngs):
    channels = config.block_out_channels
    conv = functools.partial(CausalConv, dtype=config.dtype, rngs=rngs)
    self.conv_in = conv(config.in_channels, channels[0])
    widths = itertools.pairwise((channels[0], *channels))
    self.down_blocks = nnx.List(
      [
        DownBlock(*pair, factors, config, rngs)
        for pair, factors in zip(widths, config.factors)
      ]
    )
    self.mid_block = MidBlock(channels[-1], config, rngs)
    self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups)
    self.conv_out = conv(channels[-1], 2 * config.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, 3] -> [B, f, h, w, 2c]."""
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """Latents to videos."""

  def __init__(self, config: AutoencoderKLHunyuanVideoConfig, rngs: nnx.Rngs):
    channels = config.block_out_channels[::-1]
    conv = functools.partial(CausalConv, dtype=config.dtype, rngs=rngs)
    self.conv_in = conv(config.latent_channels, channels[0])
    self.mid_block = MidBlock(channels[0], config, rngs)
    widths = itertools.pairwise((channels[0], *channels))
    self.up_blocks = nnx.List(
      [
        UpBlock(*pair, factors, config, rngs)
        for pair, factors in zip(widths, config.factors)
      ]
    )
    self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups)
    self.conv_out = conv(channels[-1], config.out_channels)

  def __call__(self, z: jax.Array) -> jax.Array:
    """z: [B, f, h, w, c] -> [B, F, H, W, 3]."""
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKLHunyuanVideo(nnx.Module):
  """Encoder and decoder; latents here are raw, not normalised."""

  def __init__(
    self, config: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs
  ):
    channels = config.latent_channels
    conv = functools.partial(
      Conv, window=(1, 1, 1), dtype=config.dtype, rngs=rngs
    )
    self.config = config
    self.encoder = Encoder(config, rngs)
    self.decoder = Decoder(config, rngs)
    self.quant_conv = conv(2 * channels, 2 * channels)
    self.post_quant_conv = conv(channels, channels)

  def moments(self, pixels: jax.Array) -> jax.Array:
    """Mean and unclipped log-variance: [B, f, h, w, 2c] float32."""
    config = self.config
    latents = TIME_TILING.in_latents(config.temporal_downscale)

    def run(tile: jax.Array) -> jax.Array:
      return self.quant_conv(self.encoder(tile)).astype(jnp.float32)

    def stretch(videos: jax.Array) -> jax.Array:
      return encode_tiled(run, videos, config)

    def whole(videos: jax.Array) -> jax.Array:
      if videos.shape[1] <= TIME_TILING.size:
        return stretch(videos)
      return in_time(stretch, videos, TIME_TILING, latents, config.sequential)

    return as_video(whole, pixels)

  def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The posterior of videos or images.

    Args:
      pixels: [B, F, H, W, 3] or [B, H, W, 3] in [-1, 1]; sizes as
        `vae.encode` wants them.

    Returns:
      mean, log-variance (clipped to [-30, 20]): [B, f, h, w, c] or
      [B, h, w, c] float32.
    """
    return posterior(self.moments(pixels))

  def decode(self, z: jax.Array) -> jax.Array:
    """Raw latents -> pixels.

    Args:
      z: [B, f, h, w, c] or [B, h, w, c].

    Returns:
      [B, F, H, W, 3] or [B, H, W, 3] float32 around [-1, 1].
    """
    config = self.config
    latents = TIME_TILING.in_latents(config.temporal_downscale)

    def run(tile: jax.Array) -> jax.Array:
      return self.decoder(self.post_quant_conv(tile)).astype(jnp.float32)

    def stretch(videos: jax.Array) -> jax.Array:
      return decode_tiled(run, videos, config)

    def whole(videos: jax.Array) -> jax.Array:
      if videos.shape[1] <= latents.size:
        return stretch(videos)
      return in_time(stretch, videos, latents, TIME_TILING, config.sequential)

    return as_video(whole, z)
