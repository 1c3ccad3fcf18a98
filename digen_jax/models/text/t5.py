"""T5's encoder, and umT5's: pre-norm, with relative position bias.

T5's blocks share one table of biases; umT5's have a table each.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", section 2.1; gated feed-forward (v1.1):
Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; umT5: Chung et al.
2023, "UniMax", section 4.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digen_jax.errors import UserError
from digen_jax.models import layers
from digen_jax.models.layers import Linear, RMSNorm
from digen_jax.models.text.embedding import Embedding

FEED_FORWARDS = ("relu", "gated-gelu")


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of a T5 encoder; names and defaults as in `config.json`.

  Attributes:
    d_model: width.
    d_kv: size of a head; `num_heads * d_kv` need not equal `d_model`.
    d_ff: hidden size of the feed-forward.
    relative_attention_num_buckets: even; half for each direction.
    relative_attention_max_distance: distances from here on share a bucket.
    feed_forward_proj: "relu" (T5) or "gated-gelu" (v1.1, tanh GELU).
    dtype: compute dtype of matrix products; the residual stream, norms and
      softmax are float32.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = "relu"
  dtype: Any = jnp.float32

  def __post_init__(self):
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    if self.feed_forward_proj not in FEED_FORWARDS:
      raise UserError(
        f"T5 feed_forward_proj {self.feed_forward_proj!r} is not supported; "
        f"one of {', '.join(FEED_FORWARDS)}"
      )


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
  """Sizes of an umT5 encoder; names and defaults as in `config.json`."""

  vocab_size: int = 250112
  d_ff: int = 1024
  num_layers: int = 8
  num_heads: int = 6
  feed_forward_proj: str = "gated-gelu"


def parse_config(raw: Mapping[str, Any], dtype: Any) -> T5Config:
  """transformers' `config.json` content -> config record."""
  cls = UMT5Config if raw["model_type"] == "umt5" else T5Config
  names = {f.name for f in dataclasses.fields(cls)} - {"dtype"}
  return cls(**{name: raw[name] for name in names & raw.keys()}, dtype=dtype)


def _bias_table(config: T5Config, rngs: nnx.Rngs) -> Embedding:
  """A bias for each bucket of distances and each head."""
  return Embedding(
    config.relative_attention_num_buckets,
    config.num_heads,
    stddev=config.d_model**-0.5,
    axes=(None, None),
    rngs=rngs,
  )


def relative_buckets(
  length: int, num_buckets: int, max_distance: int
) -> np.ndarray:
  """Which learned bias each (query, key) pair of positions uses.

  Half of the buckets are for keys after the query. Of each half, the first
  half are exact distances, the rest grow logarithmically to `max_distance`.

  Args:
    length: T, tokens.
    num_buckets: even.
    max_distance: distances from here on share the last bucket.

  Returns:
    [T, T] int32 in [0, num_buckets), indexed [query, key].
  """
  half = num_buckets // 2
  exact = half // 2
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]
  distance = np.abs(offset)
  # In float32: where a bucket begins depends on the rounding.
  ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
  growth = np.log(ratio) / np.float32(math.log(max_distance / exact))
  large = exact + (growth * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(large, half - 1))
  return (bucket + half * (offset > 0)).astype(np.int32)


class T5FeedForward(nnx.Module):
  """relu(x W) O, or gated: (gelu(x W) * (x V)) O; no biases."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    dim, hidden = config.d_model, config.d_ff
    inward = dict(
      axes=("embed", "mlp"),
      use_bias=False,
      dtype=config.dtype,
      out_dtype=jnp.float32,
      kernel_init=nnx.initializers.normal(dim**-0.5),
      rngs=rngs,
    )
    self.linear_1 = Linear(dim, hidden, **inward)
    gated = config.feed_forward_proj == "gated-gelu"
    self.gate = Linear(dim, hidden, **inward) if gated else None
    self.linear_2 = Linear(
      hidden,
      dim,
      axes=("mlp", "embed"),
      use_bias=False,
      dtype=config.dtype,
      out_dtype=jnp.float32,
      kernel_init=nnx.initializers.normal(hidden**-0.5),
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, T, d] float32 -> [B, T, d] float32."""
    if self.gate is None:
      return self.linear_2(jax.nn.relu(self.linear_1(x)))
    # In the paper's terms `gate` is the linear factor, as T5's names have it.
    activated = jax.nn.gelu(self.linear_1(x), approximate=True)
    return self.linear_2(activated * self.gate(x))


