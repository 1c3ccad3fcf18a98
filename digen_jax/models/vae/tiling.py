"""Autoencoding large pictures and long videos in overlapping tiles.

Tiles are cut at regular distances, encoded or decoded on their own, and laid
over each other: where two overlap, the later one fades in over the earlier
one. What it fades in over has itself been blended before, so that corners are
mixtures of four tiles.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from digen_jax.errors import UserError

Function = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How an axis is cut; the unit is pixels (or frames).

  Attributes:
    size: of a tile.
    stride: from the start of a tile to that of the next one; `size - stride`
      overlap and are blended.
  """

  size: int = 256
  stride: int = 192

  def __post_init__(self):
    if not 0 < self.stride <= self.size:
      raise UserError(
        f"tiles of {self.size} at a stride of {self.stride}: the stride must "
        "be positive and at most the size"
      )

  def in_latents(self, downscale: int) -> "Tiling":
    """The same tiles counted in latents; UserError if they do not align."""
    if self.size % downscale or self.stride % downscale:
      raise UserError(
        f"tiles of {self.size} at a stride of {self.stride} do not align with "
        f"latents: both must be multiples of {downscale}"
      )
    return Tiling(self.size // downscale, self.stride // downscale)


def encode_tiled(encode: Function, pixels: jax.Array, config: Any) -> jax.Array:
  """`encode(pixels)`, in spatial tiles if they are asked for and needed.

  Args:
    encode: [..., H, W, C] -> [..., h, w, C'].
    pixels: [..., H, W, C].
    config: of an autoencoder: `tiling`, `sequential`, `downscale`.
  """
  if config.tiling is None or max(pixels.shape[-3:-1]) <= config.tiling.size:
    return encode(pixels)
  latents = config.tiling.in_latents(config.downscale)
  return in_space(encode, pixels, config.tiling, latents, config.sequential)


def decode_tiled(
  decode: Function, latents: jax.Array, config: Any
) -> jax.Array:
  """`decode(latents)`, in tiles as `encode_tiled`: [..., h, w, C]."""
  if config.tiling is None:
    return decode(latents)
  tiles = config.tiling.in_latents(config.downscale)
  if max(latents.shape[-3:-1]) <= tiles.size:
    return decode(latents)
  return in_space(decode, latents, tiles, config.tiling, config.sequential)


def in_space(
  function: Function,
  x: jax.Array,
  tiles: Tiling,
  results: Tiling,
  sequential: bool,
) -> jax.Array:
  """A function of pictures, tile by tile.

  Args:
    function: [..., h, w, C] -> [..., H, W, C'], scaling sizes as `results` is
      to `tiles`.
    x: [..., h, w, C].
    tiles: in the unit of `x`.
    results: the same tiles in the unit of the result.
    sequential: one tile at a time, see `each`.

  Returns:
    [..., H, W, C'].
  """
  height, width = x.shape[-3:-1]
  tops = range(0, height, tiles.stride)
  lefts = range(0, width, tiles.stride)
  parts = [
    x[..., top : top + tiles.size, left : left + tiles.size, :]
    for top in tops
    for left in lefts
  ]
  parts = iter(each(function, parts, sequential))
  overlap, stride = results.size - results.stride, results.stride
  rows: list[list[jax.Array]] = []
  for _ in tops:
    row: list[jax.Array] = []
    for column in range(len(lefts)):
      tile = next(parts)
      if rows:
        tile = fade(rows[-1][column], tile, overlap, axis=-3)
      if row:
        tile = fade(row[-1], tile, overlap, axis=-2)
      row.append(tile)
    rows.append(row)
  strips = [
    jnp.concatenate([tile[..., :stride, :stride, :] for tile in row], axis=-2)
    for row in rows
  ]
  return jnp.concatenate(strips, axis=-3)


def in_time(
  function: Function,
  x: jax.Array,
  tiles: Tiling,
  results: Tiling,
  sequential: bool,
) -> jax.Array:
  """A causal function of videos, a stretch of frames at a time.

  The first frame of a stretch stands for itself alone, not for several as the
  others do. So stretches are one frame longer than `tiles.size`, and all but
  the first drop the first frame of what comes out.

  Args:
    function: [B, f, ...] -> [B, F, ...], scaling `f - 1` to `F - 1` as
      `results` is to `tiles`.
    x: [B, f, ...].
    tiles: in frames of `x`.
    results: the same tiles in frames of the result.
    sequential: one tile at a time, see `each`.

  Returns:
    [B, F, ...].
  """
  # A stretch of one frame would drop all of it.
  starts = range(0, max(1, x.shape[1] - 1), tiles.stride)
  parts = [x[:, start : start + tiles.size + 1] for start in starts]
  first, *later = each(function, parts, sequential)
  overlap = results.size - results.stride
  stretches, tile = [first[:, : results.stride + 1]], first
  for part in later:
    tile = fade(tile, part[:, 1:], overlap, axis=1)
    stretches.append(tile[:, : results.stride])
  return jnp.concatenate(stretches, axis=1)


def each(
  function: Function, parts: Sequence[jax.Array], sequential: bool
) -> list[jax.Array]:
  """The function of every part.

  Args:
    function: of one part.
    parts: arrays, a few shapes among them.
    sequential: loop over the parts of a shape (`lax.map`), so that only one
      of them is worked on at a time and the function is compiled once per
      shape. Otherwise the order is the compiler's. Convolutions in loops are
      slow on CPU.
  """
  if not sequential:
    return [function(part) for part in parts]
  results: dict[int, jax.Array] = {}
  for shape in dict.fromkeys(part.shape for part in parts):
    places = [i for i, part in enumerate(parts) if part.shape == shape]
    stacked = jax.lax.map(function, jnp.stack([parts[i] for i in places]))
    results |= {place: stacked[i] for i, place in enumerate(places)}
  return [results[i] for i in range(len(parts))]


def fade(
  before: jax.Array, after: jax.Array, overlap: int, *, axis: int
) -> jax.Array:
  """`after`, whose start fades in over the end of `before`, linearly.

  Args:
    before: float32 array; its last `overlap` entries are where the first ones
      of `after` are.
    after: like `before`, perhaps shorter.
    overlap: at most; a short `after` overlaps with all it has.
    axis: along which they follow each other.
  """
  overlap = min(before.shape[axis], after.shape[axis], overlap)
  if not overlap:
    return after
  shape = np.ones(after.ndim, int)
  shape[axis] = overlap
  weight = np.arange(overlap, dtype=np.float32).reshape(shape) / overlap
  end = before.shape[axis]
  old = jax.lax.slice_in_dim(before, end - overlap, end, axis=axis)
  new = jax.lax.slice_in_dim(after, 0, overlap, axis=axis)
  rest = jax.lax.slice_in_dim(after, overlap, after.shape[axis], axis=axis)
  mixed = old * (1 - weight) + new * weight
  return jnp.concatenate([mixed, rest], axis=axis)
