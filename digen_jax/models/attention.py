"""Attention, behind one function, so that kernels can be swapped here."""

import jax
import jax.numpy as jnp

from digen_jax.models.layers import round_to


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention; the softmax is taken in float32.

  Args:
    query: [B, S, H, D] float32 or bfloat16.
    key: [B, T, H, D], same dtype.
    value: [B, T, H, D], same dtype.
    mask: [B, T] bool, False where a key is padding; None attends to all.

  Returns:
    [B, S, H, D] in the inputs' dtype.
  """
  dtype = query.dtype
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  logits = jnp.einsum("bshd,bthd->bhst", query, key)
  logits *= query.shape[-1] ** -0.5
  if mask is not None:
    # Finite, so that a row without any valid key gives no NaN.
    logits = jnp.where(mask[:, None, None, :], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1)
  return round_to(jnp.einsum("bhst,bthd->bshd", weights, value), dtype)
