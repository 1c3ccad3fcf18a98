"""Causal networks on videos, a chunk of frames at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


class Stream:
  """The earlier frames that causal layers need of a video cut in chunks.

  Layers ask for them in the order of their calls, which is the same for every
  chunk. The first chunk has nothing before it.

  Attributes:
    first: whether this is the first chunk.
    seen: what to give to the `Stream` of the next chunk.
  """

  def __init__(self, past: list[jax.Array] | None = None):
    self.first = past is None
    self.seen: list[jax.Array] = []
    self._past = past

  def extend(
    self, x: jax.Array, frames: int, start: jax.Array | None = None
  ) -> jax.Array:
    """Puts the `frames` frames before `x` in front of it.

    Args:
      x: [B, F, ...], this chunk.
      frames: how many.
      start: [B, frames, ...], what the first chunk gets; None means zeros.

    Returns:
      [B, frames + F, ...].
    """
    if not self.first:
      start = self._past[len(self.seen)]
    elif start is None:
      start = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
    x = jnp.concatenate([start, x], axis=1)
    self.seen.append(x[:, x.shape[1] - frames :])
    return x


def in_chunks(
  function: Callable[[jax.Array, Stream], jax.Array], x: jax.Array, size: int
) -> jax.Array:
  """A causal function of a video, on the first frame, then on chunks.

  Args:
    function: (chunk [B, f, ...], stream) -> [B, f', ...].
    x: [B, k size + 1, ...].
    size: frames in a chunk. Their loop is a `lax.scan`.

  Returns:
    [B, F', ...].
  """
  stream = Stream()
  first = function(x[:, :1], stream)
  if x.shape[1] == 1:
    return first
  chunks = x[:, 1:].reshape(x.shape[0], -1, size, *x.shape[2:])

  def body(
    past: list[jax.Array], chunk: jax.Array
  ) -> tuple[list[jax.Array], jax.Array]:
    stream = Stream(past)
    y = function(chunk, stream)
    return stream.seen, y

  _, later = jax.lax.scan(body, stream.seen, jnp.moveaxis(chunks, 1, 0))
  later = jnp.moveaxis(later, 0, 1)
  later = later.reshape(x.shape[0], -1, *later.shape[3:])
  return jnp.concatenate([first, later], axis=1)
