"""The causal video autoencoder of Wan 2.1, and of Qwen-Image.

Every layer sees the present and earlier frames only, and the first frame is
encoded on its own, so that an image is a video of one frame. Qwen-Image uses
the same network, with weights of its own, on images.

Videos are processed whole, or, with `config.sequential`, one latent frame at
a time: the few earlier frames that causal convolutions need are then carried
along. Both give the same result.

Source: Wan Team 2025 (Wan: open and advanced large-scale video generative
models), section 4.1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import config as config_lib
from digen_jax.models.attention import attention
from digen_jax.models.layers import round_to
from digen_jax.models.vae.common import (
  Conv,
  as_video,
  convolve,
  per_frame,
  posterior,
  repeat,
)
from digen_jax.models.vae.stream import Stream, in_chunks
from digen_jax.models.vae.tiling import Tiling, decode_tiled, encode_tiled

# fmt: off
LATENTS_MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENTS_STD = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class CausalConfig:
  """Sizes that both classes have; names and defaults as in `config.json`.

  Attributes:
    base_dim: channels at full resolution.
    z_dim: c of the latents.
    dim_mult: channels over `base_dim`, per level from full resolution down.
    num_res_blocks: residual blocks per encoder level (decoder: one more).
    temperal_downsample: which of the levels but the last also halve the frame
      rate.
    latents_mean: [c]; latents are (z - mean) / std.
    latents_std: [c], see above.
    dtype: compute dtype of convolutions.
    tiling: spatial tiles for large pictures; None takes them whole.
    sequential: one tile and one latent frame at a time, for bounded memory.
  """

  base_dim: int = 96
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temperal_downsample: tuple[bool, ...] = (False, True, True)
  latents_mean: tuple[float, ...] = LATENTS_MEAN
  latents_std: tuple[float, ...] = LATENTS_STD
  dtype: Any = jnp.float32
  tiling: Tiling | None = None
  sequential: bool = False

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    for name in (
      "dim_mult",
      "temperal_downsample",
      "latents_mean",
      "latents_std",
    ):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.temperal_downsample) != len(self.dim_mult) - 1:
      raise UserError(
        f"temperal_downsample {self.temperal_downsample} must have one entry "
        f"fewer than dim_mult {self.dim_mult}"
      )
    for name in ("latents_mean", "latents_std"):
      if len(getattr(self, name)) != self.z_dim:
        raise UserError(
          f"{name} has {len(getattr(self, name))} entries; it must have "
          f"z_dim = {self.z_dim}"
        )

  @property
  def downscale(self) -> int:
    """Pixels per latent pixel, along each side."""
    return 2 ** len(self.temperal_downsample)

  @property
  def temporal_downscale(self) -> int:
    """Frames per latent frame, after the first."""
    return 2 ** sum(self.temperal_downsample)

  @property
  def latent_channels(self) -> int:
    """c of the latents."""
    return self.z_dim

  @property
  def latents_shift(self) -> tuple[float, ...]:
    """[c]; latents are (z - shift) * scale."""
    return self.latents_mean

  @property
  def latents_scale(self) -> tuple[float, ...]:
    """[c], see `latents_shift`."""
    return tuple(1.0 / std for std in self.latents_std)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig(CausalConfig):
  """Sizes of an AutoencoderKLWan; see `CausalConfig`.

  Attributes:
    decoder_base_dim: `base_dim` of the decoder; None means the same.
    scale_factor_temporal: must be `temporal_downscale`.
    scale_factor_spatial: must be `downscale`.
  """

  decoder_base_dim: int | None = None
  in_channels: int = 3
  out_channels: int = 3
  scale_factor_temporal: int = 4
  scale_factor_spatial: int = 8

  def __post_init__(self):
    super().__post_init__()
    said = self.scale_factor_temporal, self.scale_factor_spatial
    if said != (self.temporal_downscale, self.downscale):
      raise UserError(
        f"scale_factor_temporal and scale_factor_spatial are {said}, but "
        f"dim_mult and temperal_downsample make "
        f"{self.temporal_downscale, self.downscale}"
      )


@dataclasses.dataclass(frozen=True)
class AutoencoderKLQwenImageConfig(CausalConfig):
  """Sizes of an AutoencoderKLQwenImage; see `CausalConfig`.

  Attributes:
    input_channels: of the pictures, on both ends.
  """

  input_channels: int = 3

  @property
  def in_channels(self) -> int:
    """Of the encoder."""
    return self.input_channels

  @property
  def out_channels(self) -> int:
    """Of the decoder."""
    return self.input_channels

  @property
  def decoder_base_dim(self) -> int:
    """The decoder is as wide as the encoder."""
    return self.base_dim


def parse_wan_config(
  raw: Mapping[str, Any], **compute: Any
) -> AutoencoderKLWanConfig:
  """`config.json` content -> config record; raises UserError."""
  return config_lib.from_dict(
    AutoencoderKLWanConfig,
    raw,
    class_name="AutoencoderKLWan",
    fixed=dict(attn_scales=(), is_residual=False, patch_size=None),
    ignored=("dropout",),
    **compute,
  )


def wan_config_dict(config: AutoencoderKLWanConfig) -> dict[str, Any]:
  """Config record -> `config.json` content; undoes `parse_wan_config`."""
  return config_lib.to_dict(config, class_name="AutoencoderKLWan")


def parse_qwen_image_config(
  raw: Mapping[str, Any], **compute: Any
) -> AutoencoderKLQwenImageConfig:
  """`config.json` content -> config record; raises UserError."""
  return config_lib.from_dict(
    AutoencoderKLQwenImageConfig,
    raw,
    class_name="AutoencoderKLQwenImage",
    fixed=dict(attn_scales=()),
    ignored=("dropout",),
    **compute,
  )


def qwen_image_config_dict(
  config: AutoencoderKLQwenImageConfig,
) -> dict[str, Any]:
  """The inverse of `parse_qwen_image_config`."""
  return config_lib.to_dict(config, class_name="AutoencoderKLQwenImage")


class CausalConv(nnx.Module):
  """Convolution over time and space; before the first frame are zeros.

  Attributes:
    kernel: [t, size, size, in, out]; the last entry of t is for the present.
    bias: [out].
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    window: tuple[int, int, int] = (3, 3, 3),
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.lecun_normal()
    shape = (*window, in_channels, out_channels)
    self.kernel = nnx.Param(
      init(rngs.params(), shape, jnp.float32),
      logical_axes=("kernel", "kernel", "kernel", "conv_in", "conv_out"),
    )
    self.bias = nnx.Param(jnp.zeros(out_channels), logical_axes=("conv_out",))
    self.window = window
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F, H, W, out] compute dtype."""
    kernel, frames = self.kernel[...], x.shape[1]
    x = round_to(x, self.dtype)
    if self.window[0] > 1:
      x = stream.extend(x, self.window[0] - 1)
    if stream.first and frames == 1:
      # A lone frame meets one slice of the kernel; the others meet zeros.
      x, kernel = x[:, -1:], kernel[-1:]
    height, width = (size // 2 for size in self.window[1:])
    apply = functools.partial(convolve, bias=self.bias[...], dtype=self.dtype)
    space = ((height, height), (width, width))
    if kernel.shape[0] == 1:
      return per_frame(
        lambda x: apply(x, kernel[0], stride=(1, 1), padding=space), x
      )
    return apply(x, kernel, stride=(1, 1, 1), padding=((0, 0), *space))


class ChannelNorm(nnx.Module):
  """Root-mean-square norm over the channels, in float32.

  Attributes:
    gamma: [channels, 1, ...], shaped as in checkpoints.
  """

  def __init__(self, channels: int, trailing: int = 3):
    self.gamma = nnx.Param(
      jnp.ones((channels,) + (1,) * trailing),
      logical_axes=("conv_out",) + (None,) * trailing,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., C] -> [..., C] float32."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The norm is at least 1e-12; its gradient at 0 stays finite.
    x = x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
    gamma = self.gamma[...].astype(jnp.float32)
    gamma = gamma.reshape((1,) * (x.ndim - 1) + (-1,))
    return x * (gamma.size**0.5) * gamma


class ResidualBlock(nnx.Module):
  """Norm, SiLU, causal convolution, twice, with a residual."""

  def __init__(
    self, in_channels: int, out_channels: int, dtype: Any, rngs: nnx.Rngs
  ):
    conv = functools.partial(CausalConv, dtype=dtype, rngs=rngs)
    self.norm1 = ChannelNorm(in_channels)
    self.conv1 = conv(in_channels, out_channels)
    self.norm2 = ChannelNorm(out_channels)
    self.conv2 = conv(out_channels, out_channels)
    if in_channels != out_channels:
      self.conv_shortcut = conv(in_channels, out_channels, (1, 1, 1))
    self.has_shortcut = in_channels != out_channels

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F, H, W, out]."""
    y = self.conv1(jax.nn.silu(self.norm1(x)), stream)
    y = self.conv2(jax.nn.silu(self.norm2(y)), stream)
    return (self.conv_shortcut(x, stream) if self.has_shortcut else x) + y


