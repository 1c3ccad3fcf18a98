"""What the video transformers share: patches and positions in space and time.

A video is [B, f, h, w, c]; a patch of (frames, rows, columns) latent pixels is
one token, and tokens are ordered by frame, then row, then column.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import round_to

Triple = tuple[int, int, int]


def token_grid(latents: jax.Array, patch: Triple, name: str) -> Triple:
  """How many tokens a video has along frames, rows and columns.

  Args:
    latents: [B, f, h, w, c].
    patch: size of a token in latent pixels.
    name: of the model, for the error.

  Raises:
    UserError: the latents are no video, or patches do not fill them.
  """
  if latents.ndim != 5:
    raise UserError(
      f"{name} latents have shape {latents.shape}; they must be "
      "[B, f, h, w, c]: frames, rows, columns, channels"
    )
  sizes = latents.shape[1:4]
  if any(size % part for size, part in zip(sizes, patch)):
    raise UserError(
      f"{name} latents of {_times(sizes)} (frames x rows x columns) are not "
      f"filled by patches of {_times(patch)}: choose a video size that is"
    )
  return tuple(size // part for size, part in zip(sizes, patch))


def patchify(latents: jax.Array, patch: Triple) -> jax.Array:
  """[B, f, h, w, c] -> [B, S, patch c] tokens, order (frame, row, column, c).

  Args:
    latents: their sizes are multiples of `patch`.
    patch: size of a token.
  """
  b, f, h, w, c = latents.shape
  t, p, q = patch
  x = latents.reshape(b, f // t, t, h // p, p, w // q, q, c)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, t * p * q * c)


def unpatchify(tokens: jax.Array, grid: Triple, patch: Triple) -> jax.Array:
  """[B, S, patch c] tokens -> [B, f, h, w, c]; the inverse of `patchify`."""
  b, (f, h, w), (t, p, q) = tokens.shape[0], grid, patch
  x = tokens.reshape(b, f, h, w, t, p, q, -1)
  return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, f * t, h * p, w * q, -1)


class PatchEmbed(nnx.Module):
  """A 3-D convolution whose stride is its size: one linear map of a patch.

  Attributes:
    kernel: [frames, rows, columns, in, out].
    bias: [out].
  """

  def __init__(
    self,
    in_channels: int,
    dim: int,
    patch: Triple,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    fan_in = int(np.prod(patch)) * in_channels
    kernel = layers.xavier(rngs.params(), (fan_in, dim), jnp.float32)
    self.kernel = nnx.Param(
      kernel.reshape(*patch, in_channels, dim),
      logical_axes=(None, None, None, "latent", "embed"),
      read_as=jnp.dtype(dtype),
    )
    self.bias = nnx.Param(jnp.zeros(dim), logical_axes=("embed",))
    self.patch = patch
    self.dtype = jnp.dtype(dtype)

  def __call__(self, latents: jax.Array) -> jax.Array:
    """latents: [B, f, h, w, in] -> [B, S, out] compute dtype."""
    kernel = self.kernel[...]
    y = jax.lax.dot_general(
      round_to(patchify(latents, self.patch), self.dtype),
      round_to(kernel.reshape(-1, kernel.shape[-1]), self.dtype),
      (((2,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    bias = self.bias[...].astype(jnp.float32)
    return round_to(y + bias[None, None], self.dtype)


def rope_table(
  grid: Triple,
  axes_dims: tuple[int, ...],
  theta: float,
  dtype: DTypeLike = np.float64,
) -> jax.Array:
  """Rotations of every token of a video, positions counted from 0.

  Only the tables of single positions are constants of the program; a whole
  table would add 60 MB to it at 129 frames of 720p.

  Args:
    grid: tokens along frames, rows, columns.
    axes_dims: head dimensions that each of them rotates.
    theta: see `layers.rope_table`.
    dtype: likewise.

  Returns:
    [2, S, sum(axes_dims) / 2] float32: cosines, sines.
  """
  parts = []
  for axis, (size, dim) in enumerate(zip(grid, axes_dims)):
    table = layers.rope_table(np.arange(size)[:, None], (dim,), theta, dtype)
    shape = [2, 1, 1, 1, dim // 2]
    shape[1 + axis] = size
    parts.append(jnp.broadcast_to(table.reshape(shape), (2, *grid, dim // 2)))
  return jnp.concatenate(parts, axis=-1).reshape(2, int(np.prod(grid)), -1)


def _times(sizes: tuple[int, ...]) -> str:
  return " x ".join(map(str, sizes))
