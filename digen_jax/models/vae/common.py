"""Layers and conventions shared by the autoencoders.

Arrays are channels-last: images [B, H, W, C], videos [B, F, H, W, C]. Latents
are sized like the pictures they stand for, divided by `config.downscale` along
each side; a video of `F = config.temporal_downscale * k + 1` frames has k + 1
latent frames, the first of which stands for the first frame alone.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.models.layers import round_to

Padding = Sequence[tuple[int, int]]


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  *,
  stride: Sequence[int],
  padding: Padding,
  dtype: DTypeLike,
) -> jax.Array:
  """Convolution of channels-last arrays with a zero-padded border.

  Args:
    x: [B, *sizes, in], two sizes or three.
    kernel: [*window, in, out].
    bias: [out].
    stride: per size.
    padding: (before, after) per size.
    dtype: of the products' inputs and of the result.

  Returns:
    [B, *sizes', out].
  """
  sizes = "DHW"[-(x.ndim - 2) :]
  y = jax.lax.conv_general_dilated(
    round_to(x, dtype),
    round_to(kernel, dtype),
    window_strides=stride,
    padding=padding,
    dimension_numbers=(f"N{sizes}C", f"{sizes}IO", f"N{sizes}C"),
  )
  bias = bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + bias.shape)
  return round_to(y.astype(jnp.float32) + bias, dtype)


class Conv(nnx.Module):
  """Convolution with a zero-padded border.

  Attributes:
    kernel: [*window, in, out].
    bias: [out].
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    window: tuple[int, ...] = (3, 3),
    *,
    stride: tuple[int, ...] | None = None,
    padding: Padding | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.lecun_normal()
    shape = (*window, in_channels, out_channels)
    self.kernel = nnx.Param(
      init(rngs.params(), shape, jnp.float32),
      logical_axes=("kernel",) * len(window) + ("conv_in", "conv_out"),
    )
    self.bias = nnx.Param(jnp.zeros(out_channels), logical_axes=("conv_out",))
    self.stride = stride or (1,) * len(window)
    self.padding = (
      tuple((size // 2, size // 2) for size in window)
      if padding is None
      else tuple(padding)
    )
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, *sizes, in] -> [B, *sizes', out] compute dtype."""
    return convolve(
      x,
      self.kernel[...],
      self.bias[...],
      stride=self.stride,
      padding=self.padding,
      dtype=self.dtype,
    )


class GroupNorm(nnx.Module):
  """GroupNorm over all positions of [B, ..., C] in float32, eps 1e-6.

  Attributes:
    scale: [channels].
    bias: [channels].
  """

  def __init__(self, channels: int, groups: int):
    self.scale = nnx.Param(jnp.ones(channels), logical_axes=("conv_out",))
    self.bias = nnx.Param(jnp.zeros(channels), logical_axes=("conv_out",))
    self.groups = groups

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, ..., C] -> [B, ..., C] float32."""
    shape, channels = x.shape, x.shape[-1]
    x = x.astype(jnp.float32)
    x = x.reshape(shape[0], -1, self.groups, channels // self.groups)
    centred = x - jnp.mean(x, axis=(1, 3), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
    x = (centred * jax.lax.rsqrt(variance + 1e-6)).reshape(shape)
    per_channel = (1,) * (x.ndim - 1) + (channels,)
    scale = self.scale[...].astype(jnp.float32).reshape(per_channel)
    return x * scale + self.bias[...].astype(jnp.float32).reshape(per_channel)


def repeat(x: jax.Array, factors: Sequence[int]) -> jax.Array:
  """Nearest-neighbour upsampling: [B, *sizes, C], one factor per size."""
  for axis, factor in enumerate(factors, start=1):
    x = jnp.repeat(x, factor, axis=axis)
  return x


def per_frame(
  function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
  """A function of images on every frame: [B, F, ...] -> [B, F, ...]."""
  y = function(x.reshape(-1, *x.shape[2:]))
  return y.reshape(*x.shape[:2], *y.shape[1:])


def as_video(
  function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
  """A function of videos on [B, F, H, W, C], or on images as single frames."""
  return function(x) if x.ndim == 5 else function(x[:, None])[:, 0]


def posterior(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[..., 2c] -> mean and log-variance clipped to [-30, 20], [..., c] each."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)