class AttentionBlock(nnx.Module):
  """Single-head self-attention within each frame, with a residual."""

  def __init__(self, channels: int, dtype: Any, rngs: nnx.Rngs):
    conv = functools.partial(Conv, window=(1, 1), dtype=dtype, rngs=rngs)
    self.norm = ChannelNorm(channels, trailing=2)
    self.to_qkv = conv(channels, 3 * channels)
    self.proj = conv(channels, channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, F, H, W, C] -> [B, F, H, W, C]."""

    def attend(frames: jax.Array) -> jax.Array:
      qkv = self.to_qkv(self.norm(frames))
      qkv = qkv.reshape(frames.shape[0], -1, 1, qkv.shape[-1])
      y = attention(*jnp.split(qkv, 3, axis=-1))
      return self.proj(y.reshape(frames.shape))

    return x + per_frame(attend, x)


class MidBlock(nnx.Module):
  """Residual block, attention, residual block."""

  def __init__(self, channels: int, dtype: Any, rngs: nnx.Rngs):
    self.resnets = nnx.List(
      [ResidualBlock(channels, channels, dtype, rngs) for _ in range(2)]
    )
    self.attention = AttentionBlock(channels, dtype, rngs)

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, C] -> [B, F, H, W, C]."""
    x = self.resnets[0](x, stream)
    return self.resnets[1](self.attention(x), stream)


