"""Attention, behind one function, so that kernels can be swapped here.

The scores of a video, S x S, fit no memory (HunyuanVideo at 129 frames of
720p: 634 GiB in bfloat16). Beyond `DIRECT_SCORES` a query and its gradient are
computed from blocks of rows, or by a fused kernel where there is one.
"""

import contextlib
import contextvars
import functools
import importlib.util
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from digen_jax.models.layers import round_to, while_traced

# Scores of one head of one sample up to which all are held at once.
DIRECT_SCORES = 2**22
BLOCK = 128  # rows of a block are a multiple: the width of a matrix unit
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
SPLASH_BLOCK = 512

# Finite, so that a row without any valid key gives no NaN.
MASKED = -1e30


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
    mask: [B, T] bool, False where a key is padding; None attends to all. A
      row without any valid key gives something finite.

  Returns:
    [B, S, H, D] in the inputs' dtype.
  """
  device = _device_kind(query.shape)
  method = choose(query.shape, key.shape[1], query.dtype, device)
  function, division = METHODS[method], _DIVISION.get()
  if division is not None and _divides(query.shape):
    mesh, spec = division
    if method == "splash" or mesh.shape[spec[1]] > 1:
      function = _on_each_device(function, mesh, spec)
  return function(query, key, value, mask)


# The mesh of the program that is traced, and how it divides [B, S, H, D].
_DIVISION: contextvars.ContextVar[tuple[Mesh, PartitionSpec] | None] = (
  contextvars.ContextVar("division", default=None)
)


def divided(
  mesh: Mesh, spec: PartitionSpec
) -> contextlib.AbstractContextManager[None]:
  """Says how what is traced is divided: XLA does not divide all kernels.

  Args:
    mesh: where the program runs.
    spec: of queries [B, S, H, D]. Keys and values are divided likewise, but
      whole along T.
  """
  return while_traced(_DIVISION, (mesh, spec))


def _on_each_device(
  function: Callable[..., jax.Array], mesh: Mesh, spec: PartitionSpec
) -> Callable[..., jax.Array]:
  """Attention of each device's samples, rows and heads, with all keys."""
  batch, rows, *rest = spec
  keys = PartitionSpec(batch, None, *rest)

  def run(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
  ) -> jax.Array:
    length = query.shape[1]
    padding = -length % mesh.shape[rows]
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    out = jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(spec, keys, keys, PartitionSpec(batch)),
      out_specs=spec,
      check_vma=False,
    )(query, key, value, mask)
    return out[:, :length]

  return run


def _divides(query_shape: tuple[int, ...]) -> bool:
  """Whether devices have equal parts: one device, or by `divided`."""
  if (division := _DIVISION.get()) is None:
    return jax.device_count() == 1
  mesh, spec = division
  batch, _, heads, _ = query_shape
  samples = math.prod(mesh.shape[name] for name in spec[0])
  return not (batch % samples or heads % mesh.shape[spec[2]])


def choose(
  query_shape: tuple[int, ...], keys: int, dtype: DTypeLike, device: str
) -> str:
  """Which of `METHODS` serves attention of a size on a device.

  Args:
    query_shape: [B, S, H, D].
    keys: T.
    dtype: of query, key and value.
    device: "gpu" for one that cuDNN's attention supports, "tpu" for one that
      has whole samples and heads (XLA cannot divide a Pallas kernel, see
      `divided`), else anything.
  """
  _, rows, _, head_dim = query_shape
  half = jnp.dtype(dtype).itemsize == 2
  if device == "gpu" and half and head_dim <= 128 and head_dim % 8 == 0:
    return "cudnn"
  if rows * keys <= DIRECT_SCORES:
    return "direct"
  if device == "tpu" and half:
    return "splash"
  return "row_blocks"


