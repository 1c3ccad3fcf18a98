"""Moving a pytree from one mesh to another, verified on arrival."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def reshard(tree: Any, shardings: Any) -> Any:
  """Copies `tree` to other shardings, on the same or another mesh.

  The source must be computed already: `jax.device_put` to a different layout
  goes through the host and would block the dispatching thread until it is. The
  source is never donated (donating a put between meshes crashes XLA's CPU
  client when the layouts match).

  Args:
    tree: pytree of arrays.
    shardings: matching pytree of shardings.
  """
  return jax.device_put(tree, shardings, may_alias=False)


@jax.jit
def own(tree: Any) -> Any:
  """The same values in buffers of their own, which may then be donated.

  `jax.device_put` may share buffers with its source, whatever `may_alias`
  says, when a single device's array becomes one shard of many.
  """
  return jax.tree.map(jnp.copy, tree)


def checksums(tree: Any) -> list[jax.Array]:
  """A checksum of every leaf, the same in every layout: [] uint32 each.

  The checksum of a leaf is the sum of its bit patterns modulo 2**32: exact, so
  it does not depend on the order of summation, that is, on the sharding.
  Elements are weighted by their position, so that permuted shards show. The
  arrays may still be under way.
  """
  return _checksums(jax.tree.leaves(tree))


def check(sent: Any, received: Any) -> None:
  """Raises RuntimeError unless two lists of checksums are equal."""
  sent, received = (
    np.asarray(jax.device_get(sums), np.uint32) for sums in (sent, received)
  )
  if len(sent) != len(received) or not np.array_equal(sent, received):
    wrong = (
      ""
      if len(sent) != len(received)
      else f", {int((sent != received).sum())} differ"
    )
    raise RuntimeError(
      f"weight publish failed its check: {len(sent)} leaves sent, "
      f"{len(received)} bound{wrong}; the previous version stays in use"
    )


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_leaf_checksum(leaf) for leaf in leaves]


def _leaf_checksum(leaf: jax.Array) -> jax.Array:
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  weights = jnp.ones((), jnp.uint32)
  for dim, size in enumerate(leaf.shape):
    shape = [1] * leaf.ndim
    shape[dim] = size
    position = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    # An odd multiplier per axis: invertible modulo 2**32.
    weights = weights * jnp.uint32(2654435761) + position
  if leaf.ndim:
    weights = jnp.broadcast_to(
      weights * jnp.uint32(2) + jnp.uint32(1), bits.shape
    )
  return jnp.sum(bits * weights, dtype=jnp.uint32)