class T5Block(nnx.Module):
  """Self-attention without scaling, then the feed-forward; pre-norm."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    dim, inner = config.d_model, config.num_heads * config.d_kv
    normal = nnx.initializers.normal
    kwargs = dict(use_bias=False, dtype=config.dtype, rngs=rngs)
    inward = dict(axes=("embed", "heads"), **kwargs)
    self.norm_1 = RMSNorm(dim, eps=config.layer_norm_epsilon)
    # Scores are not divided by sqrt(d_kv): the initial queries are.
    self.to_q = Linear(
      dim, inner, kernel_init=normal((dim * config.d_kv) ** -0.5), **inward
    )
    self.to_k = Linear(dim, inner, kernel_init=normal(dim**-0.5), **inward)
    self.to_v = Linear(dim, inner, kernel_init=normal(dim**-0.5), **inward)
    self.to_out = Linear(
      inner,
      dim,
      axes=("heads", "embed"),
      out_dtype=jnp.float32,
      kernel_init=normal(inner**-0.5),
      **kwargs,
    )
    self.norm_2 = RMSNorm(dim, eps=config.layer_norm_epsilon)
    self.ff = T5FeedForward(config, rngs=rngs)
    own = isinstance(config, UMT5Config)
    self.relative_bias = _bias_table(config, rngs) if own else None
    self.num_heads = config.num_heads

  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    """x: [B, T, d] float32, bias [B or 1, H, T, T] float32 -> [B, T, d]."""
    normed = self.norm_1(x)
    query, key, value = (
      project(normed).reshape(*x.shape[:2], self.num_heads, -1)
      for project in (self.to_q, self.to_k, self.to_v)
    )
    # jax 0.10's implementation mixes dtypes itself; allow it that here only.
    with jax.numpy_dtype_promotion("standard"):
      out = jax.nn.dot_product_attention(query, key, value, bias, scale=1.0)
    x = x + self.to_out(out.reshape(*x.shape[:2], -1))
    return x + self.ff(self.norm_2(x))


class T5Encoder(nnx.Module):
  """Token ids to token states."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    dim = config.d_model
    self.config = config
    self.token_embedding = Embedding(
      config.vocab_size, dim, stddev=1.0, axes=("vocab", "embed"), rngs=rngs
    )
    shared = not isinstance(config, UMT5Config)
    self.relative_bias = _bias_table(config, rngs) if shared else None
    self.blocks = layers.stack(
      lambda rngs: T5Block(config, rngs=rngs), config.num_layers, rngs
    )
    self.norm_out = RMSNorm(dim, eps=config.layer_norm_epsilon)

  def __call__(
    self, ids: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """ids: [B, T] int, mask: [B, T] bool -> [B, T, d] float32."""
    config = self.config
    buckets = relative_buckets(
      ids.shape[1],
      config.relative_attention_num_buckets,
      config.relative_attention_max_distance,
    )

    def bias(table: Embedding) -> jax.Array:
      values = table(buckets).transpose(2, 0, 1)[None]
      if mask is None:
        return values
      lowest = jnp.finfo(jnp.float32).min
      return jnp.where(mask[:, None, None, :], values, lowest)

    shared = None if self.relative_bias is None else bias(self.relative_bias)

    def step(block: T5Block, x: jax.Array) -> jax.Array:
      own = block.relative_bias
      return block(x, shared if own is None else bias(own))

    x = layers.scan_blocks(self.blocks, step, self.token_embedding(ids))
    return self.norm_out(x)


def t5_encode(
  graphdef: nnx.GraphDef,
  params: layers.Params,
  ids: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Encodes prompts with T5 or umT5.

  Args:
    graphdef: of a `T5Encoder`, from `layers.split`.
    params: its parameters, any float dtype.
    ids: [B, T] int32 tokens.
    mask: [B, T] bool, False where a token is padding and not attended to;
      None attends to all, padding included, as FLUX does.

  Returns:
    [B, T, d] float32 token states after the last norm.
  """
  return nnx.merge(graphdef, params)(ids, mask)