def split_first(x: jax.Array, stream: Stream) -> tuple[jax.Array, jax.Array]:
  """[B, F, ...] -> the video's first frame, if it is here, and the others."""
  count = int(stream.first)
  return x[:, :count], x[:, count:]


class Downsample(nnx.Module):
  """Half the resolution and, if `temporal`, half the frame rate."""

  def __init__(self, channels: int, temporal: bool, dtype: Any, rngs: nnx.Rngs):
    conv = functools.partial(Conv, channels, channels, dtype=dtype, rngs=rngs)
    self.resample = conv(stride=(2, 2), padding=((0, 1), (0, 1)))
    if temporal:
      self.time_conv = conv((3, 1, 1), stride=(2, 1, 1), padding=((0, 0),) * 3)
    self.temporal = temporal

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, C] -> [B, F', H/2, W/2, C]; 1 + 2k frames -> 1 + k."""
    x = per_frame(self.resample, x)
    if not self.temporal:
      return x
    first, rest = split_first(x, stream)
    rest = self.time_conv(stream.extend(rest, 1, start=first))
    return jnp.concatenate([first, rest], axis=1)


class Upsample(nnx.Module):
  """Twice the resolution, half the channels; twice the frames if `temporal`."""

  def __init__(self, channels: int, temporal: bool, dtype: Any, rngs: nnx.Rngs):
    self.resample = Conv(channels, channels // 2, dtype=dtype, rngs=rngs)
    if temporal:
      self.time_conv = CausalConv(
        channels, 2 * channels, (3, 1, 1), dtype=dtype, rngs=rngs
      )
    self.temporal = temporal

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, C] -> [B, F', 2H, 2W, C/2]; 1 + k frames -> 1 + 2k."""
    if self.temporal:
      first, rest = split_first(x, stream)
      batch, frames, height, width, channels = rest.shape
      # To this convolution the first frame is like those before it: nothing.
      rest = self.time_conv(rest, stream)
      rest = rest.reshape(batch, frames, height, width, 2, channels)
      rest = jnp.moveaxis(rest, 4, 2)
      rest = rest.reshape(batch, 2 * frames, height, width, channels)
      x = jnp.concatenate([first, rest], axis=1)
    return per_frame(lambda x: self.resample(repeat(x, (2, 2))), x)


class UpBlock(nnx.Module):
  """Residual blocks, then (but on the last level) an upsampling."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    upsample: Callable[[int], Upsample] | None,
    config: CausalConfig,
    rngs: nnx.Rngs,
  ):
    widths = [in_channels] + [out_channels] * (config.num_res_blocks + 1)
    self.resnets = nnx.List(
      [
        ResidualBlock(*pair, config.dtype, rngs)
        for pair in itertools.pairwise(widths)
      ]
    )
    if upsample is not None:
      self.upsample = upsample(out_channels)
    self.last = upsample is None

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, in] -> [B, F', 2H, 2W, out/2], or as large if last."""
    for resnet in self.resnets:
      x = resnet(x, stream)
    return x if self.last else self.upsample(x, stream)


class Encoder(nnx.Module):
  """Videos to the Gaussian's parameters."""

  def __init__(self, config: CausalConfig, rngs: nnx.Rngs):
    dtype = config.dtype
    conv = functools.partial(CausalConv, dtype=dtype, rngs=rngs)
    dims = [config.base_dim * factor for factor in (1, *config.dim_mult)]
    self.conv_in = conv(config.in_channels, dims[0])
    blocks: list[ResidualBlock | Downsample] = []
    for level, (width, next_width) in enumerate(itertools.pairwise(dims)):
      for _ in range(config.num_res_blocks):
        blocks.append(ResidualBlock(width, next_width, dtype, rngs))
        width = next_width
      if level < len(config.temperal_downsample):
        temporal = config.temperal_downsample[level]
        blocks.append(Downsample(width, temporal, dtype, rngs))
    self.down_blocks = nnx.List(blocks)
    self.mid_block = MidBlock(dims[-1], dtype, rngs)
    self.norm_out = ChannelNorm(dims[-1])
    self.conv_out = conv(dims[-1], 2 * config.z_dim)

  def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
    """x: [B, F, H, W, 3] -> [B, f, h, w, 2c]."""
    x = self.conv_in(x, stream)
    for block in self.down_blocks:
      x = block(x, stream)
    x = self.mid_block(x, stream)
    return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


class Decoder(nnx.Module):
  """Latents to videos."""

  def __init__(self, config: CausalConfig, rngs: nnx.Rngs):
    dtype = config.dtype
    conv = functools.partial(CausalConv, dtype=dtype, rngs=rngs)
    base = config.decoder_base_dim or config.base_dim
    factors = config.dim_mult[::-1]
    dims = [base * factor for factor in (factors[0], *factors)]
    self.conv_in = conv(config.z_dim, dims[0])
    self.mid_block = MidBlock(dims[0], dtype, rngs)
    upsamples = [
      functools.partial(Upsample, temporal=temporal, dtype=dtype, rngs=rngs)
      for temporal in config.temperal_downsample[::-1]
    ]
    self.up_blocks = nnx.List(
      [
        # Each upsampling has halved the channels.
        UpBlock(width // 2 if level else width, out, upsample, config, rngs)
        for level, ((width, out), upsample) in enumerate(
          zip(itertools.pairwise(dims), [*upsamples, None])
        )
      ]
    )
    self.norm_out = ChannelNorm(dims[-1])
    self.conv_out = conv(dims[-1], config.out_channels)

  def __call__(self, z: jax.Array, stream: Stream) -> jax.Array:
    """z: [B, f, h, w, c] -> [B, F, H, W, 3]."""
    x = self.mid_block(self.conv_in(z, stream), stream)
    for block in self.up_blocks:
      x = block(x, stream)
    return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


class AutoencoderKLWan(nnx.Module):
  """Encoder and decoder; latents here are raw, not normalised."""

  def __init__(self, config: CausalConfig, *, rngs: nnx.Rngs):
    channels = config.z_dim
    conv = functools.partial(
      CausalConv, window=(1, 1, 1), dtype=config.dtype, rngs=rngs
    )
    self.config = config
    self.encoder = Encoder(config, rngs)
    self.decoder = Decoder(config, rngs)
    self.quant_conv = conv(2 * channels, 2 * channels)
    self.post_quant_conv = conv(channels, channels)

  def moments(self, pixels: jax.Array) -> jax.Array:
    """Mean and unclipped log-variance: [B, f, h, w, 2c] float32."""

    def run(chunk: jax.Array, stream: Stream) -> jax.Array:
      moments = self.quant_conv(self.encoder(chunk, stream), stream)
      return moments.astype(jnp.float32)

    encode = self._over_time(run, self.config.temporal_downscale)
    return as_video(
      lambda videos: encode_tiled(encode, videos, self.config), pixels
    )

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
      [B, F, H, W, 3] or [B, H, W, 3] float32, clipped to [-1, 1].
    """

    def run(chunk: jax.Array, stream: Stream) -> jax.Array:
      pixels = self.decoder(self.post_quant_conv(chunk, stream), stream)
      return pixels.astype(jnp.float32)

    decode = self._over_time(run, 1)
    pixels = as_video(
      lambda videos: decode_tiled(decode, videos, self.config), z
    )
    return jnp.clip(pixels, -1.0, 1.0)

  def _over_time(
    self, function: Callable[[jax.Array, Stream], jax.Array], size: int
  ) -> Callable[[jax.Array], jax.Array]:
    """A function of chunks as one of videos; `size` frames are a chunk."""
    if self.config.sequential:
      return functools.partial(in_chunks, function, size=size)
    return lambda videos: function(videos, Stream())
