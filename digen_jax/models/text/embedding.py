"""A table of learned vectors, as both text encoders begin with."""

import jax
import jax.numpy as jnp
from flax import nnx


class Embedding(nnx.Module):
  """Looks up rows of a table.

  Attributes:
    embedding: [rows, dim].
  """

  def __init__(
    self,
    rows: int,
    dim: int,
    *,
    stddev: float,
    axes: tuple[str | None, ...],
    rngs: nnx.Rngs,
  ):
    self.embedding = nnx.Param(
      nnx.initializers.normal(stddev)(rngs.params(), (rows, dim), jnp.float32),
      logical_axes=axes,
    )

  def __call__(self, index: jax.Array) -> jax.Array:
    """index: [...] int -> [..., dim] float32."""
    return self.embedding[...][index].astype(jnp.float32)