def direct(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Attention with all scores in memory."""
  dtype = query.dtype
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  logits = jnp.einsum("bshd,bthd->bhst", query, key)
  logits *= query.shape[-1] ** -0.5
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, MASKED)
  weights = jax.nn.softmax(logits, axis=-1)
  return round_to(jnp.einsum("bhst,bthd->bshd", weights, value), dtype)


def row_blocks(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  rows: int | None = None,
) -> jax.Array:
  """Attention for a block of queries at a time, recomputed going backward.

  Every row is computed whole, so that rounding is that of `direct`; memory
  for scores is that of one block in both directions.

  Args:
    query: this and the next three as for `attention`.
    key: [B, T, H, D].
    value: [B, T, H, D].
    mask: [B, T] bool, or None.
    rows: of a block; None takes what `DIRECT_SCORES` has room for.

  Source: Rabe & Staats 2021, Self-attention Does Not Need O(n^2) Memory,
  with whole rows of keys.
  """
  batch, length, heads, head_dim = query.shape
  rows = rows or BLOCK * max(1, DIRECT_SCORES // (key.shape[1] * BLOCK))
  count = -(-length // rows)
  padding = count * rows - length
  query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
  blocks = query.reshape(batch, count, rows, heads, head_dim)
  # Their gradients are summed over all blocks: in float32.
  key, value = key.astype(jnp.float32), value.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend(block: jax.Array) -> jax.Array:
    out = direct(block.astype(jnp.float32), key, value, mask)
    return round_to(out, block.dtype)

  out = jax.lax.map(attend, jnp.moveaxis(blocks, 1, 0))
  out = jnp.moveaxis(out, 0, 1).reshape(query.shape)
  return out[:, :length]


def cudnn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  implementation: str = "cudnn",
) -> jax.Array:
  """cuDNN's fused attention, half precision, divided by XLA as any operation.

  It knows padding as a length, so the valid keys of every sample are moved to
  the front: attention does not depend on the order of keys. (As a mask they
  would be spread to [S, T].) Its kernel has not been run by this project's
  tests, which have no GPU; what surrounds it has.
  """
  lengths = None
  if mask is not None:
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
    key, value = (jnp.take_along_axis(x, order, 1) for x in (key, value))
    lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )


def splash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  size: int = SPLASH_BLOCK,
  interpret: bool = False,
) -> jax.Array:
  """The fused attention of JAX's Pallas kernels for TPU.

  Sequences are padded to whole blocks, heads to the width of a matrix unit.
  Padding is a segment of its own among keys; all queries, padding too, are of
  the prompt's segment, so that no row is empty. This project's tests run the
  kernel in interpreted mode, not on a TPU.
  """
  splash = importlib.import_module(SPLASH)
  (batch, length, heads, head_dim), keys = query.shape, key.shape[1]
  if mask is None:
    mask = jnp.ones((batch, keys), bool)
  # The kernel does not scale.
  scaled = round_to(query.astype(jnp.float32) * head_dim**-0.5, query.dtype)
  query, key, value = (
    jnp.pad(
      x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, -head_dim % BLOCK))
    )
    for x in (scaled, key, value)
  )
  mask = jnp.pad(mask, ((0, 0), (0, key.shape[1] - keys)))
  full = splash.FullMask((query.shape[1], key.shape[1]))
  forward = dict.fromkeys(("block_q", "block_kv"), size)
  backward = dict.fromkeys(
    ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size
  )
  kernel = splash.make_splash_mha_single_device(
    splash.splash_attention_mask.MultiHeadMask([full] * heads),
    block_sizes=splash.BlockSizes(**forward, **backward),
    interpret=interpret,
  )
  segments = splash.SegmentIds(
    jnp.ones(query.shape[:2], jnp.int32), mask.astype(jnp.int32)
  )
  heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
  out = jax.vmap(kernel)(*heads_first, segments)
  return out.swapaxes(1, 2)[:, :length, :, :head_dim]


METHODS = {
  "direct": direct,
  "row_blocks": row_blocks,
  "cudnn": cudnn,
  "splash": splash_attention,
}


def _device_kind(query_shape: tuple[int, ...]) -> str:
  """The `device` of `choose` for this process."""
  device = jax.devices()[0]
  if device.platform == "gpu":
    # cuDNN's attention needs CUDA and compute capability 8.0 (Ampere).
    cuda = "cuda" in device.client.platform_version
    return "gpu" if cuda and float(device.compute_capability) >= 8 else "other"
  if device.platform == "tpu" and importlib.util.find_spec(SPLASH):
    return "tpu" if _divides(query_shape) else "other"
  return "other"
